"""Alternate between a sparse and a dense network while training: AC/DC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.engine import Family, Method, Sparsifier
from rarefy.engine.options import check_allocation, check_clock, check_ends, check_pattern, check_sparsity, check_time
from rarefy.engine.rewinding import start_afresh
from rarefy.engine.sharing import Rule, is_scored, share
from rarefy.errors import OptionError
from rarefy.methods.magnitude import prune
from rarefy.patterns import Pattern
from rarefy.schedules import Clock


@dataclass(frozen=True, kw_only=True)
class ACDC(Method):
    """AC/DC: train compressed and decompressed by turns, and end compressed.

    Peste et al. 2021, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks" (arXiv 2106.12379,
    algorithm 1). Dense until step t0. From there on, in phases of `every` steps by turns,

        compressed:    keep the weights of largest |w|, and train those under that fixed mask;
        decompressed:  train all; what was dropped begins at 0.

    From t1 on the network is compressed once more, under one last mask. The dense phase before it may be longer than the
    others: a compressed phase begins only where a whole dense one fits between it and t1 (so the paper's ImageNet run of
    100 epochs is compressed at 10-15, 20-25, ..., 70-75 and 85-100). When a dense phase begins, the optimizer's state
    begins anew with it, momentum above all (the authors' code, which resets momentum of SGD).

    So training gives a dense network too: the weights at the end of the last dense phase.

    Options:
        sparsity: fraction of zeros over the sparse layers in compressed phases, in [0, 1). Default 0.9.
        allocation: "global" (default, the paper's), "uniform", "uniform+", "er", "erk", "lamp", or sparsities by
            layer-name glob.
        pattern: "unstructured" (default), "N:M", "RxC", "channel", "column", "fan-in"; a unit's score is its sum of |w|.
        every: length of a phase. Default 0.05 (ImageNet; CIFAR-100: 0.1).
        start, stop: t0 and t1. Defaults 0.1 and 0.85 (ImageNet; CIFAR-100: 0.05 and 0.85).
            Of all three an int is a number of steps, a float in [0, 1] a fraction of total_steps.

    Raises OptionError where a fraction is given without total_steps, or a phase has no step; AllocationError and
    PatternError as `magnitude`.
    """

    name: ClassVar[str] = "ac-dc"
    family: ClassVar[Family] = "dense to sparse"
    sparsity: float = 0.9
    allocation: Rule = "global"
    pattern: str | Pattern = "unstructured"
    every: int | float = 0.05
    start: int | float = 0.1
    stop: int | float = 0.85

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        check_sparsity(self.sparsity, self.pattern)
        check_allocation(self.allocation)
        check_time("every", self.every)
        check_clock(1, self.start, self.stop)
        check_ends(self.stop)

    def clock(self, total_steps: int | None) -> Clock:
        every = Clock(start=self.every, total=total_steps).first
        if every < 1:
            raise OptionError(f"every={self.every} of {total_steps} steps is less than one step; make phases longer.")
        return Clock(every=every, start=self.start, stop=self.stop, total=total_steps)

    def choose(self, sparse: Sparsifier) -> None:
        if self.compressed(sparse, 0):
            prune(sparse, self.sparsity, self.allocation)
        elif not is_scored(self.allocation):  # can the layers take it, later?
            share(sparse.layers, self.sparsity, self.allocation)

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        now = self.compressed(sparse, step)
        if now == self.compressed(sparse, step - 1):
            return
        if now:
            prune(sparse, self.sparsity, self.allocation)
            return
        for layer in sparse.layers.values():
            layer.keep(torch.ones(layer.shape, dtype=torch.bool))
        start_afresh(sparse)

    def compressed(self, sparse: Sparsifier, step: int) -> bool:
        """Whether the network is sparse once this many steps are done."""
        clock = sparse.clock
        first, last, every = clock.first, clock.last, clock.every
        assert last is not None
        if step < first or step >= last:
            return step >= last
        phase = (step - first) // every
        return phase % 2 == 0 and first + (phase + 2) * every <= last
