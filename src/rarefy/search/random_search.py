"""Random search at initialisation, the neutral baseline that a searched sparse network must beat."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.engine import Sparsifier
from rarefy.errors import OptionError
from rarefy.metrics.statistics import PairedTest, mean, paired_t_test
from rarefy.search.held import hold
from rarefy.search.members import Workers, run_members
from rarefy.search.objectives import Objective
from rarefy.search.samplers import Masks, Sampler
from rarefy.training.seeds import derive

ARMS = ("found", "random", "dense")


@dataclass(frozen=True)
class Found:
    """What a random search saw.

    Attributes:
        best: the candidate with the best objective (ties: the earlier).
        control: the first candidate: drawn before any objective was known, so a fair random one of the same sparsity.
        worst: the one with the worst objective.
        values: every candidate's objective, in the order drawn.
        best_index, worst_index: their places in it.
        passes: forward passes of all candidates together.
        optimizer_steps: weight updates of all candidates together; 0 for objectives at initialisation.
    """

    best: Masks = field(repr=False)
    control: Masks = field(repr=False)
    worst: Masks = field(repr=False)
    values: list[float] = field(repr=False)
    best_index: int
    worst_index: int
    passes: int
    optimizer_steps: int


@dataclass(frozen=True)
class RandomSearch:
    """Draw sparse networks inside a parent at its initial weights, and keep the one that starts best.

    Rezsa Farahani 2024, "Random Search as a Baseline for Sparse Neural Network Architecture Search" (arXiv 2403.08265). The
    paper searches nodes by the initial loss; any sampler and any objective go together here.

    Args:
        sampler: `Nodes`, `Edges` (with a pattern also N:M), `LayerRatios`, or anything with their `draw`.
        objective: `InitialLoss`, `LossAfter`, `GradientNorm`, `SynFlow`.
        budget: forward passes in all: budget // objective.passes candidates are drawn.

    Raises OptionError where the budget is not enough for one candidate.

    Example:
        >>> import torch
        >>> from rarefy.search import InitialLoss, Nodes, RandomSearch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3))
        >>> batches = [(torch.randn(50, 8), torch.randint(3, (50,)))]
        >>> found = RandomSearch(Nodes(keep=0.25), InitialLoss(batches), budget=20).run(model)
        >>> len(found.values), int(found.best["0.weight"].any(dim=1).sum()), min(found.values) == found.values[found.best_index]
        (20, 10, True)
    """

    sampler: Sampler
    objective: Objective
    budget: int = 200

    @property
    def candidates(self) -> int:
        """How many candidates the budget pays for."""
        number = self.budget // self.objective.passes
        if number < 1:
            raise OptionError(
                f"budget={self.budget} forward passes: one candidate takes {self.objective.passes} of them; give more, or "
                "fewer batches."
            )
        return number

    def draw(self, model: nn.Module, seed: int = 0) -> Iterator[Masks]:
        """Yield every candidate in its order: the same for the same seed."""
        generator = torch.Generator().manual_seed(derive(seed, "candidates"))
        for _ in range(self.candidates):
            yield self.sampler.draw(model, generator)

    def run(self, model: nn.Module, seed: int = 0) -> Found:
        """Search; the model is not changed."""
        best = worst = control = None
        values: list[float] = []
        best_at = worst_at = 0
        for number, masks in enumerate(self.draw(model, seed)):
            value = self.objective(model, masks)
            if not math.isfinite(value):
                raise OptionError(f"candidate {number} has the objective {value}: are weights and search set finite?")
            values.append(value)
            control = masks if control is None else control
            gain = (value - values[best_at]) * (1 if self.objective.maximise else -1)
            loss = (values[worst_at] - value) * (1 if self.objective.maximise else -1)
            if best is None or gain > 0:
                best, best_at = masks, number
            if worst is None or loss > 0:
                worst, worst_at = masks, number
        assert best is not None and worst is not None and control is not None
        n = len(values)
        return Found(
            best,
            control,
            worst,
            values,
            best_at,
            worst_at,
            n * self.objective.passes,
            n * self.objective.optimizer_steps,
        )


Build = Callable[[int], nn.Module]
"""Builds the parent at its initial weights from a seed."""
TrainArm = Callable[[nn.Module, Sparsifier | None, int], Mapping[str, Any]]
"""Trains a network in place from the given data-order seed; returns "score" (higher = better) and "curve" (a score an epoch).

The sparsifier is None for the dense parent; otherwise make the optimizer and call `sparse.follow(optimizer)`.
"""


@dataclass(frozen=True)
class Comparison:
    """Three arms over paired seeds: the network found, the random one of the same sparsity, and the dense parent.

    Attributes:
        runs: one mapping for each seed: "seed", "objectives" (best, random, mean, worst), "sparsity", "kept", and for each
            arm "score", "curve", "reached" (epochs to `level` times the parent's final score; None: never).
        level: that fraction.
    """

    runs: list[dict[str, Any]]
    level: float

    def scores(self, arm: str) -> dict[int, float]:
        """Return an arm's final scores by seed."""
        return {run["seed"]: run["arms"][arm]["score"] for run in self.runs}

    def difference(self, first: str = "found", second: str = "random", confidence: float = 0.95) -> PairedTest | None:
        """Return the paired difference of two arms' final scores, with its interval; None for fewer than 2 seeds."""
        return paired_t_test(self.scores(first), self.scores(second), confidence)

    @property
    def helps(self) -> bool:
        """Whether the search helped: the interval of found minus random lies above 0. Nothing less is a gain."""
        test = self.difference()
        return test is not None and test.low > 0

    def epochs(self, arm: str) -> float | None:
        """Return the mean number of epochs that an arm took to reach the level; None where one never did."""
        reached = [run["arms"][arm]["reached"] for run in self.runs]
        return None if any(r is None for r in reached) else mean(reached)


def compare_arms(
    search: RandomSearch,
    build: Build,
    train: TrainArm,
    *,
    seeds: Sequence[int],
    level: float = 0.95,
    workers: Workers | None = None,
    folder: str | os.PathLike[str] | None = None,
    same: Mapping[str, Any] | None = None,
) -> Comparison:
    """Search and train the three arms for every seed, seeds side by side; see `Comparison`.

    All arms of a seed share the initial weights theta_0 and the order of the data, the control is the first candidate,
    and no arm has a setting of its own. Choose nothing by `score` if it is of a test set.

    Args:
        build, train: functions of a module (or partials), see `Build` and `TrainArm`.
        seeds: at least 5 for a conclusion.
        level: fraction of the parent's final score whose first epoch is noted.
        workers, folder, same: as in `run_members`.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        raise OptionError(f"seeds={list(seeds)} must be different ones, at least one.")
    search.candidates  # noqa: B018  (refuse a budget that is too small before anything runs)
    job = partial(_arms, search, build, train, level)
    return Comparison(run_members(job, list(seeds), list(seeds), workers, folder, same), level)


def _arms(search: RandomSearch, build: Build, train: TrainArm, level: float, seed: int) -> dict[str, Any]:
    parent = build(derive(seed, "init"))
    found = search.run(parent, seed)
    masks = {"found": found.best, "random": found.control}
    arms: dict[str, Any] = {}
    for arm in ARMS:
        model = copy.deepcopy(parent)
        sparse = hold(model, masks[arm]) if arm in masks else None
        torch.manual_seed(derive(seed, "torch"))
        arms[arm] = dict(train(model, sparse, derive(seed, "data")))
    goal = level * arms["dense"]["score"]
    for result in arms.values():
        result["reached"] = next((i for i, s in enumerate(result["curve"], 1) if s >= goal), None)
    total = sum(p.numel() for p in parent.parameters())
    kept, numel = _kept(found.best), sum(m.numel() for m in found.best.values())
    values = found.values
    seen = {
        "best": values[found.best_index],
        "random": values[0],
        "mean": mean(values),
        "worst": values[found.worst_index],
    }
    return {
        "seed": seed,
        "arms": arms,
        "objectives": seen,
        "sparsity": 1 - kept / numel,
        "kept": total - numel + kept,
        "parameters": total,
        "optimizer_steps": found.optimizer_steps,
        "passes": found.passes,
    }


def _kept(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())
