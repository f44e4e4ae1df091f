"""Passes over data that are no matrix product (normalisation, activation, pooling ...), on the vector unit.

Operations are counted as fused multiply-adds, compares or table look-ups, one a lane and cycle; nothing is fused with
its neighbour, and nothing runs beside a product. So this is the slow end; the fast end, everything hidden behind
products, is `elementwise=False`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rarefy.metrics import Pass
from rarefy.systems.sat.config import Accelerator
from rarefy.systems.sat.memory import HALF


class Costs(NamedTuple):
    """Operations for each entry written (read, for reductions), sweeps over what comes in, and whether that is saved.

    Forward reads its input in each sweep and writes its output once. Backward reads the output's gradient, and the
    saved input, in each sweep, and writes the input's gradient once.
    """

    forward: int
    backward: int
    sweeps: int = 1
    saved: bool = True
    reduces: bool = False


FREE = Costs(0, 0)
POINTWISE = Costs(1, 1)
LOOK_UP = Costs(2, 3)
# Batch norm forward: sum, sum of squares; then one multiply-add. Backward: sum of dy, sum of dy x; then
# dx = a dy + b x + c. Both in two sweeps, for no chip holds the whole batch; layer norm's rows fit.
BATCH_NORM = Costs(3, 4, sweeps=2)
ROW_NORM = Costs(3, 4)
SOFTMAX = Costs(4, 3)
SUM = Costs(1, 1, saved=False)  # backward: where a branch of a residual left, two gradients are added
POOL = Costs(1, 1, saved=False, reduces=True)

KNOWN: dict[str, Costs] = {
    **dict.fromkeys(("relu", "hardtanh", "leaky_relu", "threshold", "mul", "div", "clamp"), POINTWISE),
    **dict.fromkeys(("gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "elu", "exp", "erf"), LOOK_UP),
    **dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training"), BATCH_NORM),
    **dict.fromkeys(("native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm"), ROW_NORM),
    **dict.fromkeys(("softmax", "_softmax", "_safe_softmax", "_log_softmax"), SOFTMAX),
    **dict.fromkeys(("add", "sub", "rsub"), SUM),
    **dict.fromkeys(("max_pool1d", "max_pool2d_with_indices", "adaptive_max_pool2d"), POOL),
    **dict.fromkeys(("avg_pool2d", "_adaptive_avg_pool2d", "mean", "sum"), POOL),
}
# done by where the DMA reads and writes
LAYOUT = {
    "cat", "clone", "_to_copy", "contiguous", "stack", "constant_pad_nd", "copy", "repeat", "roll", "flip", "index",
    "index_select", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "gather", "empty_like", "zeros_like", "ones_like",
    "new_zeros", "new_empty", "detach", "alias", "embedding",
}  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """One direction of a pass: vector cycles, memory bytes, operations."""

    cycles: int
    bytes: float
    ops: int


def costs(step: Pass) -> Costs | None:
    """Return what a pass costs, or None where its operation is not known."""
    operation = step.operation.rstrip("_")
    return FREE if operation in LAYOUT else KNOWN.get(operation)


def sweep(step: Pass, direction: Literal["forward", "backward"], array: Accelerator) -> Sweep | None:
    """Return one direction of a pass, or None where there is nothing to do: free, unknown, or no gradient goes back."""
    known = costs(step)
    if not known or not known.forward or (direction == "backward" and not step.gradient):
        return None
    if direction == "forward":
        each, moved = known.forward, known.sweeps * step.read + step.written
    else:
        each, moved = known.backward, known.sweeps * (step.written + known.saved * step.read) + step.read
    ops = each * (step.read if known.reduces else step.written)
    return Sweep(math.ceil(ops / array.lanes), HALF * moved, ops)
