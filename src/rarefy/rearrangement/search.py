"""The search for an order of channels: a greedy start, then exchanges that raise the objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rarefy.rearrangement.terms import Term

_TINY = 1e-7  # a gain must be more than rounding, relative to the runs' values
_FLOATS = 1 << 24  # in vectors that are compared at once


def search(
    make: Callable[[Tensor], Sequence[Term]], units: int, generator: torch.Generator, budget: int, failures: int
) -> tuple[Tensor, float, float]:
    """Return (order, value before, value after): unit order[i] goes to place i. The value never falls.

    Args:
        make: gives the terms, with the units in a given order.
        units: number of units.
        generator: of the random pairs.
        budget: exchanges to value.
        failures: rounds without a gain in a row, after which the search ends.
    """
    order = torch.arange(units)
    terms = make(order)
    before = sum(term.value() for term in terms)
    start = _greedy(terms, units)
    if start is not None:
        other = make(start)
        if sum(term.value() for term in other) > before:
            order, terms = start, other
    order = order.clone()
    cells = _cells(terms, units)
    failed = tried = 0
    while len(cells) > 1 and tried < budget and failed < failures:
        pairs = _pairs(terms, cells, generator)
        a, b, count = _best(terms, cells, pairs)
        tried += count
        if len(a):
            for term in terms:
                term.exchange(a, b)
            order[a], order[b] = order[b], order[a]
        failed = 0 if len(a) else failed + 1
    after = sum(term.value() for term in terms)
    return (order, before, after) if after > before else (torch.arange(units), before, before)


def _greedy(terms: Sequence[Term], units: int) -> Tensor | None:
    """Fill the runs one after the other: with the largest row that is left, and those that share most of its best entries.

    None where terms cut the units into different runs, or choose along their runs (N:M), where likeness is no gain.
    """
    first = terms[0]
    if any(not torch.equal(t.run, first.run) or not t.gathers for t in terms):
        return None
    best = torch.cat([t.best_entries() for t in terms], 1)
    size = torch.stack([t.vectors[t.index].sum(1) for t in terms]).sum(0)
    left = torch.ones(units, dtype=torch.bool)
    order = torch.empty(units, dtype=torch.int64)
    for run in first.run.unique():
        places = (first.run == run).nonzero().squeeze(1)
        seed = int(size.masked_fill(~left, -1).argmax())
        left[seed] = False
        shared = (best @ best[seed]).masked_fill(~left, -1)
        more = shared.argsort(descending=True, stable=True)[: len(places) - 1]
        left[more] = False
        order[places] = torch.cat([torch.tensor([seed]), more])
    return order


def _cells(terms: Sequence[Term], units: int) -> Tensor:
    """Return the units [cells, most] by the runs that they are in, -1 where there are fewer; order inside a cell is idle."""
    runs = torch.stack([t.run for t in terms], 1)
    cell = runs.unique(dim=0, return_inverse=True)[1]
    counts = torch.bincount(cell)
    by_cell = cell.argsort(stable=True)
    slot = torch.arange(units) - (counts.cumsum(0) - counts)[cell[by_cell]]
    table = torch.full((len(counts), int(counts.max())), -1)
    table[cell[by_cell], slot] = by_cell
    return table


def _pairs(terms: Sequence[Term], cells: Tensor, generator: torch.Generator) -> Tensor:
    """Draw pairs of cells [pairs, 2] such that no run of any term is in two of them."""
    shuffled = torch.randperm(len(cells), generator=generator)
    pairs = shuffled[: len(cells) // 2 * 2].view(-1, 2)
    first = cells[:, 0]
    runs = torch.stack([t.run[first] for t in terms], 1)
    if all(len(column.unique()) == len(cells) for column in runs.unbind(1)):
        return pairs
    used: list[set[int]] = [set() for _ in terms]
    kept = []
    for i, pair in enumerate(pairs.tolist()):
        mine = [{int(runs[c, t]) for c in pair} for t in range(len(terms))]
        if all(u.isdisjoint(m) for u, m in zip(used, mine, strict=True)):
            kept.append(i)
            for u, m in zip(used, mine, strict=True):
                u |= m
    return pairs[kept]


def _best(terms: Sequence[Term], cells: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, int]:
    """Value all exchanges between the cells of each pair; return those best ones that gain, and how many were valued."""
    left, right = cells[pairs[:, 0]], cells[pairs[:, 1]]
    real = (left >= 0)[:, :, None] & (right >= 0)[:, None, :]
    gain = torch.zeros(real.shape, dtype=torch.float64)
    scale = torch.zeros(len(pairs), dtype=torch.float64)
    for term in terms:
        p, q = term.run[left[:, 0]], term.run[right[:, 0]]
        now = term.values[p] + term.values[q]
        scale += now.abs()
        gain += torch.where((p == q)[:, None, None], 0.0, _after(term, left, right) - now[:, None, None])
    flat = gain.masked_fill_(~real, -torch.inf).flatten(1)
    best, where = flat.max(1)
    a, b = (
        left.gather(1, where[:, None] // cells.shape[1])[:, 0],
        right.gather(1, where[:, None] % cells.shape[1])[:, 0],
    )
    good = best > _TINY * scale
    if bool(good.any()) and not all(term.is_exact for term in terms):
        bounded = [term for term in terms if not term.is_exact]
        assert len(bounded) == len(terms)
        exact = sum(term.exact(a[good], b[good]) for term in bounded)
        good[good.nonzero().squeeze(1)] = exact > _TINY * scale[good]
    return a[good], b[good], int(real.sum())


def _after(term: Term, left: Tensor, right: Tensor) -> Tensor:
    """Return the value (or its bound) of both runs after each exchange, float64 [pairs, left, right]."""
    y, found = term.y, []
    step = max(1, _FLOATS // (4 * left.shape[1] * y.shape[1]))
    for i in range(0, len(left), step):
        a, b = left[i : i + step], right[i : i + step]
        enters = _positive(y[a], term.of(b)) + term.base[a][:, :, None]  # b in the place of a
        leaves = _positive(y[b], term.of(a)).transpose(1, 2) + term.base[b][:, None, :]
        found.append(enters + leaves)
    return term.sign * torch.cat(found)


def _positive(y: Tensor, v: Tensor) -> Tensor:
    """Return sum(max(v - y, 0)) for all pairs: y [n, r, m], v [n, c, m] -> float64 [n, r, c]."""
    distance = torch.cdist(y, v, p=1).double()
    return (distance + v.sum(2, dtype=torch.float64)[:, None, :] - y.sum(2, dtype=torch.float64)[:, :, None]) / 2
