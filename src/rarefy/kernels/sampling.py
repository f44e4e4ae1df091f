"""Random choices that are the same on every machine, device and storage."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(population: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw `count` different integers from range(population), uniformly; int64 [count], on the CPU, in drawing order.

    Memory grows with `count` and not with `population` while `count` is a small share of it, so that weights too large
    to enumerate can be sampled too.
    """
    if count * 3 >= population:
        return torch.randperm(population, generator=generator, device="cpu")[:count]
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while drawn.numel() < count:
        missing = count - drawn.numel()
        fresh = torch.randint(population, (missing + missing // 2 + 8,), generator=generator, device="cpu")
        drawn = _first_of_each(torch.cat([drawn, fresh]))
    return drawn[:count]


def _first_of_each(values: Tensor) -> Tensor:
    """Keep the first occurrence of every value, in order."""
    ordered, order = torch.sort(values, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return values[order[first].sort().values]
