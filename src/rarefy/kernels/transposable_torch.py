"""Transposable N:M masks in PyTorch's own operators, for every device: many tiles in step.

The best mask of a tile is a flow: each row sends n units over edges of capacity one to columns that take n each. Prices of
rows and columns, found by alternating between the two, leave few columns that get too much or too little when every row takes
its n best. What is too much is then moved along shortest paths, one unit at a time, which keeps the flow optimal for its own
column sums; so when no column is over, it is the optimum. All in whole numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FAR = 1 << 61


def whole_numbers(tiles: Tensor) -> Tensor:
    """Return scores [T, m, m] as int64, scaled by a power of two for each tile; minus infinity as a price none can pay."""
    wide = tiles.double()
    forbidden = wide == -torch.inf
    bits = torch.where(forbidden.any(2).any(1), 40, 50)[:, None, None]
    wide = wide.masked_fill(forbidden, 0)
    _, exponent = torch.frexp(wide.abs().amax((1, 2), keepdim=True))
    shift = (bits - exponent).double()
    half = (shift / 2).floor()
    whole = (wide * torch.exp2(half) * torch.exp2(shift - half)).round().long()
    # Above what the whole rest of a tile can gain: 2 n m <= 2^11 times the largest score.
    return whole.masked_fill_(forbidden, -(1 << 52))


def optimum(tiles: Tensor, n: int, sweeps: int = 6) -> Tensor:
    """Return the best mask of every tile [T, m, m]: n kept in each row and column."""
    q = whole_numbers(tiles)
    kept = _best_in_rows(q, _prices(q, n, sweeps), n)
    active = (kept.sum(1) > n).any(1).nonzero().squeeze(1)
    while active.numel():
        moved = _move_one(q[active], kept[active], n)
        kept[active] = moved
        active = active[(moved.sum(1) > n).any(1)]
    return kept


def _prices(q: Tensor, n: int, sweeps: int) -> Tensor:
    """Column prices [T, m] between the last score that each column would keep and the first that it would not."""
    m = q.shape[1]
    v = q.new_zeros(q.shape[0], m)
    if n in (0, m):
        return v
    for _ in range(sweeps):
        u = _between(q - v[:, None, :], n, 2)
        v = _between(q - u[:, :, None], n, 1)
    return v


def _between(q: Tensor, n: int, dim: int) -> Tensor:
    ordered = q.sort(dim=dim, descending=True).values
    return (ordered.select(dim, n - 1) + ordered.select(dim, n)) >> 1


def _best_in_rows(q: Tensor, v: Tensor, n: int) -> Tensor:
    """Mark the n best of each row at these prices; ties go to the nearest from a place that moves on by n each row."""
    m = q.shape[1]
    place = torch.arange(m, device=q.device)
    turned = (place[None, :] - n * place[:, None]) % m
    rank = (q - v[:, None, :]) * m + (m - 1 - turned)
    best = rank.argsort(dim=2, descending=True)[:, :, :n]
    return torch.zeros_like(q, dtype=torch.bool).scatter_(2, best, True)


def _move_one(q: Tensor, kept: Tensor, n: int) -> Tensor:
    """Move one unit of every tile from a column that has too many to one that has too few, along a shortest path."""
    tiles, m = q.shape[:2]
    sums = kept.sum(1)
    to_column = torch.where(sums > n, 0, _FAR)
    to_row = torch.full_like(to_column, _FAR)
    from_row, from_column = torch.full_like(to_column, -1), torch.full_like(to_column, -1)
    taken, given = q.masked_fill(~kept, _FAR), (-q).masked_fill(kept, _FAR)
    while True:
        length, by = (to_column[:, None, :] + taken).min(2)
        nearer = length < to_row
        to_row, from_column = torch.where(nearer, length, to_row), torch.where(nearer, by, from_column)
        length, by = (to_row[:, :, None] + given).min(1)
        nearer = length < to_column
        if not bool(nearer.any()):
            break
        to_column, from_row = torch.where(nearer, length, to_column), torch.where(nearer, by, from_row)
    at = to_column.masked_fill(sums >= n, 2 * _FAR).argmin(1)
    kept, tile = kept.clone(), torch.arange(tiles, device=q.device)
    for _ in range(m):
        row = from_row[tile, at]
        going = row >= 0
        tile, row, at = tile[going], row[going], at[going]
        if not tile.numel():
            break
        before = from_column[tile, row]
        kept[tile, row, at] = True
        kept[tile, row, before] = False
        at = before
    return kept


def prune_cover(tiles: Tensor, n: int) -> Tensor:
    """Prune the lightest first wherever a row or a column still has to lose weights, then fill what is short."""
    count, m = tiles.shape[:2]
    flat = whole_numbers(tiles).view(count, m * m)
    order = flat.argsort(dim=1, stable=True)
    kept = torch.ones_like(flat, dtype=torch.bool)
    rows, columns = (torch.full((count, m), m, device=tiles.device) for _ in range(2))
    for step in range(m * m):
        place = order[:, step : step + 1]
        row, column = place // m, place % m
        pruned = (rows.gather(1, row) > n) | (columns.gather(1, column) > n)
        kept.scatter_(1, place, ~pruned)
        rows.scatter_add_(1, row, -pruned.long())
        columns.scatter_add_(1, column, -pruned.long())
    return repair(tiles, kept.view(count, m, m), n)


def repair(tiles: Tensor, kept: Tensor, n: int) -> Tensor:
    """Fill rows and columns that keep fewer than n: the best of one weight added, or two added around one removed."""
    q, kept, m = whole_numbers(tiles), kept.clone(), tiles.shape[1]
    active = (kept.sum(2) < n).any(1).nonzero().squeeze(1)
    while active.numel():
        a, s = q[active], kept[active]
        open_row, open_column = s.sum(2) < n, s.sum(1) < n
        direct = a.masked_fill(s, -_FAR)
        # through[i, j] = max over kept (k, l) with (i, l) and (k, j) empty of a[i, l] + a[k, j] - a[k, l]
        first = (a.masked_fill(s, -_FAR)[:, :, None, :] - a.masked_fill(~s, _FAR)[:, None, :, :]).amax(3)  # [., i, k]
        through = (first[:, :, :, None] + a.masked_fill(s, -_FAR)[:, None, :, :]).amax(2)
        gain = torch.maximum(direct, through).masked_fill(
            ~(open_row[:, :, None] & open_column[:, None, :]), torch.iinfo(torch.int64).min
        )
        place = gain.flatten(1).argmax(1)
        i, j = place // m, place % m
        tile = torch.arange(len(active), device=q.device)
        added = direct[tile, i, j] >= through[tile, i, j]
        step = first[tile, i] + direct[tile, :, j]
        k = step.argmax(1)
        ell = (direct[tile, i] - a.masked_fill(~s, _FAR)[tile, k]).argmax(1)
        s[tile[added], i[added], j[added]] = True
        t, i, j, k, ell = (x[~added] for x in (tile, i, j, k, ell))
        s[t, i, ell], s[t, k, j], s[t, k, ell] = True, True, False
        kept[active] = s
        active = active[(s.sum(2) < n).any(1)]
    return kept
