"""l1 regularisation whose strengths are chosen so that a prescribed number of weights is left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from dataclasses import astuple, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.engine import Family, Layer, Method, Sparsifier
from rarefy.engine.calibration import mean_gradients
from rarefy.engine.options import check_allocation, check_clock, check_count, check_fraction, check_positive
from rarefy.engine.rewinding import rewind, snapshot, start_afresh
from rarefy.engine.sharing import Rule, is_scored, share
from rarefy.errors import OptionError
from rarefy.penalties import L1, Search, separable_strength
from rarefy.schedules import Clock

ALL = "all layers"


@dataclass(frozen=True, kw_only=True)
class L1Prescribed(Method):
    """l1 with a prescribed number of non-zeros: solve, look at the sorted gradients, choose the strengths, solve again.

    Shen, Wang, Xu & Yan 2024, "Sparse Deep Learning Models with the l1 Regularization" (arXiv 2408.02801), with the update
    of Liu, Wang & Xu 2025 (arXiv 2502.00655). Minimises L(w) + sum_j lambda_j ||w_j||_1, one lambda_j for each layer or one
    for all; biases and norms are not penalised. With g = dL/dw, at every local minimum

        |g_i| = lambda_j where w_i is not zero,   |g_i| <= lambda_j where it is,

    so the sorted |g| say which lambda_j leaves l_j weights. One solve is `every` steps of the run: each step of the
    optimizer is followed by soft thresholding with step size times lambda_j, which makes the zeros exact. At its end g is
    taken over all of `calibration` in evaluation mode; where a layer has other than l_j non-zeros (by more than the
    tolerance), lambda_j becomes (`rarefy.penalties.Search`)

        the l_j-th largest |g|            where there are too few,
        2 lambda_j                        where there are too many,
        the middle of its bracket         where that leaves the bracket,

    and the next solve starts again from the first weights, with fresh optimizer state: dead units have no gradient to come
    back by. Once all layers fit, or after the last solve (then with the best of them), exactly l_j weights are kept: of
    those that are not zero the largest, and if there are too few, the zeros of largest |g|, which a smaller lambda_j would
    let in first. The penalty ends, and the rest of the run trains what is kept.

    The convergence of a solve is the user's: constant learning rates, or a schedule that begins again with each solve
    (`lr_step` says where it is; `rarefy train` asks), and no weight decay, which would change the condition. The guard of
    the search is this library's: the published rule alone, made for convex problems, cycles for ever in deep networks. Step
    sizes: of SGD lr / (1 - momentum), of Adam and its kin one for every weight; either way the condition above holds where
    training settles.

    `sparse.memory["solves"]` lists the non-zeros after each solve, `sparse.memory["strength"]` the lambdas in use, and
    `sparse.memory["residual"]` how far each layer is from the condition, in units of lambda.

    Needs `calibration`: the whole training set in batches of one size, as a list or a DataLoader (a rough gradient from a
    part of it gives rough lambdas), also when a saved search goes on; and `loss(model, batch)` where that is not the mean
    cross-entropy. Keeps two copies of the network while it searches.

    Options:
        sparsity: fraction of zeros, in [0, 1). Default 0.9.
        allocation: how the layers share it: "uniform" (default), "uniform+", "er", "erk", or sparsities by layer-name glob.
        parameters: "per-layer" (default): l_j weights in each layer; "one": one lambda, and the sum of the l_j over all.
        strength: lambda of the first solve; None (default): where the gradients of the first weights would put it. Start
            with moderate ones: large ones kill whole units.
        every: steps of a solve. Default 1000.
        solves: at most so many, and one less than total_steps have room for: the steps of that one train what is kept.
            Default 12.
        tolerance: how far from l_j is near enough, as a share of it (2 weights at least). Default 0.02.

    Raises OptionError without calibration data, for total_steps shorter than a solve, and where no gradient reaches a
    layer; AllocationError where a layer would keep nothing.
    """

    name: ClassVar[str] = "l1-prescribed"
    family: ClassVar[Family] = "dense to sparse"
    needs_calibration: ClassVar[bool] = True
    keeps_calibration: ClassVar[bool] = True
    sparsity: float = 0.9
    allocation: Rule = "uniform"
    parameters: str = "per-layer"
    strength: float | None = None
    every: int = 1000
    solves: int = 12
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity)
        check_allocation(self.allocation)
        if is_scored(self.allocation):
            raise OptionError(f"allocation={self.allocation!r} is not a number for each layer; parameters='one' is.")
        if self.parameters not in ("per-layer", "one"):
            raise OptionError(f"parameters={self.parameters!r} must be 'per-layer' or 'one'.")
        if self.strength is not None:
            check_positive("strength", self.strength)
        check_clock(self.every, 0, None)
        check_count("solves", self.solves)
        check_fraction("tolerance", self.tolerance)

    def clock(self, total_steps: int | None) -> Clock:
        solves = self.solves
        if total_steps is not None:
            if total_steps < self.every:
                raise OptionError(
                    f"total_steps={total_steps} is less than one solve of {self.every} steps: lower `every`."
                )
            solves = min(solves, max(1, total_steps // self.every - 1))
        return Clock(every=self.every, stop=solves * self.every, total=total_steps)

    def lr_step(self, step: int, total_steps: int) -> tuple[int, int]:
        last = self.clock(total_steps).last or 0
        return (step % self.every, self.every) if step < last else (step - last, total_steps - last)

    def check(self, sparse: Sparsifier) -> None:
        if sparse.calibration is not None and not isinstance(sparse.calibration, Sized):
            raise OptionError(
                f"{self.name} passes over the calibration data after every solve: give a list of batches or a DataLoader, "
                f"not a {type(sparse.calibration).__name__}."
            )

    def choose(self, sparse: Sparsifier) -> None:
        targets = share(sparse.layers, self.sparsity, self.allocation)
        sparse.memory["target"] = {name: int(count) for name, count in targets.items()}
        first = dict.fromkeys(self.groups(sparse), self.strength)
        if self.strength is None:
            gradients = mean_gradients(sparse)
            for group, names in self.groups(sparse).items():
                first[group] = separable_strength(_joined(gradients, names), self.target(sparse, group))
                if not first[group]:
                    raise OptionError(
                        f"{group}: most of its weights get no gradient from the calibration data; set strength."
                    )
        sparse.memory["search"] = {group: list(astuple(Search(float(s or 0)))) for group, s in first.items()}
        sparse.memory["solves"] = []

    def initialise(self, sparse: Sparsifier) -> None:
        sparse.memory["first"] = snapshot(sparse)
        self._tell(sparse)

    def groups(self, sparse: Sparsifier) -> dict[str, list[str]]:
        """Return the layers that share one lambda, by the group's name."""
        return {ALL: list(sparse.layers)} if self.parameters == "one" else {name: [name] for name in sparse.layers}

    def target(self, sparse: Sparsifier, group: str) -> int:
        """Return how many non-zeros a group is to have."""
        return sum(sparse.memory["target"][name] for name in self.groups(sparse)[group])

    def proximal(self, sparse: Sparsifier, layer: Layer) -> L1 | None:
        if "search" not in sparse.memory:
            return None
        if sparse.calibration is None:
            raise OptionError(
                f"{self.name} has not finished its search: pass calibration=[batch, ...] when it goes on."
            )
        return L1(sparse.memory["strength"][layer.name])

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        if "search" not in sparse.memory or not sparse.clock.due(step):
            return
        gradients = mean_gradients(sparse)
        found = {name: int(layer.weight().count_nonzero()) for name, layer in sparse.layers.items()}
        have = {group: sum(found[name] for name in names) for group, names in self.groups(sparse).items()}
        off = {group: abs(count - self.target(sparse, group)) for group, count in have.items()}
        sparse.memory["solves"] = [*sparse.memory["solves"], found]
        sparse.memory["residual"] = {
            name: L1(sparse.memory["strength"][name]).residual(layer.weight(), gradients[name])
            for name, layer in sparse.layers.items()
        }
        if all(n <= max(2, self.tolerance * self.target(sparse, group)) for group, n in off.items()):
            return self._finish(sparse, gradients)
        if sum(off.values()) < sparse.memory.get("off", math.inf):
            sparse.memory |= {"off": sum(off.values()), "best": snapshot(sparse)}
        if step == sparse.clock.last:
            rewind(sparse, sparse.memory["best"])
            start_afresh(sparse)
            return self._finish(sparse, mean_gradients(sparse))
        for group, names in self.groups(sparse).items():
            search = Search(*sparse.memory["search"][group])
            if off[group] > max(2, self.tolerance * self.target(sparse, group)):
                search = search.next(_joined(gradients, names), have[group], self.target(sparse, group))
            sparse.memory["search"] = {**sparse.memory["search"], group: list(astuple(search))}
        self._tell(sparse)
        rewind(sparse, sparse.memory["first"])
        start_afresh(sparse)

    def _tell(self, sparse: Sparsifier) -> None:
        sparse.memory["strength"] = {
            name: sparse.memory["search"][group][0] for group, names in self.groups(sparse).items() for name in names
        }

    def _finish(self, sparse: Sparsifier, gradients: Mapping[str, Tensor]) -> None:
        """Keep exactly the prescribed number: non-zeros by magnitude, then zeros by gradient."""
        above = 2 * max(float(g.abs().max()) for g in gradients.values())
        scores = {}
        for name, layer in sparse.layers.items():
            weight = layer.weight().double()
            scores[name] = torch.where(weight != 0, above + weight.abs(), gradients[name].double().abs())
        counts = {name: torch.tensor([count]) for name, count in sparse.memory["target"].items()}
        if self.parameters == "one":
            total = sum(layer.numel for layer in sparse.layers.values())
            sparsity = 1 - self.target(sparse, ALL) / total
            counts = share(sparse.layers, sparsity, "global", lambda: scores)
        for name, layer in sparse.layers.items():
            layer.rewire(layer.best(scores[name], counts[name]))
        for part in ("search", "first", "best", "off"):
            sparse.memory.pop(part, None)


def _joined(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in names])
