"""Linear, Conv2d and Embedding layers whose weight is read from an array that many layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from rarefy.nn.shared_array import SharedArray


class SharedModule(nn.Module):
    """A layer without a weight of its own: it is gathered when it is needed, and again in the backward pass.

    Made by `share_`. Of all layers that read one array, the first registers it (as `shared`), so that the network has
    it once: in `parameters()`, in the state dict, for the optimizer and for DistributedDataParallel.

    Attributes:
        array: the `SharedArray`.
        index: the number of this layer's weight there.
        weight_shape: the shape that the dense weight would have.
    """

    array: SharedArray
    index: int
    weight_shape: tuple[int, ...]

    def _read_from(self, array: SharedArray, index: int, shape: tuple[int, ...], owner: bool) -> None:
        object.__setattr__(self, "array", array)  # a reference that nn.Module does not list
        self.index, self.weight_shape = index, shape
        if owner:
            self.shared = array

    def weight_now(self) -> Tensor:
        """Return the weight as it is now, [weight_shape]; differentiable in the array's values."""
        return self.array.weight(self.index).view(self.weight_shape)

    def _apply_weight(self, operation: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply the weight, and keep no copy of it for the backward pass: it is gathered again there."""
        weight = self.weight_now()
        if torch.compiler.is_compiling() or not weight.requires_grad:
            return operation(weight)
        storage, version = weight.untyped_storage()._cdata, self.array.values._version

        def pack(tensor: Tensor) -> Any:
            if tensor.untyped_storage()._cdata != storage:
                return tensor
            return tensor.shape, tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            if self.array.values._version != version:
                raise RuntimeError(
                    f"{type(self).__name__}: the shared array was changed in place between the forward and the backward "
                    "pass (an optimizer step?); call backward() first."
                )
            with torch.no_grad():
                return self.weight_now().as_strided(*packed)

        with saved_tensors_hooks(pack, unpack):
            return operation(weight)

    def _repr_shared(self) -> str:
        return f"shared={self.array.size} of {self.array.represented}"


class SharedLinear(SharedModule):
    """`torch.nn.Linear` on a shared array; x [..., in_features]."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_weight(lambda weight: F.linear(x, weight, self.bias))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._repr_shared()}"
        )


class SharedConv2d(SharedModule):
    """`torch.nn.Conv2d` on a shared array; x [batch, in_channels, height, width]."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_weight(lambda weight: nn.Conv2d._conv_forward(self, x, weight, self.bias))  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, bias={self.bias is not None}, {self._repr_shared()}"
        )


class SharedEmbedding(SharedModule):
    """`torch.nn.Embedding` on a shared array: only the rows that are looked up are gathered; x int [...]."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.array.weight(self.index, x.long())
        return rows if self.padding_idx is None else rows.masked_fill((x == self.padding_idx)[..., None], 0)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._repr_shared()}"
