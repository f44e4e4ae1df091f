"""Movement pruning, by a prescribed sparsity or by a threshold on the scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rarefy.engine import Family, Method, Sparsifier
from rarefy.engine.options import (
    check_allocation,
    check_clock,
    check_ends,
    check_fraction,
    check_pattern,
    check_positive,
    check_sparsity,
)
from rarefy.engine.sharing import Rule, is_scored, share, staged
from rarefy.errors import OptionError
from rarefy.nn import Reparametrisation, ScoreMask
from rarefy.patterns import Pattern
from rarefy.schedules import Clock, curve

_CUBIC = curve("cubic")


@dataclass(frozen=True, kw_only=True)
class Movement(Method):
    """Movement pruning: keep the weights that training moves away from zero, whatever their size.

    Sanh, Wolf & Rush 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (arXiv 2005.07683, sec. 4). Beside every
    weight W a score S is trained, 0 at first. The network computes with

        W' = W M,   M = 1 for the v largest S of a layer, else 0,

    and with G = dL/dW', the mask passing its gradient straight through to the scores,

        dL/dW = G M,   dL/dS = G W   (kept or not).

    So S adds up -W G over the steps: it grows where a step moves the weight away from zero and falls where it shrinks.
    M is made anew after every step, and what was dropped keeps its value and may come back with it. v follows

        s_t = s (1 - (1 - (t - t0) / (t1 - t0))^3),

    0 before t0 and s from t1 on (Zhu & Gupta 2017, arXiv 1710.01878, eq. 1).

    For a network that is trained already (the paper: BERT). The scores join the optimizer in the group of their weight, so
    its learning rate, schedule and weight decay hold for them; a larger rate, as in the paper (1e-2 beside 3e-5), would give
    the same ranking, for scores start at 0. To train them otherwise, move `layer.extras["scores"]` to another group.

    Options:
        sparsity: s, the final fraction of zeros over the sparse layers, in [0, 1). Default 0.9.
        allocation: "uniform" (default: v in every layer, as the authors' code), "global" (one ranking of S over all
            layers), "uniform+", "er", "erk", or sparsities by layer-name glob.
        pattern: "unstructured" (default), "N:M", "RxC", "channel", "column", "fan-in"; a unit's score is its sum.
        start, stop: t0 and t1; an int is a step, a float in [0, 1] a fraction of total_steps. Defaults 0.1 and 0.7.

    Raises OptionError where no optimizer is given, for allocation "lamp", and for a fraction without total_steps;
    AllocationError and PatternError as `magnitude`.
    """

    name: ClassVar[str] = "movement"
    family: ClassVar[Family] = "dense to sparse"
    sparsity: float = 0.9
    allocation: Rule = "uniform"
    pattern: str | Pattern = "unstructured"
    start: int | float = 0.1
    stop: int | float = 0.7

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        check_sparsity(self.sparsity, self.pattern)
        check_allocation(self.allocation)
        if self.allocation == "lamp":
            raise OptionError('allocation="lamp" ranks squares of weights; movement scores have a sign: take "global".')
        check_clock(1, self.start, self.stop)
        check_ends(self.stop)

    def clock(self, total_steps: int | None) -> Clock:
        return Clock(every=1, start=self.start, stop=self.stop, total=total_steps)

    def reparametrise(self, weight: nn.Parameter) -> Reparametrisation:
        return ScoreMask(weight)

    def choose(self, sparse: Sparsifier) -> None:
        if not is_scored(self.allocation):  # can the layers take it, later?
            share(sparse.layers, self.sparsity, self.allocation)

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        progress = sparse.clock.progress(step)
        if progress == 0:
            return
        scores = {name: layer.extras["scores"].detach() for name, layer in sparse.layers.items()}
        now = _CUBIC(progress, 0.0, self.sparsity)
        rule = staged(self.allocation, lambda s: _CUBIC(progress, 0.0, s))
        for name, counts in share(sparse.layers, now, rule, lambda: scores, regrow=True).items():
            layer = sparse.layers[name]
            layer.rewire(layer.best(scores[name], counts))


@dataclass(frozen=True, kw_only=True)
class SoftMovement(Method):
    """Soft movement pruning: as `movement`, but a penalty pushes scores under a threshold, so layers find their own sparsity.

    Sanh, Wolf & Rush 2020 (arXiv 2005.07683, sec. 4; details as in the authors' code). With scores S trained as in
    `movement` (0 at first, gradient G W),

        M = 1 where sigmoid(S) > tau_t, else 0,
        L + lambda_t mean over layers of mean(sigmoid(S)),

    and tau_t = tau (1 - (1 - p)^3), lambda_t = lambda tau_t / tau at progress p from `start` to `stop`. In a layer that
    would keep fewer than 0.5 % of its weights, those of largest S are kept. The penalty's gradient is added when the
    optimizer steps; the loss of the training loop stays as it is.

    The sparsity is an outcome: `sparse.sparsity` tells it. How fast scores cross the threshold depends on their learning
    rate (the paper: Adam with 1e-2, over 300 times that of the weights): where the weights' own is too small, move
    `layer.extras["scores"]` to a group of their own, before a scheduler is made.

    Options:
        threshold: tau, in (0, 0.5): above that nothing would be kept at first. Default 0.1 (authors' code).
        penalty_weight: lambda, not negative. Default 400 (authors' code, BERT on SQuAD).
        start, stop: an int is a step, a float in [0, 1] a fraction of total_steps. Defaults 0.1 and 0.7.

    Raises OptionError where no optimizer is given, and for a fraction without total_steps.
    """

    name: ClassVar[str] = "soft-movement"
    family: ClassVar[Family] = "dense to sparse"
    threshold: float = 0.1
    penalty_weight: float = 400.0
    start: int | float = 0.1
    stop: int | float = 0.7

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold, zero=False)
        if self.threshold >= 0.5:
            raise OptionError(f"threshold={self.threshold} must be below 0.5, the sigmoid of a score at its start.")
        check_positive("penalty_weight", self.penalty_weight, zero=True)
        check_clock(1, self.start, self.stop)
        check_ends(self.stop)

    def clock(self, total_steps: int | None) -> Clock:
        return Clock(every=1, start=self.start, stop=self.stop, total=total_steps)

    def reparametrise(self, weight: nn.Parameter) -> Reparametrisation:
        return ScoreMask(weight)

    def _stage(self, sparse: Sparsifier, step: int) -> float:
        return _CUBIC(sparse.clock.progress(step), 0.0, self.threshold)

    def penalty(self, sparse: Sparsifier) -> Tensor:
        scores = [layer.extras["scores"] for layer in sparse.layers.values()]
        weight = self.penalty_weight * self._stage(sparse, sparse.step_count) / self.threshold
        return weight * torch.stack([s.sigmoid().mean() for s in scores]).mean()

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        stage = self._stage(sparse, step)
        if stage == 0:
            return
        for layer in sparse.layers.values():
            scores = layer.extras["scores"].detach()
            mask = scores > math.log(stage / (1 - stage))
            least = int(0.005 * layer.numel) + 1
            if int(mask.sum()) >= least:
                layer.keep(mask)
            else:
                layer.rewire(layer.best(scores, torch.tensor([least])))
