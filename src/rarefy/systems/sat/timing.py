"""Cycles of a matrix product on the array, in closed form; `array.py` counts the same by running it.

A PE does one multiply-add a cycle. Of a group of m entries along the reduction it takes the n kept ones in turn. With
I outputs interleaved, a *step* (one multiply-add of each) takes max(I, adder latency) cycles, because an output's next
addition waits for its last one: the stall factor a = max(1, latency / I) of the method sheet, times I.

Output-stationary: a PE owns I outputs, and operands go by. With S = K n / m steps for a tile of (R I) x C outputs:

    tile = S max(I, La)
    cycles = (tiles - 1) max(tile, R) + tile + (R + C - 2) + L + R

fill, pipeline and drain (R cycles down the columns) are seen once; a tile's results leave while the next is computed,
which takes R cycles at least.

Weight-stationary: a PE holds h groups (h n weights, h m activations to select from), activations go along rows and sums
down columns. With T = R h m rows of the right factor in a tile:

    tile = ceil(P / I) h n max(I, La)             (ceil(P / I) I where h n = 1: nothing is added to itself)
    cycles = R h n + (tiles - 1) max(tile, (R - 1) skew + R h n) + tile + (R - 1) skew + (C - 1) + L

R h n is the loading of weights down the columns, from the second tile on behind the tile before, once its last row has
taken its own. A row starts `skew` cycles after the one above, when its sums are there: h n max(I, La), or La for h n = 1.

Output-stationary is the method sheet's formula wherever a tile takes R cycles or more. Weight-stationary differs from
it in three terms: the sheet starts rows one cycle apart, loads R m weights whatever is kept, and lets h n = 1 wait for
itself. One output-stationary tile with n = m = I = La = 1 and L = 0 is the textbook's 2R + C + K - 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from rarefy.systems.sat.config import Accelerator
from rarefy.systems.sat.gemms import Gemm

Dataflow = Literal["output", "weight"]


@dataclass(frozen=True)
class Mapping:
    """How a product is laid on the array: what stays in place, outputs interleaved, and groups held in a PE."""

    dataflow: Dataflow
    interleave: int = 1
    held: int = 1


class Tiles(NamedTuple):
    """Into how many parts each dimension of one group is cut."""

    rows: int
    columns: int
    reduction: int

    @property
    def number(self) -> int:
        return self.rows * self.columns * self.reduction


class Beat(NamedTuple):
    """Cycles of one tile, of a step in it, the least between two starts, and of a row's start behind the row above."""

    tile: int
    step: int
    spacing: int
    skew: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tiles(gemm: Gemm, mapping: Mapping, array: Accelerator) -> Tiles:
    columns = ceil_div(gemm.columns, array.columns)
    if mapping.dataflow == "output":
        return Tiles(ceil_div(gemm.rows, array.rows * mapping.interleave), columns, 1)
    return Tiles(1, columns, ceil_div(gemm.reduction, array.rows * gemm.m * mapping.held))


def beat(gemm: Gemm, mapping: Mapping, array: Accelerator) -> Beat:
    depth = mapping.interleave
    step = max(depth, array.adder_latency)
    if mapping.dataflow == "output":
        tile = gemm.reduction // gemm.m * gemm.n * step
        return Beat(tile, step, max(tile, array.rows), 1)
    chain = gemm.n * mapping.held
    step = step if chain > 1 else depth
    skew = chain * step if chain > 1 else array.adder_latency
    tile = ceil_div(gemm.rows, depth) * chain * step
    return Beat(tile, step, max(tile, (array.rows - 1) * skew + array.rows * chain), skew)


def cycles(gemm: Gemm, mapping: Mapping, array: Accelerator) -> int:
    """Return the cycles of all groups of a product, without memory."""
    b = beat(gemm, mapping, array)
    body = (
        (gemm.groups * tiles(gemm, mapping, array).number - 1) * b.spacing + b.tile + array.columns - 1 + array.pipeline
    )
    if mapping.dataflow == "output":
        return body + 2 * array.rows - 1
    return body + (array.rows - 1) * b.skew + array.rows * gemm.n * mapping.held
