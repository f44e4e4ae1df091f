"""Choose the strength of an l1 penalty from sorted gradients, so that a prescribed number of weights is not zero."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.errors import OptionError


def separable_strength(correlations: Tensor, count: int) -> float:
    """Return the strength at which exactly `count` weights are not zero when the loss is separable.

    For 1/2 ||A w - y||^2 with orthonormal columns the minimiser is w = soft(A^T y, lambda): lambda is the (count + 1)-th
    largest |A^T y|, and a millionth more where that is below the next one, so that rounding lets nothing in; where every
    weight is to stay, a tenth of the smallest. Ties at that place leave fewer.

    Args:
        correlations: A^T y, or any gradient at zero weights; any shape.
        count: non-zeros wanted, in [0, numel].

    Source: Liu, Wang & Xu 2025, arXiv 2502.00655 (separable case).

    Example:
        >>> round(separable_strength(torch.tensor([3.0, -1.0, 2.0]), 2), 3)
        1.0
    """
    ordered = correlations.detach().abs().double().reshape(-1).sort(descending=True).values
    if not 0 <= count <= ordered.numel():
        raise OptionError(f"{count} non-zeros of {ordered.numel()} weights were asked for.")
    if count == ordered.numel():
        return 0.1 * float(ordered[-1])
    first_out = float(ordered[count])
    return min(first_out * (1 + 1e-6), (first_out + float(ordered[count - 1])) / 2 if count else math.inf)


@dataclass(frozen=True)
class Search:
    """Where the search for one strength is: the strength in use, and the bracket around the one that is sought.

    `low` was too dense, `high` too sparse; 0 and infinity while nothing was.
    """

    strength: float
    low: float = 0.0
    high: float = math.inf

    def next(self, gradients: Tensor, nonzeros: int, target: int) -> Search:
        """Return the next strength to solve with.

        At a local minimum |g| = strength wherever w is not zero and |g| <= strength elsewhere. So for `target` non-zeros

            too sparse: the target-th largest |g|, where as many weights would be held at the threshold;
            too dense:  twice the strength (the gradients of a denser solution say nothing about sparser ones).

        Deep networks need a guard, for the count is not monotone there and dead units have no gradient: a fall goes to a
        quarter at most while nothing was too dense; a proposal that is not well inside the bracket becomes its geometric
        mean; a bracket whose ends have crossed (other layers have moved) is opened again.

        Args:
            gradients: dL/dw of the whole training loss at the solution; any shape.
            nonzeros, target: what the solution has, and what it is to have, at least 1.

        Source: Liu, Wang & Xu 2025, arXiv 2502.00655 (the rule for too few); the guard is rarefy's.
        """
        here = self
        if nonzeros < target:
            here = replace(here, high=min(here.high, here.strength))
            proposal = float(_largest(gradients, target))
            proposal = min(max(proposal, here.strength / 4 if here.low == 0 else 0.0), 0.98 * here.strength)
        else:
            here = replace(here, low=max(here.low, here.strength))
            proposal = 2 * here.strength
        if here.low >= here.high:
            here = replace(here, low=0.7 * here.high, high=1.4 * here.low)
        if here.low > 0 and math.isfinite(here.high) and not 1.02 * here.low < proposal < 0.98 * here.high:
            proposal = math.sqrt(here.low * here.high)
        return replace(here, strength=proposal)


def _largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest magnitude."""
    flat = values.detach().abs().reshape(-1)
    return torch.kthvalue(flat, flat.numel() - k + 1).values
