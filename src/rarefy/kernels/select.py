"""Exact selection: the k largest scores, not about k, and the same ones everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels.native import cpu_empty, native, threads


def select_k(scores: Tensor, k: int | Tensor) -> Tensor:
    """Mark the k largest scores: exactly k entries are True, and among equal scores the lowest index wins.

    `scores` is [n] or [rows, n] (every row by itself), float32, float64, bfloat16 or float16, contiguous or not, on any
    device. `k` is an int in [0, n], or an int64 tensor [rows] with one k per row. Returns bool of the scores' shape.
    Infinities are allowed and -0.0 equals 0.0. The result depends neither on the device nor on the number of threads.
    Raises OptionError for a k outside [0, n], for scores of another dtype or rank, and for scores that hold NaN.

    >>> select_k(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2).tolist()
    [False, True, True, False]
    >>> select_k(torch.tensor([[5.0, 5.0], [1.0, 2.0]]), 1).tolist()
    [[True, False], [False, True]]
    """
    if scores.dim() not in (1, 2):
        raise OptionError(f"select_k takes scores of shape [n] or [rows, n]; these are {list(scores.shape)}")
    if scores.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise OptionError(f"select_k takes floating-point scores; these are {scores.dtype}")
    scores = scores.detach()
    rows = scores if scores.dim() == 2 else scores[None]
    counts = _counts(rows, k)
    if scores.device.type == "cpu":
        wide = rows if rows.dtype == torch.float64 else rows.float()
        mask = cpu_empty(*rows.shape, dtype=torch.bool)
        if native.select_k(wide.contiguous().numpy(), counts.numpy(), mask.view(torch.uint8).numpy(), threads()):
            raise _nan(scores)
        return mask.view(scores.shape)
    if bool(rows.isnan().any()):
        raise _nan(scores)
    return _select_torch(rows, counts.to(scores.device)).view(scores.shape)


def _counts(rows: Tensor, k: int | Tensor) -> Tensor:
    """Return k as a checked int64 tensor on the CPU, of one entry or one per row."""
    counts = torch.as_tensor(k, device="cpu")
    if (
        counts.is_floating_point()
        or counts.dtype == torch.bool
        or (counts.dim() > 0 and counts.shape != rows.shape[:1])
    ):
        raise OptionError(f"k must be a whole number or one per row (int64 of shape [{rows.shape[0]}]); it is {k!r}")
    counts = counts.to(torch.int64).reshape(-1).contiguous()
    wrong = counts[(counts < 0) | (counts > rows.shape[1])]
    if wrong.numel():
        raise OptionError(f"k = {int(wrong[0])} lies outside [0, {rows.shape[1]}]: the number of scores to choose from")
    return counts


def _select_torch(rows: Tensor, counts: Tensor) -> Tensor:
    """Select on any device with PyTorch's own operators: the threshold of each row, then its ties in order."""
    if rows.numel() == 0:
        return torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    k = counts.expand(rows.shape[0])[:, None]
    largest = rows.sort(dim=1, descending=True).values
    threshold = largest.gather(1, (k - 1).clamp(min=0))
    above = rows > threshold
    ties = rows == threshold
    left = k - above.sum(1, keepdim=True)
    return (above | (ties & (ties.cumsum(1) <= left))) & (k > 0)


def _nan(scores: Tensor) -> OptionError:
    where = scores.isnan().reshape(-1).nonzero()[0]
    return OptionError(
        f"scores hold NaN (the first at position {int(where)} of {scores.numel()}): the loss or a weight has diverged"
    )
