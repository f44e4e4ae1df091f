"""Choosing among flat positions without anything as large as the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy import kernels
from rarefy.engine.dense_gradient import BLOCK
from rarefy.kernels.sampling import sample


def by_group(group: Tensor, scores: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return scores as a table with a row for each group, short rows filled with -1, and where each of them stands in it.

    Args:
        group: int64 [n], ascending: which group a score belongs to.
        scores: [n], not negative.
        groups: number of rows.
    """
    lengths = torch.bincount(group, minlength=groups)
    slot = torch.arange(group.numel(), device=group.device) - (lengths.cumsum(0) - lengths)[group]
    table = scores.new_full((groups, int(lengths.max())), -1)
    table[group, slot] = scores
    return table, (group, slot)


def draw(groups: int, size: int, counts: Tensor, generator: torch.Generator, besides: Tensor) -> Tensor:
    """Return ascending flat positions, drawn at random: so many in each group of `size`, none of `besides`.

    Args:
        groups: how many groups.
        size: positions in each.
        counts: int64 [groups].
        generator: on the CPU; the same draw on every device.
        besides: int64, ascending: positions that are not drawn. The result is on its device.
    """
    if groups > 1:
        return _draw_in_groups(groups, size, counts, generator, besides)
    ranks = sample(size - besides.numel(), int(counts), generator).to(besides.device).sort().values
    # the r-th absent position lies behind all present ones that have r or fewer absent ones before them
    absent_before = besides - torch.arange(besides.numel(), device=besides.device)
    return ranks + torch.searchsorted(absent_before, ranks, right=True)


def _draw_in_groups(groups: int, size: int, counts: Tensor, generator: torch.Generator, besides: Tensor) -> Tensor:
    """Rank random scores within the groups, a few groups at a time."""
    found = []
    step = max(1, BLOCK // size)
    for first in range(0, groups, step):
        last = min(first + step, groups)
        scores = torch.rand((last - first, size), generator=generator).to(besides.device)
        inside = besides[(besides >= first * size) & (besides < last * size)]
        scores.view(-1)[inside - first * size] = -1
        chosen = kernels.select_k(scores, counts[first:last])
        found.append(chosen.reshape(-1).nonzero().squeeze(1) + first * size)
    return torch.cat(found)
