"""A comparison as rows and plain data: each layer with its cycles, and beside the runs that lack one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rarefy.patterns import NM
from rarefy.systems.sat.schedule import Instruction
from rarefy.systems.sat.simulate import Comparison, Simulation, energy

PASSES = ("EF", "EB")


@dataclass(frozen=True)
class Row:
    """One layer, or all passes over data, or the total, of one training step.

    `ff`, `bp`, `wu`, `update` are cycles; `utilisation` and `gflops` count the multiply-adds that are done; `speedup` is
    against dense training, `against_ff` against SR-STE (only FF pruned), the next two against the same without
    pre-generation and without interleaving. All on the same accelerator.
    """

    layer: str
    kind: str
    pattern: str
    dense_because: str | None
    ff: int
    bp: int
    wu: int
    update: int
    cycles: int
    dense_cycles: int
    utilisation: float
    gflops: float
    energy: float
    speedup: float
    against_ff: float
    against_no_pregeneration: float
    against_no_interleaving: float


def rows(found: Comparison) -> list[Row]:
    """Return a row for each layer in order, one for the passes over data if they take time, and the total."""
    sparse = found.sparse
    made = [
        _row(found, layer.name, layer.product.kind, layer.dense_because or sparse.pattern, partial(_of, layer.name))
        for layer in sparse.layers
    ]
    if sparse.pass_cycles:
        made.append(_row(found, "passes over data", "", None, lambda step: step.stage in PASSES))
    return [*made, _row(found, "total", "", None, lambda step: True)]


def _of(layer: str, step: Instruction) -> bool:
    return step.layer == layer and step.stage not in PASSES


def _row(found: Comparison, name: str, kind: str, weights: NM | str | None, mine: Callable[[Instruction], bool]) -> Row:
    def cycles(run: Simulation) -> int:
        return sum(step.cycles for step in run.instructions if mine(step))

    array, took = found.sparse.array, cycles(found.sparse)
    steps = [step for step in found.sparse.instructions if mine(step)]
    macs = sum(step.macs for step in steps)
    stages = {stage: sum(step.cycles for step in steps if step.stage == stage) for stage in ("FF", "BP", "WU", "UP")}
    return Row(
        layer=name,
        kind=kind,
        pattern=str(weights) if isinstance(weights, NM) else "dense" if weights else "",
        dense_because=weights if isinstance(weights, str) else None,
        ff=stages["FF"],
        bp=stages["BP"],
        wu=stages["WU"],
        update=stages["UP"],
        cycles=took,
        dense_cycles=cycles(found.dense),
        utilisation=macs / (array.rows * array.columns * took),
        gflops=2e-9 * macs / array.seconds(took),
        energy=energy(steps, array),
        speedup=cycles(found.dense) / took,
        against_ff=cycles(found.forward_only) / took,
        against_no_pregeneration=cycles(found.no_pregeneration) / took,
        against_no_interleaving=cycles(found.no_interleaving) / took,
    )


def summary(run: Simulation) -> dict[str, Any]:
    """Return one simulation's totals as plain data."""
    return {
        "cycles": run.cycles, "seconds": run.seconds, "product_cycles": run.product_cycles, "pass_cycles": run.pass_cycles,
        "update_cycles": run.update_cycles, "macs": run.macs, "bytes": run.bytes, "utilisation": run.utilisation,
        "gflops": run.gflops, "energy": run.energy,
    }  # fmt: skip


def to_dict(found: Comparison) -> dict[str, Any]:
    """Return all of a comparison but its instructions as plain data."""
    runs = ("sparse", "dense", "forward_only", "no_pregeneration", "no_interleaving")
    return {
        "pattern": str(found.sparse.pattern),
        "accelerator": found.sparse.array.model_dump(),
        "speedup": found.speedup,
        "speedup_without_passes": found.product_speedup,
        "speedup_bound_by_macs": found.bound,
        "operations": found.sparse.macs / found.dense.macs,
        "not_modelled": list(found.sparse.not_modelled),
        "runs": {name: summary(getattr(found, name)) for name in runs},
        "layers": [asdict(row) for row in rows(found)],
    }
