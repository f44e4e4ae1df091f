"""Masks as bits: eight entries in a byte, for storage and for files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels import reference
from rarefy.kernels.native import cpu_empty, native, threads


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask into bits.

    Takes a bool tensor of any shape with n entries, on any device; returns uint8 of shape [ceil(n / 8)] on that device.
    Entry i in row-major order is bit i % 8 of byte i // 8 (bit 0 is the lowest); unused bits of the last byte are 0.
    Raises OptionError when `mask` is not boolean.

    >>> pack_mask(torch.tensor([True, False, False, True])).tolist()
    [9]
    """
    if mask.dtype != torch.bool:
        raise OptionError(f"pack_mask takes a bool tensor; this one is {mask.dtype}: compare it, as in `weight != 0`")
    if mask.device.type != "cpu":
        return reference.pack_mask(mask)
    bits = cpu_empty((mask.numel() + 7) // 8, dtype=torch.uint8)
    native.pack_mask(mask.contiguous().view(torch.uint8).view(-1).numpy(), bits.numpy(), threads())
    return bits


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack what `pack_mask` made into a boolean mask of the given shape, on the device of `bits`.

    Takes uint8 of shape [ceil(n / 8)] where n is the number of entries in `shape`.
    Raises OptionError when the dtype or the number of bytes does not fit.

    >>> unpack_mask(torch.tensor([9], dtype=torch.uint8), (2, 2)).tolist()
    [[True, False], [False, True]]
    """
    n = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.dim() != 1 or bits.numel() != (n + 7) // 8:
        raise OptionError(
            f"unpack_mask needs uint8 bits of shape [{(n + 7) // 8}] for a mask of shape {list(shape)}; "
            f"these are {bits.dtype} of shape {list(bits.shape)}"
        )
    if bits.device.type != "cpu":
        return reference.unpack_mask(bits, shape)
    mask = cpu_empty(n, dtype=torch.bool)
    native.unpack_mask(bits.contiguous().numpy(), mask.view(torch.uint8).numpy(), threads())
    return mask.view(tuple(shape))
