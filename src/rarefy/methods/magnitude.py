"""Magnitude pruning: at once, or gradually while training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.engine import Family, Method, Sparsifier
from rarefy.engine.options import (
    check_allocation,
    check_clock,
    check_curve,
    check_ends,
    check_fraction,
    check_pattern,
    check_sparsity,
)
from rarefy.engine.sharing import Rule, is_scored, share, staged, without_growth
from rarefy.errors import OptionError
from rarefy.patterns import Pattern
from rarefy.schedules import Clock, curve


@dataclass(frozen=True, kw_only=True)
class Magnitude(Method):
    """One-shot magnitude pruning: zero the smallest weights at once, then fine-tune the rest.

    Han et al. 2015 (arXiv 1506.02626), one round. At step `start` keeps the weights of largest |w|, exactly as many as
    the allocation gives each layer; the mask is frozen from then on.

    Options:
        sparsity: fraction of zeros over the sparse layers, in [0, 1). Default 0.9.
        allocation: "global" (default: one ranking over all layers), "lamp", "uniform", "uniform+", "er", "erk", or
            sparsities by layer-name glob.
        pattern: "unstructured" (default), "N:M", "N:Mt" (along rows and columns at once), "RxC", "channel", "column",
            "fan-in", "groupG"; a unit is scored by its sum of |w|.
        start: when to prune. 0 (default): at once, for a trained network. An int is a step, a float in [0, 1] a
            fraction of total_steps, for a network that is still to be trained.

    Raises AllocationError where a layer would keep nothing (not with "global" and "lamp", which warn), PatternError where
    a layer does not fit the pattern, OptionError for a fraction without total_steps.
    """

    name: ClassVar[str] = "magnitude"
    family: ClassVar[Family] = "after training"
    sparsity: float = 0.9
    allocation: Rule = "global"
    pattern: str | Pattern = "unstructured"
    start: int | float = 0

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        check_sparsity(self.sparsity, self.pattern)
        check_allocation(self.allocation)
        check_clock(1, self.start, None)

    def clock(self, total_steps: int | None) -> Clock:
        return Clock(every=1, start=self.start, stop=self.start, total=total_steps)

    def choose(self, sparse: Sparsifier) -> None:
        if sparse.clock.first == 0:
            prune(sparse, self.sparsity, self.allocation)
        elif not is_scored(self.allocation):  # can the layers take it, later?
            _plan(sparse, self.sparsity, self.allocation)

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        if sparse.clock.due(step):
            prune(sparse, self.sparsity, self.allocation)


@dataclass(frozen=True, kw_only=True)
class Gradual(Method):
    """Gradual magnitude pruning: raise the sparsity along a curve while the network trains.

    Zhu & Gupta 2017, "To prune, or not to prune" (arXiv 1710.01878, eq. 1). At step t = t0, t0 + every, ..., t1

        s_t = s_f + (s_i - s_f) (1 - (t - t0) / (t1 - t0))^3,

    and each layer keeps its weights of largest |w|. The last update is made at t1 even where `every` does not divide, and
    the masks are frozen from then on. A pruned weight is exactly zero at once and does not come back (in the original it
    keeps a stored value, and may); so masks only shrink.

    Options:
        sparsity: s_f, the final fraction of zeros, in [0, 1). Default 0.9.
        initial: s_i. Default 0.
        allocation: "uniform" (default, the paper's), "uniform+", "er", "erk", "global", "lamp", or sparsities by glob.
        pattern: "unstructured" (default), "N:M" (m:m, m-1:m, ... n:m), "N:Mt" (the same along rows and columns at once),
            "RxC", "channel", "column", "fan-in", "groupG".
        curve: "cubic" (default), "linear", "cosine", "exponential", "one-shot".
        every: steps between updates. Default 100 (the paper: 100 to 1000).
        start, stop: t0 and t1; an int is a step, a float in [0, 1] a fraction of total_steps. Defaults 0.1 and 0.7:
            the network has begun to learn, and the learning rate is still high enough to recover.

    Raises OptionError where a fraction is given without total_steps, AllocationError and PatternError as `magnitude`.
    """

    name: ClassVar[str] = "gradual"
    family: ClassVar[Family] = "dense to sparse"
    sparsity: float = 0.9
    initial: float = 0.0
    allocation: Rule = "uniform"
    pattern: str | Pattern = "unstructured"
    curve: str = "cubic"
    every: int = 100
    start: int | float = 0.1
    stop: int | float = 0.7

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        check_sparsity(self.sparsity, self.pattern)
        check_fraction("initial", self.initial)
        if self.initial > self.sparsity:
            raise OptionError(f"initial={self.initial} must not be above sparsity={self.sparsity}.")
        check_allocation(self.allocation)
        check_curve(self.curve)
        check_clock(self.every, self.start, self.stop)
        check_ends(self.stop)

    def clock(self, total_steps: int | None) -> Clock:
        return Clock(every=self.every, start=self.start, stop=self.stop, total=total_steps)

    def choose(self, sparse: Sparsifier) -> None:
        if sparse.clock.first == 0:
            self._prune(sparse, sparse.clock.progress(0))
        if not is_scored(self.allocation):  # can the layers take it at the end?
            _plan(sparse, self.sparsity, self.allocation)

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        if sparse.clock.due(step):
            self._prune(sparse, sparse.clock.progress(step))

    def _prune(self, sparse: Sparsifier, progress: float) -> None:
        along = curve(self.curve)
        rule = staged(self.allocation, lambda final: along(progress, min(self.initial, final), final))
        prune(sparse, along(progress, self.initial, self.sparsity), rule)


def prune(sparse: Sparsifier, sparsity: float, rule: Rule) -> None:
    """Keep in each layer the units of largest |w|, as many as the rule gives it; a dropped weight does not come back."""
    for name, counts in without_growth(sparse.layers, _plan(sparse, sparsity, rule)).items():
        layer = sparse.layers[name]
        if not torch.equal(counts, layer.counts().cpu()):
            layer.rewire(layer.largest_magnitudes(counts))


def _plan(sparse: Sparsifier, sparsity: float, rule: Rule) -> dict[str, torch.Tensor]:
    return share(sparse.layers, sparsity, rule, sparse.magnitudes)
