"""Pruning before training without data, and without losing a layer: SynFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rarefy.engine import Family, Sparsifier
from rarefy.engine.synaptic_flow import SynapticFlow
from rarefy.methods.snip import BeforeTraining, Scorer
from rarefy.scores import synflow


@dataclass(frozen=True, kw_only=True)
class SynFlow(BeforeTraining):
    """SynFlow: prune before training, without data, the connections that least flows through.

    Tanaka et al. 2020, "Pruning neural networks without any data by iteratively conserving synaptic flow"
    (arXiv 2006.05467, eq. 5 and algorithm 1). R = sum f(1) - sum f(0), where f is a copy of the network in eval mode and
    float64 with every parameter and buffer replaced by its absolute value, and its inputs are all ones and all zeros. In
    round k = 1, ..., n

        s = |w dR/dw|  at the weights that are kept now,

    and the (1 - sparsity)^(k/n) of all weights with the largest s stay; what was pruned does not come back. The scores of
    a layer add up to R, so a small layer's weights score higher, and a layer loses its last weights only when every other
    layer is down to as few: with enough rounds no layer is lost before the highest sparsity that the network can take.
    That holds for what flows in at the inputs, which is the paper's R = 1^T |W_L| ... |W_1| 1. Its code takes sum f(1), where
    biases feed in flow on the way and early layers are lost unless the biases begin at zero: hence f(0) here. The mask never
    changes after that. All is done on the copy.

    Needs `calibration=[x]` or `[(x, y)]` for the shape of an input and nothing else. For networks that do not take one
    float tensor pass `loss(model, batch)`, which returns R of the copy (in float64). Normalisation that works on the
    input's own statistics (layer norm) undoes the scale of what flows in; the score is then no sum over paths any more.

    Options:
        sparsity: fraction of zeros over the sparse layers, in [0, 1). Default 0.9.
        allocation: "global" (default, the paper's); any other rule takes the best s within each layer's share.
        pattern: "unstructured" (default), "N:M", "RxC", "channel", "column", "fan-in", "groupG"; a unit is scored by its sum.
        rounds: n. Default 100 (the paper's); a single round loses layers.
        curve: how the sparsity rises over the rounds: "exponential" (default, the paper's), "linear", "cubic", "cosine".

    Raises OptionError when there is no batch to take the shape from, the output is no tensor, or R leaves float64's range.
    Warns when a layer keeps nothing.
    """

    name: ClassVar[str] = "synflow"
    family: ClassVar[Family] = "before training"
    rounds: int = 100

    def scorer(self, sparse: Sparsifier) -> Scorer:
        flow = SynapticFlow(sparse)

        def score() -> dict[str, Tensor]:
            weights, gradient = flow.gradients()
            return {name: synflow(weights[name], gradient[name]) for name in weights}

        return score
