"""A 2-D convolution that keeps its non-zero weights only."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy import kernels
from rarefy.nn.linear import _copy, _positions
from rarefy.nn.module import SparseModule

_GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)


class SparseConv2d(SparseModule):
    """2-D convolution of x [batch, in_channels, height, width] with a sparse kernel.

    Memory and time grow with the kept weights, forward and backward. Runs natively in float32 on the CPU (bfloat16 and
    float16 by way of it), with PyTorch's own operators on the dense weight otherwise.

    Args:
        in_channels ... dtype: as in `torch.nn.Conv2d`.
        sparsity, generator: as in `SparseLinear`.

    Example:
        >>> import torch, rarefy
        >>> layer = rarefy.nn.SparseConv2d(16, 32, 3, padding=1, sparsity=0.9)
        >>> layer
        SparseConv2d(16, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), nnz=461, sparsity=0.899957, bias=True)
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        sparsity: float = 0.9,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # A dense twin without memory knows and checks the geometry.
        twin = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device="meta"
        )
        self._take_geometry(twin)
        self._draw(sparsity, bias, generator, device, dtype)

    def _take_geometry(self, module: nn.Conv2d | SparseConv2d) -> None:
        for name in _GEOMETRY:
            setattr(self, name, getattr(module, name))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        elif isinstance(padding, str):  # "same" may pad one side more than the other
            x = F.pad(x, self._reversed_padding_repeated_twice)
            padding = (0, 0)
        return kernels.sparse_conv2d(
            x,
            self.values,
            self.crow,
            self.col,
            self.bias,
            self.weight_shape,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )

    @classmethod
    def from_dense(cls, module: nn.Conv2d, mask: Tensor | None = None) -> SparseConv2d:
        """Return the sparse twin of a dense layer, with copies of its weights where `mask` is True (default: non-zero)."""
        weight = module.weight.detach()
        kept = _positions(weight, mask)
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new._take_geometry(module)
        new._set_weight(weight.reshape(-1)[kept], kept, module.weight.requires_grad)
        new.register_parameter("bias", _copy(module.bias))
        return new.train(module.training)

    def to_dense(self) -> nn.Conv2d:
        """Return a `torch.nn.Conv2d` with copies of these weights and exact zeros elsewhere."""
        new = nn.Conv2d(1, 1, 1, bias=False, device="meta")
        for name in _GEOMETRY:
            setattr(new, name, getattr(self, name))
        new.weight = nn.Parameter(self.dense_weight(), requires_grad=self.values.requires_grad)
        new.register_parameter("bias", _copy(self.bias))
        return new.train(self.training)

    def extra_repr(self) -> str:
        more = "" if self.dilation == (1, 1) else f", dilation={self.dilation}"
        more += "" if self.groups == 1 else f", groups={self.groups}"
        more += "" if self.padding_mode == "zeros" else f", padding_mode={self.padding_mode}"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}{more}, {self._repr_kept()}"
        )
