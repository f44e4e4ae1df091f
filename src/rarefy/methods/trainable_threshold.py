"""Thresholds that are trained: each output unit learns how large its weights must be."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rarefy.engine import Family, Method, Sparsifier
from rarefy.engine.options import check_fraction, check_positive
from rarefy.errors import OptionError
from rarefy.nn import Reparametrisation, ThresholdMask


@dataclass(frozen=True, kw_only=True)
class TrainableThreshold(Method):
    """Trainable thresholds: each output unit learns under which |w| its weights are zero, and weights come and go every step.

    Liu et al. 2020, "Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable Masked Layers"
    (arXiv 2005.06870). Not the family of `set` and `rigl`, which is called dynamic sparse training too. With a threshold
    t_i for each output unit i (dimension 0 of the weight), 0 at first, the network computes with

        W' = W M,   Q_ij = |W_ij| - t_i,   M_ij = 1 if Q_ij > 0, else 0,

    made anew in every forward pass. With G = dL/dW' and H(q) = 2 - 4|q| for |q| <= 0.4, 0.4 up to |q| = 1, 0 beyond,
    in place of the step's derivative,

        dL/dW_ij = G_ij (M_ij + |W_ij| H(Q_ij)),
        dL/dt_i  = - sum_j G_ij W_ij H(Q_ij),

    so that dropped weights near their threshold are still trained, and may come back. The loss becomes

        L + alpha sum over layers and units of exp(-t_i),

    whose gradient is added when the optimizer steps; the loss of the training loop stays as it is. When a layer keeps
    1 % of its weights or less after a step, its thresholds go back to 0, a warning says so, and `sparse.memory["resets"]`
    counts it.

    The sparsity is an outcome: `sparse.sparsity` tells it. More alpha, more of it; wide layers become sparser than narrow
    ones, and alpha does not carry over from one network to another. The weights are dense in memory and in their gradients:
    training gains no speed.

    The thresholds join the optimizer in the group of their weight, as in the authors' code; so a weight decay pulls them
    towards 0, against the penalty. Training has been seen to diverge (the authors' issue 2): less alpha, another seed, or
    clipped gradients help.

    Options:
        alpha: weight of the penalty, not negative. Default 5e-6 (VGG-16, WRN-28-8 on CIFAR-10; LeNets on MNIST: 5e-4).
        collapse: kept fraction at which a layer's thresholds go back to 0, in [0, 1). Default 0.01.

    Raises OptionError where no optimizer is given, and when weights or thresholds of a collapsed layer are not finite.
    """

    name: ClassVar[str] = "trainable-threshold"
    family: ClassVar[Family] = "dense to sparse"
    aliases: ClassVar[tuple[str, ...]] = ("dst",)
    alpha: float = 5e-6
    collapse: float = 0.01

    def __post_init__(self) -> None:
        check_positive("alpha", self.alpha, zero=True)
        check_fraction("collapse", self.collapse)

    def reparametrise(self, weight: nn.Parameter) -> Reparametrisation:
        return ThresholdMask(weight)

    def penalty(self, sparse: Sparsifier) -> Tensor:
        thresholds = [layer.extras["threshold"] for layer in sparse.layers.values()]
        return self.alpha * torch.stack([t.neg().exp().sum() for t in thresholds]).sum()

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        for name, layer in sparse.layers.items():
            if layer.density > self.collapse:
                continue
            threshold = layer.extras["threshold"]
            if not (threshold.isfinite().all() and layer.trained().isfinite().all()):
                raise OptionError(
                    f"{name} {list(layer.shape)}: weights or thresholds are not finite after step {step}: training has "
                    "diverged; try a smaller alpha, a lower learning rate, or clip gradients."
                )
            warnings.warn(
                f"{name} kept {layer.nnz} of {layer.numel} weights after step {step}: its thresholds begin again at 0.",
                stacklevel=2,
            )
            threshold.zero_()
            layer.refresh()
            resets = sparse.memory.get("resets", {})
            sparse.memory["resets"] = {**resets, name: resets.get(name, 0) + 1}
