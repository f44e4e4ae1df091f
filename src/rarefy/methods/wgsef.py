"""k-level structured sparsity: train under the weighted group sparse envelope by proximal steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rarefy.engine import Family, Layer, Method, Sparsifier
from rarefy.engine.options import (
    check_allocation,
    check_clock,
    check_end,
    check_flag,
    check_pattern,
    check_positive,
    check_sparsity,
)
from rarefy.engine.sharing import Rule, share
from rarefy.errors import OptionError
from rarefy.patterns import Pattern, Slice, parse_pattern
from rarefy.penalties import GroupEnvelope
from rarefy.schedules import Clock


@dataclass(frozen=True, kw_only=True)
class WGSEF(Method):
    """WGSEF: train under the convex envelope of "at most k groups", so that whole filters become exactly zero.

    Refael, Arbel & Huleihel 2022, "Learning k-Level (Structured) Sparse Neural Networks Using (a New Generalized Weighted)
    Group (Sparse) Envelope Regularization" (arXiv 2212.12921). The units of the pattern are the groups w_j. For layer l, of
    which k_l groups are to stay, minimises loss + lambda_l GS_k(w),

        GS_k(w) = 1/2 min { sum_j d ||w_j||^2 / u_j : 0 <= u_j <= 1, sum_j u_j <= k },

    the largest convex function below "half the weighted squared norm, where at most k groups are not zero". After each
    step of the optimizer, of step size t, comes its exact proximal operator, in time linear in the number of groups:

        u_j = clip(mu a_j - c_j, 0, 1), sum u = k,   c_j = t lambda d,  a_j = sqrt(lambda d) ||w_j||,
        w_j <- u_j / (u_j + c_j) w_j.

    How many groups remain is decided by lambda, not by k alone (a small lambda leaves far more): every `every` steps
    lambda_l is multiplied by `growth` in each layer where more than k_l groups are not zero. At `stop` the k_l groups of
    largest ||w_j|| are kept and the others set to zero, the penalty ends (it also shrinks what it keeps: use no weight decay
    beside it), and the rest of the run trains what is left. `sparse.memory["groups"]` tells how many groups there were in
    each layer before that projection. Without it (total_steps unknown and no `stop`) the zeros are those of the proximal
    steps, which never wane, and a group may come back; `finalize()` leaves them exactly zero.

    t is what the optimizer goes along a constant gradient: lr / (1 - momentum) for SGD. For Adam and its kin, whose steps
    differ between the weights of a group, a group's t is their harmonic mean: the closed form in the metric of the group's
    mean preconditioner. The projection and the growth of lambda are not the paper's, which gives neither a schedule nor
    values of lambda; they make sure of k. Its half-space step is left out.

    With pattern "row" the bias of a filter or unit is in its group, and zero with it: otherwise a unit whose weights are
    gone would go on as a constant, and the gradient through it would bring them back at every step. The scale and shift of
    a batch normalisation behind it are not (where there is one, ||w_j|| is not what a filter counts for). Exclude the last
    layer when the pattern is "row": its rows are the classes.

    Options:
        sparsity: fraction of groups that are to be zero, in [0, 1). Default 0.9.
        allocation: "uniform" (default), "uniform+", "er", "erk", or sparsities by layer-name glob; "global" and "lamp" rank
            by |w| at the start.
        pattern: "row" (default: filters, output units), "column" (input channels), "RxC", "unstructured" (every weight a
            group: half the squared k-support norm), "N:M" and "fan-in" (an envelope for each of their groups).
        strength: lambda at the start, above 0. Default 0.01 (own choice). It is a weight decay of lambda on what stays: 0.1 is
            right for one layer of 784-200-10 on MNIST, but where several layers in a row have it (64-300-100-10 on digits,
            two of them), it brings them all to zero before growth is asked for.
        growth: factor on lambda, at least 1. Default 1.5 (own choice).
        size_cost: d = the number of weights in a group instead of 1, so that one lambda weighs alike in layers whose
            filters differ in size. Default False.
        every: steps between two looks at the number of groups. Default 100.
        stop: when to project; an int is a step, a float in [0, 1] a fraction of total_steps. Default three quarters of
            total_steps; never where that is not known.

    Raises AllocationError where a layer would keep no group, PatternError where a layer does not fit the pattern, and
    OptionError where the projection would come before the first step.
    """

    name: ClassVar[str] = "wgsef"
    family: ClassVar[Family] = "dense to sparse"
    sparsity: float = 0.9
    allocation: Rule = "uniform"
    pattern: str | Pattern = "row"
    strength: float = 0.01
    growth: float = 1.5
    size_cost: bool = False
    every: int = 100
    stop: int | float | None = None

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        check_sparsity(self.sparsity, self.pattern)
        check_allocation(self.allocation)
        check_clock(self.every, 0, self.stop)
        check_positive("strength", self.strength)
        check_positive("growth", self.growth)
        if self.growth < 1:
            raise OptionError(f"growth={self.growth!r} must be at least 1: lambda is not to fall.")
        check_flag("size_cost", self.size_cost)

    def clock(self, total_steps: int | None) -> Clock:
        stop = self.stop if self.stop is not None or total_steps is None else 0.75
        clock = Clock(every=self.every, stop=stop, total=total_steps)
        check_end(self.name, clock)
        return clock

    def owns_bias(self) -> bool:
        return parse_pattern(self.pattern) == Slice(0)

    def choose(self, sparse: Sparsifier) -> None:
        sparse.memory["keep"] = share(sparse.layers, self.sparsity, self.allocation, sparse.magnitudes)
        sparse.memory["strength"] = dict.fromkeys(sparse.layers, self.strength)

    def proximal(self, sparse: Sparsifier, layer: Layer) -> GroupEnvelope | None:
        if sparse.clock.last is not None and sparse.step_count >= sparse.clock.last:
            return None
        cost = layer.pattern.unit_size(layer.shape) if self.size_cost else 1
        keep, strength = (sparse.memory[part][layer.name] for part in ("keep", "strength"))
        return GroupEnvelope(layer.pattern, keep, strength, cost)

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        if not sparse.clock.due(step):
            return
        groups = {name: groups_left(layer) for name, layer in sparse.layers.items()}
        keep = sparse.memory["keep"]
        if step == sparse.clock.last:
            sparse.memory["groups"] = {name: int(count.sum()) for name, count in groups.items()}
            for name, layer in sparse.layers.items():
                layer.rewire(layer.best(group_squares(layer), keep[name]))
            return
        sparse.memory["strength"] = {
            name: strength * (self.growth if bool((groups[name].cpu() > keep[name]).any()) else 1)
            for name, strength in sparse.memory["strength"].items()
        }


def groups_left(layer: Layer) -> Tensor:
    """Return how many units are not zero in each group of the pattern; int64 [groups]."""
    return (layer.pattern.pool(layer.grouped() != 0) > 0).sum(dim=1)


def group_squares(layer: Layer) -> Tensor:
    """Return every group's squared norm at each of its weights; weight-shaped."""
    return layer.pattern.expand(layer.pattern.pool(layer.grouped().square()), layer.shape)
