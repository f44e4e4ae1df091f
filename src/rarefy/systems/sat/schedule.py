"""The offline scheduler: for every product the best dataflow, interleaving, held groups and loop order; a static list."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rarefy.metrics import Pass
from rarefy.systems.sat.config import Accelerator
from rarefy.systems.sat.elementwise import Sweep, sweep
from rarefy.systems.sat.gemms import Gemm, Layer
from rarefy.systems.sat.memory import HALF, ORDERS, Order, Widths, traffic
from rarefy.systems.sat.pregeneration import Update, Weights, update, weights_for
from rarefy.systems.sat.timing import Mapping, cycles


@dataclass(frozen=True)
class Instruction:
    """One thing that the controller starts, and what it takes.

    Attributes:
        layer: name of the layer or module.
        stage: FF, BP or WU; UP for an optimizer step; EF and EB for a pass over data, forward and backward.
        unit: STCE (the array) or WUVE (the vector unit).
        pattern: N:M of the weights, 1:1 dense.
        mapping, order: how the array runs it (None on the WUVE).
        head: cycles before the array can start (pruning in line).
        compute, memory: cycles of the unit and of the memory, which overlap.
        macs: multiply-adds done on the array; ops: operations of the vector unit. bytes: to and from memory.
    """

    layer: str
    stage: str
    unit: str
    operation: str
    pattern: str
    mapping: Mapping | None
    order: Order | None
    head: int
    compute: int
    memory: int
    macs: int
    ops: int
    bytes: float

    @property
    def cycles(self) -> int:
        return self.head + max(self.compute, self.memory)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cycles": self.cycles}


def mappings(gemm: Gemm, array: Accelerator) -> Iterator[Mapping]:
    """Yield every way to lay a product on the array."""
    for depth in range(1, array.interleave + 1):
        yield Mapping("output", depth)
        held = 1
        while held * gemm.m <= array.window:
            yield Mapping("weight", depth, held)
            held *= 2


def best(layer: str, operation: str, gemm: Gemm, weights: Weights, out: float, array: Accelerator) -> Instruction:
    """Return the fastest instruction for a product; of equally fast ones the one that moves the fewest bytes."""
    found = None
    widths = Widths(weights.right, out)
    for mapping in mappings(gemm, array):
        compute = cycles(gemm, mapping, array)
        for order in ORDERS[mapping.dataflow]:
            moved = traffic(gemm, mapping, order, array, widths).total
            memory = math.ceil(moved / array.bytes_per_cycle)
            key = (max(compute, memory), moved)
            if found is None or key < found[0]:
                found = key, mapping, order, compute, memory
    assert found is not None
    (_, moved), mapping, order, compute, memory = found
    return Instruction(
        layer, gemm.stage, "STCE", operation, f"{gemm.n}:{gemm.m}", mapping, order, weights.head, compute, memory,
        gemm.macs, 0, moved,
    )  # fmt: skip


def schedule(steps: Sequence[Layer | Pass], array: Accelerator, pregenerate: bool = True) -> tuple[Instruction, ...]:
    """Return the instructions of one training step: forward in order, then backward, each layer's update after its WU."""
    forward: list[Instruction] = []
    backward: list[Instruction] = []
    for step in steps:
        if isinstance(step, Pass):
            if array.elementwise:
                forward += _pass(step, "EF", sweep(step, "forward", array), array)
                backward[:0] = _pass(step, "EB", sweep(step, "backward", array), array)
            continue
        ours = {gemm.stage: _product(step, gemm, array, pregenerate) for gemm in step.gemms}
        forward.append(ours.pop("FF"))
        backward[:0] = [*ours.values(), *_update(step, array, pregenerate)]
    return (*forward, *backward)


def _product(layer: Layer, gemm: Gemm, array: Accelerator, pregenerate: bool) -> Instruction:
    if gemm.stage == "WU":
        out = 0 if layer.product.weight else HALF  # a weight's gradient goes straight to the vector unit
        return best(layer.name, layer.product.kind, gemm, Weights(HALF), out, array)
    return best(layer.name, layer.product.kind, gemm, weights_for(gemm, array, pregenerate), HALF, array)


def _update(layer: Layer, array: Accelerator, pregenerate: bool) -> list[Instruction]:
    moved = update(layer, array, pregenerate)
    return [_vector(layer.name, "UP", "update", moved, array)] if moved else []


def _pass(step: Pass, stage: str, swept: Sweep | None, array: Accelerator) -> list[Instruction]:
    return [_vector(step.module, stage, step.operation, swept, array)] if swept else []


def _vector(name: str, stage: str, operation: str, done: Update | Sweep, array: Accelerator) -> Instruction:
    memory = math.ceil(done.bytes / array.bytes_per_cycle)
    return Instruction(
        name, stage, "WUVE", operation, "1:1", None, None, 0, done.cycles, memory, 0, done.ops, done.bytes
    )
