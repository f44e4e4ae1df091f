"""A network's training step on the accelerator, and the same step without each of its ideas."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from rarefy.errors import ModelError, OptionError
from rarefy.metrics import Product, Work, work
from rarefy.patterns import NM, Pattern
from rarefy.systems.sat.config import Accelerator
from rarefy.systems.sat.elementwise import costs
from rarefy.systems.sat.gemms import FORWARD, STAGES, Layer, Stage, layers, read_pattern
from rarefy.systems.sat.schedule import Instruction, schedule


def energy(steps: Iterable[Instruction], array: Accelerator) -> float:
    """Return multiply-adds and vector operations, and bytes of memory, each at its cost: a proxy, no joules."""
    return sum(array.energy_mac * (step.macs + step.ops) + array.energy_byte * step.bytes for step in steps)


@dataclass(frozen=True)
class Simulation:
    """One training step: its layers, the static list of instructions, and what they add up to.

    `not_modelled` names what the network does and the cycles lack. Utilisation is the multiply-adds done over those
    that the array could have done in the time; GFLOP/s count what is done, two operations each.
    """

    pattern: NM
    array: Accelerator
    layers: tuple[Layer, ...]
    instructions: tuple[Instruction, ...]
    not_modelled: tuple[str, ...]

    @cached_property
    def cycles(self) -> int:
        return sum(step.cycles for step in self.instructions)

    @property
    def product_cycles(self) -> int:
        """Cycles of the array's products alone."""
        return sum(step.cycles for step in self.instructions if step.unit == "STCE")

    @property
    def pass_cycles(self) -> int:
        """Cycles of passes over data: normalisation, activation, pooling."""
        return sum(step.cycles for step in self.instructions if step.stage in ("EF", "EB"))

    @property
    def update_cycles(self) -> int:
        return sum(step.cycles for step in self.instructions if step.stage == "UP")

    @property
    def seconds(self) -> float:
        return self.array.seconds(self.cycles)

    @property
    def macs(self) -> int:
        return sum(step.macs for step in self.instructions)

    @property
    def bytes(self) -> float:
        return sum(step.bytes for step in self.instructions)

    @property
    def utilisation(self) -> float:
        return self.macs / (self.array.rows * self.array.columns * self.cycles)

    @property
    def gflops(self) -> float:
        return 2e-9 * self.macs / self.seconds

    @property
    def energy(self) -> float:
        return energy(self.instructions, self.array)

    def of(self, layer: str) -> tuple[Instruction, ...]:
        """Return the instructions of one layer."""
        return tuple(step for step in self.instructions if step.layer == layer)


def simulate(
    model: nn.Module,
    example_input: Any,
    pattern: str | Pattern = "2:8",
    accelerator: Accelerator | None = None,
    *,
    stages: Collection[Stage] = STAGES,
    pregenerate: bool = True,
    dense: Iterable[str] = (),
    ends: bool = True,
) -> Simulation:
    """Return the cycles of one training step of `model` on the accelerator of BDWP's paper.

    The model runs once on `example_input`, a whole batch, to read its products; build both under `torch.device("meta")`
    to simulate a large batch in seconds. No weight's value matters.

    Args:
        pattern: N:M; N = M is dense training.
        accelerator: its parameters; by default `Accelerator()`.
        stages: whose weights are pruned: ("FF", "BP") is BDWP, ("FF",) SR-STE, ("BP",) SDWP, () dense training.
        pregenerate: pruned copies are written with the update, instead of pruned anew before each product.
        dense: names (globs) of layers that stay dense beside those that must.
        ends: keep the layers at the network's input and output dense, as BDWP does.

    Raises:
        OptionError: the pattern is no N:M, or longer than the PEs' window; an unknown stage.
        SelectionError: a name in `dense` fits no layer.
        ModelError: the model does not run on `example_input`, or multiplies nothing.

    Source: Fang et al. 2023, arXiv 2309.13015, for the units and their ideas; the equations are those of
    `rarefy.systems.sat.timing` and `memory`, not of the authors' circuit.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    >>> sparse = simulate(net, torch.zeros(512, 64), "2:8")
    >>> [layer.dense_because for layer in sparse.layers]
    ['first layer: no gradient goes on to its input', None, 'last layer']
    """
    return _simulate(work(model, example_input), read_pattern(pattern), accelerator or Accelerator(), stages, pregenerate,
                     tuple(dense), ends)  # fmt: skip


def _simulate(
    done: Work,
    pattern: NM,
    array: Accelerator,
    stages: Collection[Stage],
    pregenerate: bool,
    dense: tuple[str, ...],
    ends: bool,
) -> Simulation:
    if pattern.m > array.window and pattern.n < pattern.m:
        raise OptionError(
            f"a PE selects from {array.window} activations (window), too few for {pattern}: use a larger window"
        )
    if not done.products and done.not_counted:
        raise ModelError(f"none of the model's products can be read: {'; '.join(done.not_counted)}")
    found = layers(done.products, pattern, stages, dense, ends)
    named = {layer.name: layer for layer in found}
    steps = [named[step.name] if isinstance(step, Product) else step for step in done.steps]
    missing = sorted({step.operation for step in done.passes if costs(step) is None}) if array.elementwise else []
    return Simulation(
        pattern, array, found, schedule(steps, array, pregenerate),
        (*done.not_counted, *(f"passes of {operation} over data" for operation in missing)),
    )  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """One network's training step, and the same on the same accelerator without one thing at a time."""

    sparse: Simulation
    dense: Simulation
    forward_only: Simulation
    no_pregeneration: Simulation
    no_interleaving: Simulation

    @property
    def speedup(self) -> float:
        """How many times faster than dense training."""
        return self.dense.cycles / self.sparse.cycles

    @property
    def product_speedup(self) -> float:
        """The same with passes over data left out, as if they were hidden behind products."""
        return (self.dense.cycles - self.dense.pass_cycles) / (self.sparse.cycles - self.sparse.pass_cycles)

    @property
    def bound(self) -> float:
        """Dense multiply-adds over those left: the speed-up of arrays that are never idle and never wait."""
        return self.dense.macs / self.sparse.macs


def compare(
    model: nn.Module,
    example_input: Any,
    pattern: str | Pattern = "2:8",
    accelerator: Accelerator | None = None,
    *,
    dense: Iterable[str] = (),
    ends: bool = True,
) -> Comparison:
    """Simulate BDWP with everything, dense training, SR-STE (FF only), no pre-generation, and no interleaving.

    Arguments and errors are those of `simulate`; the model runs once.
    """
    done, nm, array, names = (
        work(model, example_input),
        read_pattern(pattern),
        accelerator or Accelerator(),
        tuple(dense),
    )

    def run(stages: Collection[Stage] = STAGES, pregenerate: bool = True, on: Accelerator = array) -> Simulation:
        return _simulate(done, nm, on, stages, pregenerate, names, ends)

    return Comparison(run(), run(()), run(FORWARD), run(pregenerate=False), run(on=array.changed(interleave=1)))
