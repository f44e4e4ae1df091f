"""Pruning before training by a score of the untrained weights, and the first such score: SNIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rarefy.engine import Family, Method, Sparsifier
from rarefy.engine.calibration import gradients, hold
from rarefy.engine.options import check_allocation, check_count, check_curve, check_pattern, check_sparsity
from rarefy.engine.sharing import Rule, keep_best, staged
from rarefy.patterns import Pattern
from rarefy.schedules import curve
from rarefy.scores import snip

Scorer = Callable[[], Mapping[str, Tensor]]
"""Scores every weight of the network as it is pruned now: layer name -> weight-shaped, higher = keep."""


@dataclass(frozen=True, kw_only=True)
class BeforeTraining(Method):
    """Base of SNIP, GraSP and SynFlow: score, keep the best, and that in one round or several."""

    needs_calibration: ClassVar[bool] = True
    sparsity: float = 0.9
    allocation: Rule = "global"
    pattern: str | Pattern = "unstructured"
    rounds: int = 1
    curve: str = "exponential"

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        check_sparsity(self.sparsity, self.pattern)
        check_allocation(self.allocation)
        check_count("rounds", self.rounds)
        check_curve(self.curve)

    def scorer(self, sparse: Sparsifier) -> Scorer:
        """Return what scores this network; it is asked once a round."""
        raise NotImplementedError

    def choose(self, sparse: Sparsifier) -> None:
        score, along = self.scorer(sparse), curve(self.curve)
        for done in (k / self.rounds for k in range(1, self.rounds + 1)):
            rule = staged(self.allocation, lambda final, done=done: along(done, 0.0, final))  # type: ignore[misc]
            keep_best(sparse.layers, score(), along(done, 0.0, self.sparsity), rule)


@dataclass(frozen=True, kw_only=True)
class SNIP(BeforeTraining):
    """SNIP: prune before training the connections that the loss would miss least.

    Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity" (arXiv 1810.02340, eq. 6). With a
    multiplicative mask c at 1, and gradients summed over the calibration batches before the absolute value is taken,

        s = |dL/dc| = |w dL/dw|,

    the weights of largest s over all layers together are kept; the mask never changes. The network's weights, buffers
    and gradients are as before, and so is the random state. With `rounds=n` the network is scored and pruned n times, to
    the kept fraction (1 - sparsity)^(k/n) in round k, always at its pruned weights (de Jorge et al. 2021, arXiv
    2006.09081, "Iterative SNIP"); a pruned weight does not come back.

    Needs `calibration=[batch, ...]` (the paper: one batch of 100), and `loss(model, batch)` where it is not the
    cross-entropy of `model(x)` and y.

    Options:
        sparsity: fraction of zeros over the sparse layers, in [0, 1). Default 0.9.
        allocation: "global" (default, the paper's); any other rule takes the best s within each layer's share.
        pattern: "unstructured" (default), "N:M", "RxC", "channel", "column", "fan-in", "groupG"; a unit is scored by
            its sum.
        rounds: how often to score and prune. Default 1 (the paper's).
        curve: how the sparsity rises over the rounds: "exponential" (default), "linear", "cubic", "cosine".

    Raises OptionError when there is no calibration data or a score is not a number. Warns when a layer keeps nothing.
    """

    name: ClassVar[str] = "snip"
    family: ClassVar[Family] = "before training"

    def scorer(self, sparse: Sparsifier) -> Scorer:
        if self.rounds > 1:
            hold(sparse)

        def score() -> dict[str, Tensor]:
            gradient = gradients(sparse)
            return {name: snip(layer.weight(), gradient[name]) for name, layer in sparse.layers.items()}

        return score
