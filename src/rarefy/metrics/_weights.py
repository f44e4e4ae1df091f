"""Recognise a parameter, or a view or cast of it, among the arguments of an operation, and its mask in that view."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rarefy.metrics._masks import Fitted


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor that holds a parameter's values: the parameter itself, a cast, or what a parametrisation made of it."""

    name: str
    tensor: torch.Tensor
    mask: torch.Tensor | None  # same shape and strides as `tensor`


@dataclass(frozen=True, eq=False)
class Weight:
    """One use of a parameter: its source, and where the used view lies in it."""

    source: Source
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def masked(self) -> bool:
        return self.source.mask is not None

    def mask(self) -> torch.Tensor:
        """Return the mask seen through the same view as the weight."""
        assert self.source.mask is not None
        return torch.as_strided(
            self.source.mask, self.size, self.stride, self.source.mask.storage_offset() + self.offset
        )


def _extent(tensor: torch.Tensor) -> int:
    """Return how many elements of its storage a tensor reaches over."""
    return 1 + sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _storage(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse tensors and some subclasses have no storage
        return None


class Weights:
    """Table of the storages that hold parameters; holds on to its tensors, so that no address is used twice."""

    def __init__(self, model: nn.Module, fitted: Fitted) -> None:
        self._fitted = fitted
        self._by_storage: dict[int, list[Source]] = {}
        self._counts: dict[tuple[object, ...], int] = {}
        self.sizes: dict[str, int] = {}
        self.dims: dict[str, int] = {}
        self._buffers = {id(b) for b in model.buffers()}
        for name, parameter in model.named_parameters():
            label = self.label(name)
            self.sizes[label] = parameter.numel()
            self.dims[label] = parameter.dim()
            self.add(label, parameter.detach(), fitted.masks.get(name))

    def label(self, name: str) -> str:
        return self._fitted.labels.get(name, name)

    def add(self, label: str, tensor: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Note that `tensor` holds the values of parameter `label`; `mask` has its shape."""
        key = _storage(tensor)
        if key is None or tensor.numel() == 0:
            return
        if mask is not None:  # same memory layout as the weight: any view of the weight is then a view of the mask
            like = torch.empty_like(tensor, dtype=torch.bool, device=mask.device)
            if like.stride() != tensor.stride():
                like = torch.empty(_extent(tensor), dtype=torch.bool, device=mask.device)
                like = like.as_strided(tensor.shape, tensor.stride())
            mask = like.copy_(mask)
        self._by_storage.setdefault(key, []).append(Source(label, tensor, mask))

    def find(self, tensor: torch.Tensor) -> Weight | None:
        """Return the parameter that `tensor` is, or is a view of."""
        key = _storage(tensor)
        if key is None:
            return None
        for source in self._by_storage.get(key, ()):
            start = int(tensor.storage_offset()) - int(source.tensor.storage_offset())
            if start >= 0 and start + _extent(tensor) <= _extent(source.tensor):
                return Weight(source, tuple(tensor.shape), tuple(tensor.stride()), start)
        return None

    def known(self, tensor: torch.Tensor) -> bool:
        """Tell whether `tensor` is a buffer or (a view of) a parameter, not an activation."""
        return id(tensor) in self._buffers or self.find(tensor) is not None

    def derive(self, out: torch.Tensor, weight: Weight) -> None:
        """Note that `out` is a same-shaped, element-wise image of `weight` (a cast, a copy, weight times mask)."""
        if tuple(out.shape) == weight.size and self.find(out) is None:
            self.add(weight.source.name, out, weight.mask() if weight.masked else None)

    def nonzero(self, weight: Weight) -> int:
        """Return how many entries of the used view are kept."""
        key = (id(weight.source), weight.size, weight.stride, weight.offset)
        if key not in self._counts:
            self._counts[key] = int(weight.mask().sum())
        return self._counts[key]
