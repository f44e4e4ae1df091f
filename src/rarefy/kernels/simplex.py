"""Filling a capped simplex in linear time: what proximal operators of top-k envelopes and soft top-k come down to."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels import reference
from rarefy.kernels.native import native, threads


def capped_simplex(a: Tensor, c: Tensor | float, k: int | Tensor) -> Tensor:
    """Return u = clip(mu a - c, 0, 1) with the mu at which u adds up to k; in each row by itself, in linear time.

    Where no more than k entries of `a` are positive, u is 1 there and 0 elsewhere. With c = d - max(d) + b it is the
    Euclidean projection onto {0 <= u <= 1, sum u = k} when a is 1 (a soft top-k); see `rarefy.penalties.GroupEnvelope`
    for the one that it is made for.

    `a` is [n] or [rows, n], float32 or float64 (other floating types are computed in float32), not negative and finite; `c`
    a number or a tensor of the shape of `a`, likewise; `k` an int, or int64 [rows]. Returns the shape and dtype of `a`. Sums
    are taken in float64; on the CPU the result does not depend on the number of threads or the instruction set.
    Raises OptionError for another shape or dtype, a negative k, and for entries that are negative or not finite.

    >>> capped_simplex(torch.tensor([3.0, 1.0, 1.0, 0.0]), 0.5, 2)
    tensor([1.0000, 0.5000, 0.5000, 0.0000])
    """
    if a.dim() not in (1, 2) or not a.is_floating_point():
        raise OptionError(f"capped_simplex takes floats of shape [n] or [rows, n]; these are {a.dtype} {list(a.shape)}")
    if isinstance(c, Tensor) and c.dim() and c.shape != a.shape:
        raise OptionError(f"c must be a number or have the shape of a, {list(a.shape)}; it is {list(c.shape)}")
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    rows = a.detach().to(dtype).reshape(1 if a.dim() == 1 else a.shape[0], -1).contiguous()
    offset = torch.as_tensor(c, dtype=dtype, device=a.device).detach()
    offset = offset.reshape(rows.shape).contiguous() if offset.dim() else offset.reshape(1)
    counts = torch.as_tensor(k, device="cpu")
    if (counts.dim() and counts.shape != rows.shape[:1]) or counts.is_floating_point() or bool((counts < 0).any()):
        raise OptionError(f"k must be a whole number, 0 or more, or one per row (int64 [{rows.shape[0]}]); it is {k!r}")
    counts = counts.to(torch.int64).reshape(-1).contiguous()
    if a.device.type == "cpu":
        u = torch.empty_like(rows)
        bad = native.capped_simplex(rows.numpy(), offset.view(-1).numpy(), counts.numpy(), u.numpy(), threads())
    else:
        bad = bool((~((rows >= 0) & rows.isfinite())).any() | (~((offset >= 0) & offset.isfinite())).any())
        u = rows if bad else reference.capped_simplex(rows, offset.expand_as(rows), counts.to(a.device))
    if bad:
        raise OptionError(
            "capped_simplex takes finite numbers, 0 or more: a norm has overflowed or training has diverged"
        )
    return u.view(a.shape).to(a.dtype)
