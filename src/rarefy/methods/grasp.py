"""Pruning before training by what keeps the gradient flowing: GraSP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rarefy.engine import Family, Sparsifier
from rarefy.engine.calibration import gradients, hessian_product, hold, tempered
from rarefy.engine.options import check_positive
from rarefy.methods.snip import BeforeTraining, Scorer
from rarefy.scores import grasp


@dataclass(frozen=True, kw_only=True)
class GraSP(BeforeTraining):
    """GraSP: prune before training the connections whose absence leaves the gradient's norm largest.

    Wang et al. 2020, "Picking Winning Tickets Before Training by Preserving Gradient Flow" (arXiv 2002.07376, eq. 8 and
    algorithm 2). With L the cross-entropy of the logits divided by the temperature T, g its gradient summed over the
    calibration batches, and H its Hessian on the same batches,

        s = w (H g),

    element by element and signed: without weight q, g^T g would change by -2 w_q (H g)_q to first order. The weights of
    largest s over all layers together are kept (in the paper S = -w (H g), and the largest are removed). No absolute value
    is taken. The mask never changes; weights, buffers, gradients and the random state are as before.

    Needs `calibration=[batch, ...]`: the paper's code takes 10 (25 for few classes) images of each class, and adds up the
    gradients, then the products, of two halves to save memory. Give the halves as two batches for the same. Its silent
    fresh initialisation of all linear layers is not done. `loss(model, batch)` replaces the cross-entropy of `model(x)` and
    y; it sees the model's output divided by T. Attention runs unfused while it is differentiated twice.

    Options:
        sparsity: fraction of zeros over the sparse layers, in [0, 1). Default 0.9.
        allocation: "global" (default, the paper's); any rule of shapes takes the best s within each layer's share.
        pattern: "unstructured" (default), "N:M", "RxC", "channel", "column", "fan-in", "groupG"; a unit is scored by its sum.
        temperature: T, above 0. Default 200 (the paper's).
        rounds, curve: as in `snip`. Default one round (the paper's).

    Raises OptionError when there is no calibration data, a score is not a number, or the output to be divided by T is no
    tensor; AllocationError for "lamp", which ranks sizes. Warns when a layer keeps nothing.
    """

    name: ClassVar[str] = "grasp"
    family: ClassVar[Family] = "before training"
    temperature: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)

    def scorer(self, sparse: Sparsifier) -> Scorer:
        hold(sparse)

        def score() -> dict[str, Tensor]:
            with tempered(sparse.model, self.temperature):
                product = hessian_product(sparse, gradients(sparse))
            return {name: grasp(layer.weight(), product[name]) for name, layer in sparse.layers.items()}

        return score
