"""The naive truth of every kernel, in plain PyTorch: slow, short, and what the fast versions are tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool tensor into bits: entry i is bit i % 8 of byte i // 8."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack_mask`."""
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return flat.reshape(-1)[: math.prod(shape)].bool().view(tuple(shape))


def select_k(scores: Tensor, k: int | Tensor) -> Tensor:
    """Mark the k largest of scores [n], or of each row of scores [rows, n]; ties go to the lower index."""
    rows = scores if scores.dim() == 2 else scores[None]
    order = rows.sort(dim=1, descending=True, stable=True).indices
    counts = torch.as_tensor(k, device=scores.device).reshape(-1, 1).expand(rows.shape[0], 1)
    first = torch.arange(rows.shape[1], device=scores.device)[None] < counts
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, first).view(scores.shape)


def apply_mask_(weight: Tensor, mask: Tensor) -> Tensor:
    """Zero `weight` in place where `mask` is False."""
    return weight.masked_fill_(~mask, 0)
