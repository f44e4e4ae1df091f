"""Bytes between memory and chip for a product, by how it is laid out and in which order its tiles run.

Data is FP16 and a convolution's pixels are kept as they are (no copy for each kernel position); a tile's share of a
tensor is its share of the dimension it cuts, halos left out. Half of each buffer holds what is worked on, the other half
what comes next. A product's time is the longer of its cycles and its bytes over the bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from rarefy.systems.sat.config import Accelerator
from rarefy.systems.sat.gemms import Gemm
from rarefy.systems.sat.timing import Mapping, ceil_div, tiles

Order = Literal["rows", "columns", "reduction"]
ORDERS: dict[str, tuple[Order, ...]] = {"output": ("rows", "columns"), "weight": ("reduction", "columns")}
HALF, SINGLE = 2, 4  # bytes of FP16 and FP32


@dataclass(frozen=True)
class Widths:
    """Bytes of one entry of the right factor and of the result, as they stand in memory."""

    right: float = HALF
    out: float = HALF


class Traffic(NamedTuple):
    """Bytes of one product: left factor and right one read, results written, partial sums written and read again."""

    left: float
    right: float
    out: float
    sums: float

    @property
    def total(self) -> float:
        return self.left + self.right + self.out + self.sums


def traffic(gemm: Gemm, mapping: Mapping, order: Order, array: Accelerator, widths: Widths) -> Traffic:
    """Return the bytes of a product whose outermost loop runs over `order`.

    Output-stationary: "rows" keeps as many row tiles on chip as fit while all columns go by; the right factor is read
    again for each such block unless all of it fits, and the left once, or for each column tile where not even one row
    tile fits. "columns" is the same with the factors exchanged.

    Weight-stationary: weights are read once. "reduction" takes all columns of one slice of the reduction before the next: the
    left factor's slice is read once if it fits, else for each column tile; sums of all columns wait in the output
    buffer, or go to memory and back, in FP32, for every further slice. "columns" takes all slices of one column tile, so
    that only its sums wait, but needs the whole left factor on chip to read it once.
    """
    cut = tiles(gemm, mapping, array)
    left, right = HALF * gemm.left / gemm.groups, widths.right * gemm.right / gemm.groups
    row_half, column_half = array.row_buffer * 512, array.column_buffer * 512
    sums = 0.0
    if mapping.dataflow == "output":
        reads = [1, 1]
        outer = 0 if order == "rows" else 1
        size, pieces, room = ((left, cut.rows, row_half), (right, cut.columns, column_half))[outer]
        inner_size, inner_pieces, inner_room = ((right, cut.columns, column_half), (left, cut.rows, row_half))[outer]
        fitting = int(room // (size / pieces))
        reads[outer] = 1 if fitting or inner_pieces == 1 else inner_pieces
        reads[1 - outer] = 1 if inner_size <= inner_room else ceil_div(pieces, max(1, fitting))
        left, right = left * reads[0], right * reads[1]
    else:
        slice_, waiting = (left / cut.reduction, gemm.columns) if order == "reduction" else (left, array.columns)
        left *= 1 if slice_ <= row_half else cut.columns
        if gemm.rows * min(waiting, gemm.columns) * SINGLE > array.output_buffer * 1024:
            sums = 2.0 * SINGLE * (cut.reduction - 1) * gemm.rows * gemm.columns
    return Traffic(gemm.groups * left, gemm.groups * right, widths.out * gemm.out, gemm.groups * sums)
