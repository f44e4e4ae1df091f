"""The weighted group sparse envelope: the best convex stand-in for "at most k groups, and a little weight decay"."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.kernels import capped_simplex
from rarefy.patterns import Pattern
from rarefy.penalties.proximal import Proximal, scale_units, unit_norms, unit_steps


@dataclass(frozen=True)
class GroupEnvelope(Proximal):
    """strength * GS_k(w), where GS_k is the largest convex function below 1/2 sum_j d_j ||w_j||^2 at k-group-sparse w.

        g_k(w)  = 1/2 sum_j d_j ||w_j||^2   if at most k of the w_j are not zero, else infinite
        GS_k(w) = g_k**(w) = 1/2 min { sum_j d_j ||w_j||^2 / u_j : 0 <= u_j <= 1, sum_j u_j <= k }.

    The w_j are the pattern's units; where it has several groups of units (N:M), each has its own k. At singletons and
    d = 1, GS_k is half the squared k-support norm; at k = 1 half the squared group lasso; at k = all, ridge.

    prox: with c_j = t strength d_j for step size t (one per unit, see `unit_steps`) and a_j = sqrt(strength d_j) ||w_j||,

        u_j = clip(mu a_j - c_j, 0, 1) with the mu at which sum u = k  (u = 1 where no more than k are not zero),
        v_j = u_j / (u_j + c_j) w_j,

    exactly zero where u_j = 0: the minimum over v for given u is this v, and what remains is minimal in u at this u. Value
    and prox take time linear in the number of weights (`rarefy.kernels.capped_simplex`).

    A small strength leaves far more than k units, with u_j < 1. As it grows only the k of largest ||w_j|| are left, and these
    shrink by 1 / (1 + c_j): the strength, not k alone, decides how many remain.

    Attributes:
        pattern: which weights make a unit.
        keep: k; an int, or int64 [groups of the pattern].
        strength: lambda, above 0.
        cost: d, above 0.

    Source: Refael, Arbel & Huleihel 2022, arXiv 2212.12921; Beck & Refael, "Sparse regularization via bidualization".

    Example:
        >>> from rarefy.patterns import Slice
        >>> envelope = GroupEnvelope(Slice(0), keep=1, strength=10.0)
        >>> envelope.prox(torch.tensor([[3.0, 4.0], [0.1, 0.1]]), step=1.0)
        tensor([[0.2727, 0.3636],
                [0.0000, 0.0000]])
    """

    pattern: Pattern
    keep: int | Tensor
    strength: float
    cost: float = 1.0

    def value(self, weight: Tensor) -> float:
        b = unit_norms(self.pattern, weight).double() * math.sqrt(self.cost)
        u = capped_simplex(b, 0.0, self.keep)
        return 0.5 * self.strength * float(torch.where(b > 0, b.square() / u, 0.0).sum())

    def conjugate(self, dual: Tensor) -> float:
        """Return g_k*(dual) = 1/2 times the sum of the k largest ||dual_j||^2 / d, of the envelope without its strength."""
        norms = unit_norms(self.pattern, dual).double().sort(dim=1, descending=True).values
        counts = torch.as_tensor(self.keep, device=norms.device).reshape(-1, 1)
        first = torch.arange(norms.shape[1], device=norms.device)[None] < counts
        return float(norms.square().masked_fill(~first, 0).sum()) / self.cost / 2

    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        norms = unit_norms(self.pattern, weight)
        c = unit_steps(self.pattern, step, weight) * (self.strength * self.cost)
        u = capped_simplex(norms * math.sqrt(self.strength * self.cost), c.to(norms.dtype), self.keep)
        return scale_units(self.pattern, weight, u / (u + c))
