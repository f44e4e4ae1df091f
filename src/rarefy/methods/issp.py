"""Iterative soft shrinkage: the smallest weights fade instead of being cut, so that the structure keeps moving."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.engine import Family, Layer, Method, Sparsifier
from rarefy.engine.options import check_clock, check_end, check_pattern, check_positive, check_share, check_sparsity
from rarefy.errors import OptionError
from rarefy.patterns import Pattern
from rarefy.schedules import Clock

CAP = 0.995
PAPER_STEPS = 100_000


@dataclass(frozen=True, kw_only=True)
class SoftShrinkage(Method):
    """What the soft shrinkages share: two stages, and the low set of every layer."""

    sparsity: float = 0.9
    pattern: str | Pattern = "unstructured"
    stop: int | float | None = None

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        check_sparsity(self.sparsity, self.pattern)
        check_clock(1, 0, self.stop)

    def clock(self, total_steps: int | None) -> Clock:
        stop = self.stop if self.stop is not None else PAPER_STEPS if total_steps is None else 1 / 3
        clock = Clock(every=1, stop=stop, total=total_steps)
        check_end(self.name, clock)
        return clock

    def kept_units(self, layer: Layer) -> Tensor:
        """Return N - min(ceil(r N), floor(0.995 N)) for each group of N units, or what the pattern prescribes; int64."""
        units = layer.units_per_group
        if layer.pattern.fixed_sparsity is not None:
            keep = layer.pattern.keep(layer.shape)
        else:
            keep = units - min(math.ceil(self.sparsity * units - 1e-9), int(CAP * units))
        return torch.full((layer.groups,), keep, dtype=torch.int64)

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        if not sparse.clock.due(step):
            return
        for layer in sparse.layers.values():
            high = layer.largest_magnitudes(self.kept_units(layer))
            if step == sparse.clock.last:
                layer.rewire(high)
            else:
                self.shrink(sparse, layer, ~layer.spread(high))

    def shrink(self, sparse: Sparsifier, layer: Layer, low: Tensor) -> None:
        """Move the weights of the low set (bool, weight-shaped) towards zero."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ISSP(SoftShrinkage):
    """ISS-P: after every step multiply the smallest weights of each layer by a number just below 1; freeze the mask late.

    Wang et al. 2023, "Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution" (ICCV, arXiv 2303.09650);
    published for super-resolution from random initialisation, and nothing in it is bound to that. With N weights in a layer,

        P = the ceil(r N) of smallest |w|, at most 99.5 % of the layer,    after each optimizer step, anew,
        w <- beta w on P,   the others untouched,

    until step `stop`, where P is set to zero and the mask frozen; the rest of the run trains what is left, with the
    optimizer's state as it is. Gradients and state are dense until then and no weight is zero: the sparsity is real from
    `stop` on. Keep the learning rate constant before it. beta = 0 is iterative hard thresholding (weights may come back
    at the next step), beta = 1 dense training.

    The shrinkage is per step: 0.95 leaves 0.6 % of a weight after 100 steps in P, against which stands what the optimizer
    moves it back, about lr / (1 - beta) with Adam. In runs far shorter than the paper's take beta nearer 1.

    The authors' code ends the first stage by the clock of another method (about 100,000 steps), takes the last low set it
    happens to have, estimates large layers' thresholds from 32,400 weights, and for N:M changes N and M silently until
    they divide; here the end is a step, P is exact, and an N:M that does not fit is refused.

    Options:
        sparsity: r, in [0, 1), the same in every layer. Default 0.9 (paper: 0.9, 0.95, 0.99).
        pattern: "unstructured" (default), "N:M" (the paper's too), "RxC", "row", "column", "fan-in"; a unit's score is its
            sum of |w|.
        beta: in [0, 1]. Default 0.95 (authors' runs).
        stop: when to freeze; an int is a step, a float in [0, 1] a fraction of total_steps. Default a third of total_steps
            (the paper: 100,000 of 300,000), or step 100,000 where total_steps is not known.

    Raises OptionError where a fraction is given without total_steps or the end comes before the first step, PatternError where
    a layer does not fit the pattern.
    """

    name: ClassVar[str] = "issp"
    family: ClassVar[Family] = "dense to sparse"
    beta: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("beta", self.beta)

    def shrink(self, sparse: Sparsifier, layer: Layer, low: Tensor) -> None:
        weight = layer.weight()
        layer.set_weight(torch.where(low, self.beta * weight, weight))


@dataclass(frozen=True, kw_only=True)
class ISSR(SoftShrinkage):
    """ISS-R: as `issp`, but take a constant from the smallest weights' magnitudes after every step.

    Wang et al. 2023 (arXiv 2303.09650), the regularisation flavour: soft thresholding on the low set P,

        w <- sign(w) max(|w| - delta, 0) on P.

    Options:
        sparsity, pattern, stop: as of `issp`, with its defaults.
        delta: what is taken in one step, above 0. Default 1e-5 (own choice; with Adam about a tenth of the learning rate or
            less, so that a weight that the loss wants can leave P).

    Raises as `issp` does.
    """

    name: ClassVar[str] = "iss-r"
    family: ClassVar[Family] = "dense to sparse"
    delta: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("delta", self.delta)

    def shrink(self, sparse: Sparsifier, layer: Layer, low: Tensor) -> None:
        weight = layer.weight()
        layer.set_weight(torch.where(low, weight - weight.clamp(-self.delta, self.delta), weight))


@dataclass(frozen=True, kw_only=True)
class GReg(SoftShrinkage):
    """Growing regularisation: an L2 penalty on the smallest weights that grows until they are as good as gone.

    Wang et al. 2021, "Neural Pruning via Growing Regularization" (arXiv 2012.09243), in the flavour that Wang et al. 2023
    (arXiv 2303.09650) compare with: every `every` steps the low set P (see `issp`) is chosen anew, and the strength s_i of
    each weight in it grows,

        s_i <- min(s_i + growth, ceiling) on P,    loss + 1/2 sum_i s_i w_i^2,

    until step `stop`, where P is set to zero and the penalty ends. Its gradient s w joins the loss's before each step of the
    optimizer, so Adam rescales it; `sparse.penalty()` is its value.

    Options:
        sparsity, pattern, stop: as of `issp`, with its defaults.
        growth: default 1e-4 (both papers).
        ceiling: default 0.5 (authors' code: a layer is finished there, after 100,000 steps).
        every: steps between two growths. Default 20 (authors' code).

    Raises as `issp` does.
    """

    name: ClassVar[str] = "greg"
    family: ClassVar[Family] = "dense to sparse"
    growth: float = 1e-4
    ceiling: float = 0.5
    every: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clock(self.every, 0, None)
        check_positive("growth", self.growth)
        check_positive("ceiling", self.ceiling)
        if self.growth > self.ceiling:
            raise OptionError(f"growth={self.growth!r} must not be above ceiling={self.ceiling!r}.")

    def clock(self, total_steps: int | None) -> Clock:
        whole = super().clock(total_steps)
        return Clock(every=self.every, stop=whole.stop, total=total_steps)

    def choose(self, sparse: Sparsifier) -> None:
        sparse.memory["strength"] = {
            name: torch.zeros_like(layer.weight(), dtype=torch.float32) for name, layer in sparse.layers.items()
        }

    def penalty(self, sparse: Sparsifier) -> Tensor | None:
        if sparse.clock.last is not None and sparse.step_count >= sparse.clock.last:
            return None
        terms = []
        for name, layer in sparse.layers.items():
            weight = layer.live_weight()
            terms.append((sparse.memory["strength"][name].to(weight) * weight.square()).sum() / 2)
        return torch.stack(terms).sum()

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        super().after_step(sparse, step)
        if step == sparse.clock.last:
            del sparse.memory["strength"]

    def shrink(self, sparse: Sparsifier, layer: Layer, low: Tensor) -> None:
        before = sparse.memory["strength"][layer.name].to(low.device)
        grown = (before + self.growth).clamp(max=self.ceiling)
        now = torch.where(low, grown, before)
        sparse.memory["strength"] = {**sparse.memory["strength"], layer.name: now}
