"""Pruning before training by what the loss says: SNIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rarefy.engine import Family, Method, Sparsifier
from rarefy.engine.calibration import gradients
from rarefy.engine.options import check_allocation, check_pattern, check_sparsity
from rarefy.engine.sharing import Rule, share
from rarefy.patterns import Pattern
from rarefy.scores import snip


@dataclass(frozen=True, kw_only=True)
class SNIP(Method):
    """SNIP: prune before training the connections that the loss would miss least.

    Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity" (arXiv 1810.02340, eq. 6). With a
    multiplicative mask c at 1, and gradients summed over the calibration batches before the absolute value is taken,

        s = |dL/dc| = |w dL/dw|,

    the weights of largest s over all layers together are kept; the mask never changes. The network's weights, buffers
    and gradients are as before, and so is the random state.

    Needs `calibration=[batch, ...]` (the paper: one batch of 100), and `loss(model, batch)` where it is not the
    cross-entropy of `model(x)` and y.

    Options:
        sparsity: fraction of zeros over the sparse layers, in [0, 1). Default 0.9.
        allocation: "global" (default, the paper's); any other rule takes the best s within each layer's share.
        pattern: "unstructured" (default), "N:M", "RxC", "channel", "column", "fan-in", "groupG"; a unit is scored by
            its sum.

    Raises OptionError when there is no calibration data or a score is not a number. Warns when a layer keeps nothing.
    """

    name: ClassVar[str] = "snip"
    family: ClassVar[Family] = "before training"
    needs_calibration: ClassVar[bool] = True
    sparsity: float = 0.9
    allocation: Rule = "global"
    pattern: str | Pattern = "unstructured"

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        check_sparsity(self.sparsity, self.pattern)
        check_allocation(self.allocation)

    def choose(self, sparse: Sparsifier) -> None:
        gradient = gradients(sparse)
        scores = {name: snip(layer.weight(), gradient[name]) for name, layer in sparse.layers.items()}
        for name, counts in share(sparse.layers, self.sparsity, self.allocation, lambda: scores).items():
            layer = sparse.layers[name]
            layer.rewire(layer.best(scores[name], counts))
