"""What an order of channels is worth to one weight: the sum, over runs of neighbours, of what a pattern keeps there.

A weight is given as vectors, one for each place along the dimension whose order is sought, and places i with the same i // size
are a *run*. The value of a run of vectors v is

    shared units (`Shared`): sum of the k largest entries of v_1 + v_2 + ...      (groups of filters that share their inputs)
    N:M          (`NM`):     sum over entries of the n largest of v_1, ..., v_m   (groups along the dimension itself)
    loads        (`Loads`):  minus the number of entries where any v is not zero  (zeros that are there already)

Replacing v_a in its run by w changes the value to base_a + sum(max(w - y_a, 0)) (minus that for loads), with a number base_a
and a vector y_a for each place. For N:M and loads this is exact; for shared units it is an upper bound, with the k-th largest
entry of the old sum as threshold (sum of k largest = min over t of k t + sum(max(x - t, 0))), and `exact` decides. So all
exchanges between two runs are valued by one matrix of L1 distances: sum(max(w - y, 0)) = (|w - y|_1 + sum(w) - sum(y)) / 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Term(ABC):
    """One weight's part of the objective.

    Args:
        vectors: float32 [places, entries], all places of the dimension, in their present order.
        size: places in a run; the last run may be shorter.
        index: int64 [units]: the place of each unit that may move. Other places hold still, and count.
    """

    sign: ClassVar[float] = 1.0
    is_exact: ClassVar[bool] = True
    gathers: ClassVar[bool] = True
    """Whether rows that are alike are worth more together; where places of one run compete, they are worth less."""

    def __init__(self, vectors: Tensor, size: int, index: Tensor) -> None:
        self.size = size
        self.index = index
        self.run = index // size
        self.runs = -(-vectors.shape[0] // size)
        missing = self.runs * size - vectors.shape[0]
        if missing:  # empty places count for nothing
            vectors = torch.cat([vectors, vectors.new_zeros(missing, vectors.shape[1])])
        self.vectors = vectors
        self.values = torch.zeros(self.runs, dtype=torch.float64)
        self.base = torch.zeros(len(index), dtype=torch.float64)
        self.y = vectors.new_zeros(len(index), vectors.shape[1])
        self._refresh(torch.arange(self.runs))

    def of(self, units: Tensor) -> Tensor:
        """Return the vectors of some units [.., entries]."""
        return self.vectors[self.index[units]]

    def best_entries(self) -> Tensor:
        """Mark the entries that each unit would have its run keep [units, entries], 0 or 1."""
        return (self.vectors[self.index] != 0).to(self.vectors.dtype)

    def exchange(self, a: Tensor, b: Tensor) -> None:
        """Let units a and b (int64 [pairs], all different) change places."""
        p, q = self.index[a], self.index[b]
        self.vectors[p], self.vectors[q] = self.vectors[q], self.vectors[p]
        self._refresh(torch.cat([self.run[a], self.run[b]]).unique())

    def _refresh(self, runs: Tensor) -> None:
        """Compute values, bases and y of some runs anew."""
        touched = torch.isin(self.run, runs).nonzero().squeeze(1)
        content = self.vectors.view(self.runs, self.size, -1)[runs]
        self._compute(runs, content, touched, torch.searchsorted(runs, self.run[touched]))

    @abstractmethod
    def _compute(self, runs: Tensor, content: Tensor, units: Tensor, which: Tensor) -> None:
        """Set `values[runs]`, and `base[units]` and `y[units]` of the units in them; unit u is in run runs[which]."""

    def value(self) -> float:
        return float(self.values.sum())

    def exact(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the true gain of each exchange, for terms whose bounds are not exact."""
        raise NotImplementedError


class Shared(Term):
    """The units that a group of filters keeps together: the k largest of the summed scores."""

    is_exact = False

    def __init__(self, vectors: Tensor, size: int, index: Tensor, keep: int) -> None:
        self.keep = keep
        runs = -(-vectors.shape[0] // size)
        self.sums = vectors.new_zeros(runs, vectors.shape[1])
        super().__init__(vectors, size, index)

    def _compute(self, runs: Tensor, content: Tensor, units: Tensor, which: Tensor) -> None:
        sums = content.sum(1)
        self.sums[runs] = sums
        kept, threshold = self._largest(sums)
        self.values[runs] = kept
        self.y[units] = self.of(units) - (sums - threshold[:, None])[which]
        self.base[units] = self.keep * threshold.double()[which]

    def best_entries(self) -> Tensor:
        rows = self.vectors[self.index]
        return torch.zeros_like(rows).scatter_(1, rows.topk(self.keep, dim=1).indices, 1.0)

    def _largest(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the k largest entries of every row, and the k-th."""
        entries = sums.shape[1]
        threshold = sums.kthvalue(entries - self.keep + 1, dim=1).values
        kept = (sums - threshold[:, None]).clamp_(min=0).sum(1, dtype=torch.float64) + self.keep * threshold.double()
        return kept, threshold

    def exact(self, a: Tensor, b: Tensor) -> Tensor:
        p, q, differ = self.run[a], self.run[b], self.of(b) - self.of(a)
        new = self._largest(torch.cat([self.sums[p] + differ, self.sums[q] - differ]))[0].view(2, -1).sum(0)
        return torch.where(p == q, 0.0, new - self.values[p] - self.values[q])


class NM(Term):
    """The n largest of every m neighbours."""

    gathers = False

    def __init__(self, vectors: Tensor, size: int, index: Tensor, keep: int) -> None:
        self.keep = keep
        super().__init__(vectors, size, index)

    def _compute(self, runs: Tensor, content: Tensor, units: Tensor, which: Tensor) -> None:
        ranked = content.sort(dim=1, descending=True).values
        kept, last = ranked[:, : self.keep], ranked[:, self.keep - 1]
        after = ranked[:, self.keep] if self.keep < self.size else torch.full_like(last, -torch.inf)
        sums = kept.sum(1)
        self.values[runs] = sums.sum(1, dtype=torch.float64)
        mine = self.of(units)
        inside = mine >= last[which]  # without it, the next one moves up
        self.y[units] = torch.where(inside, after[which], last[which])
        rest = torch.where(inside, sums[which] - mine + after[which], sums[which])
        self.base[units] = rest.sum(1, dtype=torch.float64)


class Loads(Term):
    """The entries that a run of rows reads at all. Vectors are 0 and 1."""

    sign = -1.0

    def _compute(self, runs: Tensor, content: Tensor, units: Tensor, which: Tensor) -> None:
        count = content.sum(1)
        self.values[runs] = -(count > 0).sum(1, dtype=torch.float64)
        rest = ((count[which] - self.of(units)) > 0).to(content.dtype)
        self.y[units] = rest
        self.base[units] = rest.sum(1, dtype=torch.float64)
