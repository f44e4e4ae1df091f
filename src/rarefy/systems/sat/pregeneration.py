"""N:M weights as the accelerator stores them, and when they are made: right after the update, or when they are needed.

Pre-generation: the WUVE has just computed the new weights, and the SORE keeps the largest n of every m of them twice,
along the inputs for FF and along the outputs for BP. Two packed copies are written, and the next step reads them.
Without it the update writes the dense FP16 weights, FF and BP each read them, and the SORE works at the head of each
product, `lanes` weights a cycle, while the array waits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rarefy.errors import PatternError
from rarefy.patterns import NM
from rarefy.systems.sat.config import Accelerator
from rarefy.systems.sat.gemms import Gemm, Layer
from rarefy.systems.sat.memory import HALF

STATE = 16  # bytes of a weight's update: FP32 master and momentum, read and written
UPDATE_OPS = 4  # vector operations of `update_weights`: weight decay, momentum, learning rate, cast


@dataclass(frozen=True)
class Packed:
    """A matrix [K, Q] of which n in every m rows are kept: `values` and `places` [K / m, n, Q], places within a group."""

    values: NDArray[np.float16]
    places: NDArray[np.uint8]
    m: int

    @property
    def bytes(self) -> int:
        """Size in memory: FP16 values, and places of ceil(log2 m) bits one after the other."""
        return HALF * self.values.size + math.ceil(self.places.size * place_bits(self.m) / 8)

    def unpack(self) -> NDArray[np.float16]:
        """Return the matrix [K, Q] with its zeros."""
        groups, _, columns = self.values.shape
        dense = np.zeros((groups, self.m, columns), np.float16)
        np.put_along_axis(dense, self.places.astype(np.intp), self.values, axis=1)
        return dense.reshape(groups * self.m, columns)


def place_bits(m: int) -> int:
    """Bits of a place within a group of m: ceil(log2 m)."""
    return (m - 1).bit_length()


def bytes_per_weight(n: int, m: int) -> float:
    """Return bytes for one weight of the dense matrix: 2 n / m + ceil(log2 m) n / (8 m), or 2 for a dense one.

    >>> bytes_per_weight(2, 8), bytes_per_weight(2, 4)
    (0.59375, 1.125)
    """
    return HALF if n == m else n / m * (HALF + place_bits(m) / 8)


def pack(matrix: NDArray[np.floating], n: int, m: int) -> Packed:
    """Do what the SORE does: keep the n largest magnitudes of every m rows of [K, Q], in the order of the rows.

    Ties go to the lower row, as everywhere here. Raises PatternError where K is no multiple of m, n > m, or m > 256.
    """
    if matrix.shape[0] % m or m > 256:
        raise PatternError(f"{n}:{m} does not fit {matrix.shape[0]} rows: give a multiple of M, and M of 256 at most")
    half = np.ascontiguousarray(matrix, np.float16)
    pattern = NM(n, m, dim=0)
    kept = pattern.project(torch.from_numpy(np.abs(half.astype(np.float32))), keep=n).numpy()
    kept = kept.reshape(-1, m, half.shape[1])
    places = np.argsort(~kept, axis=1, kind="stable")[:, :n]
    values = np.take_along_axis(half.reshape(kept.shape), places, axis=1)
    return Packed(values, places.astype(np.uint8), m)


def ff_matrix(weight: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return a weight [Co, Ci, *kernel] as FF reads it, [kernel * Ci, Co]: neighbours along the sum are input channels."""
    return np.moveaxis(weight, (0, 1), (-1, -2)).reshape(-1, weight.shape[0])


def bp_matrix(weight: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return a weight [Co, Ci, *kernel] as BP reads it, [kernel * Co, Ci]: neighbours along the sum are output channels."""
    return ff_matrix(np.swapaxes(weight, 0, 1))


@dataclass(frozen=True)
class Updated:
    """A layer after its update: FP32 weights and momentum [Co, Ci, *kernel], and the copies of the next FF and BP."""

    weight: NDArray[np.float32]
    momentum: NDArray[np.float32]
    forward: Packed
    backward: Packed


def update_weights(
    weight: NDArray[np.float32],
    momentum: NDArray[np.float32],
    gradient: NDArray[np.float32],
    *,
    lr: float,
    mu: float = 0.9,
    decay: float = 0.0,
    n: int,
    m: int,
) -> Updated:
    """Do what WUVE and SORE do: SGD in four FP32 vector operations, then both packed copies from the same new weights.

    g = dW + decay w; v = mu v + g; w = w - lr v; FP16(w): the `UPDATE_OPS` that are counted.
    """
    moved = np.float32(mu) * momentum + (gradient + np.float32(decay) * weight)
    new = weight - np.float32(lr) * moved
    half = new.astype(np.float16)
    return Updated(new, moved, pack(ff_matrix(half), n, m), pack(bp_matrix(half), n, m))


@dataclass(frozen=True)
class Weights:
    """A layer's weights in memory: bytes of one entry as FF or BP read it, and SORE cycles before the product can run."""

    right: float
    head: int = 0


def weights_for(gemm: Gemm, array: Accelerator, pregenerate: bool) -> Weights:
    """Return how FF or BP of a layer finds its weights."""
    if not gemm.sparse or pregenerate:
        return Weights(bytes_per_weight(gemm.n, gemm.m))
    return Weights(HALF, math.ceil(gemm.right / array.lanes))


@dataclass(frozen=True)
class Update:
    """The optimizer step of one layer on the WUVE, with the copies that it writes: vector cycles, memory bytes, operations."""

    cycles: int
    bytes: float
    ops: int


def update(layer: Layer, array: Accelerator, pregenerate: bool) -> Update | None:
    """Return what moving a layer's weights costs, or None where nothing moves.

    The gradient comes from the array's output without a way through memory. Written are the FP32 state and, in FP16,
    what the next step reads: one packed copy for each pruned product and a dense one where any product reads that. The
    SORE prunes what goes by, one copy after the other.
    """
    if not layer.updates:
        return None
    reads: Sequence[Gemm] = [gemm for gemm in layer.gemms if gemm.stage != "WU"]
    pruned = [gemm for gemm in reads if gemm.sparse] if pregenerate else []
    written = sum(bytes_per_weight(gemm.n, gemm.m) for gemm in pruned) + HALF * (len(pruned) < len(reads))
    passes = max(UPDATE_OPS, len(pruned))
    return Update(
        math.ceil(passes * layer.updates / array.lanes), (STATE + written) * layer.updates, UPDATE_OPS * layer.updates
    )
