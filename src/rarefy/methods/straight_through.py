"""N:M training from scratch with a straight-through estimator: STE and SR-STE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rarefy.engine import Family, Sparsifier
from rarefy.engine.options import check_not_negative
from rarefy.engine.sharing import share
from rarefy.methods.n_m import Fitting
from rarefy.nn import LargestMask, Reparametrisation


@dataclass(frozen=True, kw_only=True)
class Refined(Fitting):
    """What SR-STE and its kin share: the pull of pruned weights towards zero."""

    refine: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("refine", self.refine)

    def penalty(self, sparse: Sparsifier) -> Tensor | None:
        """Return lambda/2 sum ((1 - E) W)^2, whose gradient is lambda (1 - E) W."""
        pruned = [layer.live_weight() * ~layer.mask() for layer in sparse.layers.values()]
        return 0.5 * self.refine * torch.stack([w.square().sum() for w in pruned]).sum()


@dataclass(frozen=True, kw_only=True)
class STE(Fitting):
    """STE: train dense weights, compute with the N largest of every M, and pass the gradient straight to all of them.

    The plain estimator of Bengio et al. 2013 (arXiv 1308.3432) on an N:M projection, the baseline of `sr-ste` (Zhou et al.
    2021, arXiv 2102.04010, sec. 4). In every forward pass, also of an evaluation,

        W' = W E,   E = 1 for the N largest |w| in each M neighbours (ties: the lower index), else 0,

    and with G = dL/dW' the weight's gradient is

        dL/dW = G,   kept or not.

    So pruned weights go on learning, and come back when they have grown. Masks flip all the time:
    `rarefy.analysis.churn(sparse.events)` tells how often.

    Groups run along the inputs, as sparse tensor cores and NVIDIA's ASP have them (a convolution: its input channels at one
    kernel position); "N:M@0" has them along the outputs. Weights that the pattern does not fit, such as a stem of three
    channels or a depthwise convolution, and embeddings stay dense and are listed with the reason; what `include` names must
    fit. The paper leaves the last layer dense too: `exclude` it. The paper's own code cut the kernel window instead of the
    channels, and let groups run over the ends of filters.

    Weights, gradients and optimizer state are dense. Training FLOPs are counted for kernels that skip zeros in the forward
    pass and in the gradient of the input; the mask is N:M in the first only (`bdwp` is in both).

    Options:
        pattern: "2:4" (default), any "N:M" (N = M is the dense network), or another pattern: its largest units.
        sparsity: that of the pattern, 1 - N/M; for patterns without one, of each layer. Default 0.5.

    Raises OptionError where sparsity and pattern contradict each other, and for weights that are NaN; SelectionError where no
    layer fits; PatternError where one does not that `include` names; AllocationError where a layer would keep nothing.
    """

    name: ClassVar[str] = "ste"
    family: ClassVar[Family] = "sparse to sparse"

    def reparametrise(self, weight: nn.Parameter) -> Reparametrisation:
        free = self.cut.fixed_sparsity is None
        return LargestMask(self.cut, self.cut.keep(weight.shape, 1 - self.sparsity if free else None))

    def choose(self, sparse: Sparsifier) -> None:
        share(sparse.layers, self.sparsity, "uniform")  # can all layers take it?


@dataclass(frozen=True, kw_only=True)
class SRSTE(Refined, STE):
    """SR-STE: as `ste`, and weights that are pruned now are pulled towards zero, so that masks settle.

    Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch" (arXiv 2102.04010, eq. 9).
    As `ste`, with

        dL/dW = G + lambda (1 - E) W:

    a decay of the pruned weights alone, beside the optimizer's own decay of all. Their gradient is not masked. The term joins
    the loss's gradient when the optimizer steps, as a penalty lambda/2 ||(1 - E) W||^2: once, however many passes were
    accumulated, and not scaled by GradScaler; the paper's code adds it in every backward pass, where a loss scale makes it
    vanish. An optimizer that normalises gradients, such as Adam, normalises this term too: there choose lambda anew.

    What it does shows in SAD, the sparse architecture divergence, the number of mask bits in which two times differ: `flips`
    of `rarefy.analysis.churn(sparse.events)`, or with the first and the last mask by `rarefy.analysis.MaskHistory`. It falls
    as lambda grows.

    Options (beside those of `ste`):
        refine: lambda, not negative; 0 is `ste`. Default 2e-4 (the authors' code).

    Raises as `ste` does, and OptionError by `step()` where no optimizer is given.
    """

    name: ClassVar[str] = "sr-ste"
    family: ClassVar[Family] = "sparse to sparse"
