"""A linear layer that keeps its non-zero weights only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rarefy import kernels
from rarefy.errors import OptionError
from rarefy.nn.module import SparseModule


class SparseLinear(SparseModule):
    """y = x W^T + b with a sparse W [out_features, in_features]; x [..., in_features].

    Memory and time grow with the kept weights, forward and backward. Runs natively in float32 on the CPU (bfloat16 and
    float16 by way of it), with PyTorch's own operators otherwise. See `SparseModule` for parameters and buffers.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        sparsity: fraction of zeros, in [0, 1); the kept weights are drawn uniformly at random, and start uniformly in
            +-1/sqrt(kept inputs of their output), so that signals keep the variance they have in a dense layer.
        generator: of all random choices; default: PyTorch's own.

    Example:
        >>> import torch, rarefy
        >>> layer = rarefy.nn.SparseLinear(100_000, 100_000, sparsity=0.999999)
        >>> layer
        SparseLinear(in_features=100000, out_features=100000, nnz=10000, sparsity=0.999999, bias=True)
        >>> layer(torch.randn(2, 100_000)).shape
        torch.Size([2, 100000])
    """

    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float = 0.9,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._draw(sparsity, bias, generator, device, dtype)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise OptionError(f"SparseLinear: x has {x.shape[-1]} features; this layer takes {self.in_features}.")
        return kernels.sparse_linear(x, self.values, self.crow, self.col, self.bias)

    @classmethod
    def from_dense(cls, module: nn.Linear, mask: Tensor | None = None) -> SparseLinear:
        """Return the sparse twin of a dense layer, with copies of its weights where `mask` is True (default: non-zero)."""
        weight = module.weight.detach()
        kept = _positions(weight, mask)
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = module.in_features, module.out_features
        new._set_weight(weight.reshape(-1)[kept], kept, module.weight.requires_grad)
        new.register_parameter("bias", _copy(module.bias))
        return new.train(module.training)

    def to_dense(self) -> nn.Linear:
        """Return a `torch.nn.Linear` with copies of these weights and exact zeros elsewhere."""
        new = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        new.weight = nn.Parameter(self.dense_weight(), requires_grad=self.values.requires_grad)
        new.register_parameter("bias", _copy(self.bias))
        return new.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._repr_kept()}"


def _copy(bias: Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)


def _positions(weight: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        mask = weight != 0
    elif mask.dtype != torch.bool or mask.shape != weight.shape:
        raise OptionError(
            f"from_dense: the mask must be bool {list(weight.shape)}, not {mask.dtype} {list(mask.shape)}."
        )
    return mask.to(weight.device).reshape(-1).nonzero().squeeze(1)
