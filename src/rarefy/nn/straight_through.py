"""Weights that are trained dense and used sparse, their gradient passing straight through the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.kernels.n_m_masked import SIZES, n_m_masked_linear
from rarefy.nn.reparametrisation import Reparametrisation
from rarefy.patterns import NM, Pattern, TransposableNM
from rarefy.patterns.largest import largest, largest_in_frame


class _Straight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, outside: Tensor | None) -> Tensor:
        return torch.where(mask, weight, 0 if outside is None else weight * outside)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def straight(weight: Tensor, mask: Tensor, outside: Tensor | None = None) -> Tensor:
    """Return the weight where the mask is True, `outside` (default 0) times it elsewhere; its derivative is 1 everywhere.

    The straight-through estimator (Bengio et al. 2013, arXiv 1308.3432) of a mask: dropped weights are trained too.

    >>> w = torch.tensor([3.0, -1.0], requires_grad=True)
    >>> y = straight(w, torch.tensor([True, False]))
    >>> y.tolist(), torch.autograd.grad(y @ torch.tensor([5.0, 7.0]), w)[0].tolist()
    ([3.0, 0.0], [5.0, 7.0])
    """
    return _Straight.apply(weight, mask, outside)


class LargestMask(Reparametrisation):
    """The weight on its largest units by a pattern, zero elsewhere; the mask is found anew in every forward pass.

    With E = `largest(W, pattern, keep)`: forward W E, and dL/dW = dL/d(W E) at every weight, kept or not.
    """

    follows = True

    def __init__(self, pattern: Pattern, keep: int) -> None:
        super().__init__()
        self.pattern, self.count = pattern, keep

    def forward(self, weight: Tensor) -> Tensor:
        return straight(weight, self.kept(weight))

    def kept(self, weight: Tensor) -> Tensor:
        return largest(weight, self.pattern, self.count)

    def extra_repr(self) -> str:
        return str(self.pattern)


class TransposableMask(Reparametrisation):
    """The weight on a transposable N:M mask that its owner sets (`keep`, in place), zero elsewhere.

    The gradient passes straight through. A linear layer computes with it natively on the CPU: in float32 and without autocast,
    both products with the weight run on the N:M kernels from one packed copy (`rarefy.kernels.n_m_masked`), where the batch is
    large enough to gain by it. Elsewhere the mask is multiplied in.
    """

    # Least samples and multiply-adds of a dense product: with fewer, indexing a new mask and calling the operator cost more
    # than they save.
    SAMPLES: ClassVar[int] = 256
    WORTH: ClassVar[int] = 1 << 24
    mask: Tensor

    def __init__(self, weight: Tensor, pattern: TransposableNM) -> None:
        super().__init__()
        self.pattern = pattern
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        return straight(weight, self.mask)

    def kept(self, weight: Tensor) -> Tensor:
        return self.mask.clone()

    def keep(self, mask: Tensor) -> None:
        self.mask.copy_(mask)

    def computes_output(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Linear.forward and self.pattern.m in SIZES  # a subclass may have its own

    def output(self, module: nn.Module, x: Tensor) -> Tensor:
        weight, bias = module.parametrizations.weight.original, module.bias  # type: ignore[union-attr]
        assert isinstance(weight, Tensor) and isinstance(bias, Tensor | None)
        native = weight.device.type == "cpu" and weight.dtype == x.dtype == torch.float32
        large = x.numel() >= self.SAMPLES * x.shape[-1] and x.numel() * weight.shape[0] >= self.WORTH
        if native and large and not torch.is_autocast_enabled("cpu"):
            return n_m_masked_linear(x, weight, self.mask, self.pattern.n, self.pattern.m, bias)
        return F.linear(x, self(weight), bias)

    def extra_repr(self) -> str:
        return str(self.pattern)


class FadingMask(Reparametrisation):
    """The weight where it is among the N largest of M, beta times the weight elsewhere; N:M is the frame's.

    `beta` (1: dense, 0: sparse) and `frame` (which of the patterns) are buffers that the owner sets in place. While beta is
    above 0 nothing is zero, and all is kept. dL/dW = dL/dW', or with `scaled` that times 1 and beta.
    """

    follows = True
    beta: Tensor
    frame: Tensor

    def __init__(self, patterns: Sequence[NM], *, scaled: bool = False) -> None:
        super().__init__()
        self.patterns, self.scaled = tuple(patterns), scaled
        self.register_buffer("beta", torch.ones((), dtype=torch.float32))
        self.register_buffer("frame", torch.zeros((), dtype=torch.int64))

    def forward(self, weight: Tensor) -> Tensor:
        mask, beta = largest_in_frame(weight, self.patterns, self.frame), self.beta.to(weight.dtype)
        return torch.where(mask, weight, weight * beta) if self.scaled else straight(weight, mask, beta)

    def kept(self, weight: Tensor) -> Tensor:
        return largest_in_frame(weight, self.patterns, self.frame) | (self.beta > 0)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.patterns))
