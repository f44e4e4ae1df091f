"""How large a sparse model is: kept parameters, and bytes in three ways of storing them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from torch import nn

from rarefy.errors import OptionError
from rarefy.metrics._masks import Masks, fit


class ParameterCount(NamedTuple):
    """Number of parameters: kept (outside masks all of them) and in total."""

    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """Fraction of the whole model's parameters that are pruned away."""
        return 1 - self.kept / self.total if self.total else 0.0


class StorageBytes(NamedTuple):
    """Bytes of a model's parameters: dense, as bit mask and kept values, as CSR, each tensor as it is smallest."""

    dense: int
    bitmask: int
    csr: int
    best: int


def _tensors(model: nn.Module, masks: Masks | None) -> Iterator[tuple[nn.Parameter, int | None]]:
    """Yield every parameter once (tied weights too) with its number of kept entries, None where it has no mask."""
    fitted = fit(model, masks).masks
    for name, parameter in model.named_parameters():
        yield parameter, int(fitted[name].sum()) if name in fitted else None


def parameters(model: nn.Module, masks: Masks | None = None) -> ParameterCount:
    """Count the model's parameters, kept and total.

    All parameters count, biases and norms too (they have no mask: all kept); a tied weight counts once; buffers do not.
    Errors as in `flops` for masks that do not fit.

    >>> import torch
    >>> parameters(nn.Linear(4, 2), {"weight": torch.eye(2, 4).bool()})
    ParameterCount(kept=4, total=10)
    """
    kept = total = 0
    for parameter, nonzero in _tensors(model, masks):
        total += parameter.numel()
        kept += parameter.numel() if nonzero is None else nonzero
    return ParameterCount(kept, total)


def csr_bytes(shape: tuple[int, ...], kept: int, value_bytes: int, index_bytes: int | None = 4) -> int:
    """Return the bytes of a CSR matrix: kept values, their column indices, and rows + 1 row pointers of 4 bytes.

    The tensor is seen as [first dimension, all others]; a 1-D one as a single row.

    Args:
        index_bytes: bytes of a column index; None takes the smallest of 1, 2, 4 that can number the columns.
    """
    rows, columns = (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))
    if index_bytes is None:
        index_bytes = 1 if columns <= 1 << 8 else 2 if columns <= 1 << 16 else 4
    return kept * (value_bytes + index_bytes) + 4 * (rows + 1)


def storage_bytes(model: nn.Module, masks: Masks | None = None, *, index_bytes: int | None = 4) -> StorageBytes:
    """Return the bytes of the model's parameters in each format, file headers and buffers left out.

    For a tensor of n entries, k kept, v bytes per value: dense n v; bit mask ceil(n / 8) + k v; CSR on the 2-D view
    [out, rest] k (v + 4) + 4 (rows + 1), with int32 column indices unless `index_bytes` says otherwise. A parameter
    without a mask is dense in all of them; a tied one counts once. `best` takes the smallest for each tensor.

    >>> import torch
    >>> storage_bytes(nn.Linear(16, 4, bias=False), {"weight": torch.eye(4, 16).bool()})
    StorageBytes(dense=256, bitmask=24, csr=52, best=24)
    """
    if index_bytes not in (None, 1, 2, 4, 8):
        raise OptionError(f"index_bytes is {index_bytes}; take 1, 2, 4, 8, or None for the smallest that fits")
    sums = [0, 0, 0, 0]
    for parameter, kept in _tensors(model, masks):
        n, value = parameter.numel(), parameter.element_size()
        sizes = [n * value] * 3
        if kept is not None:
            sizes[1] = -(-n // 8) + kept * value
            sizes[2] = csr_bytes(tuple(parameter.shape), kept, value, index_bytes)
        sums = [total + size for total, size in zip(sums, [*sizes, min(sizes)], strict=True)]
    return StorageBytes(*sums)
