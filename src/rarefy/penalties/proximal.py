"""Penalties with a corner at zero: what a gradient cannot bring to zero, their proximal operators do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.patterns import Pattern


class Proximal(ABC):
    """A penalty R(w) on one weight tensor, and the step that minimises it beside a quadratic.

    After a gradient step from w with step size t comes prox_tR: v = argmin 1/2 sum (v - w)^2 / t + R(v). A step size is a
    number, or one per weight (an optimizer with a preconditioner); weights are tensors of any shape, floating.
    """

    @abstractmethod
    def value(self, weight: Tensor) -> float:
        """Return R(weight), summed in float64."""

    @abstractmethod
    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        """Return argmin_v 1/2 sum (v - weight)^2 / step + R(v): weight-shaped, with exact zeros."""


@dataclass(frozen=True)
class L1(Proximal):
    """R(w) = strength * sum |w|; its prox is soft thresholding: sign(w) max(|w| - step strength, 0).

    Example:
        >>> L1(0.5).prox(torch.tensor([2.0, -0.4, -1.0]), step=1.0)
        tensor([ 1.5000,  0.0000, -0.5000])
    """

    strength: float

    def value(self, weight: Tensor) -> float:
        return self.strength * float(weight.abs().sum(dtype=torch.float64))

    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        bound = torch.as_tensor(step, dtype=weight.dtype, device=weight.device) * self.strength
        return weight - weight.clamp(-bound, bound)

    def residual(self, weight: Tensor, gradient: Tensor) -> float:
        """Return how far w is from a stationary point of L + R, given dL/dw there, in units of `strength`.

        max of |g + strength sign(w)| where w is not zero and of |g| - strength where it is: 0 at every local minimum.
        """
        off = gradient.abs() - self.strength
        on = (gradient + self.strength * weight.sign()).abs()
        return max(float(torch.where(weight != 0, on, off).max()), 0.0) / self.strength


@dataclass(frozen=True)
class GroupLasso(Proximal):
    """R(w) = strength * sum_j ||w_j||_2 over the pattern's units; its prox multiplies each by max(1 - t strength/||w_j||, 0).

    Yuan & Lin 2006. With one step size per weight, each unit takes their harmonic mean.
    """

    pattern: Pattern
    strength: float

    def value(self, weight: Tensor) -> float:
        return self.strength * float(unit_norms(self.pattern, weight).sum(dtype=torch.float64))

    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        norms = unit_norms(self.pattern, weight)
        bound = unit_steps(self.pattern, step, weight) * self.strength
        return scale_units(self.pattern, weight, torch.where(norms > bound, 1 - bound / norms, 0.0))


def unit_norms(pattern: Pattern, weight: Tensor) -> Tensor:
    """Return the Euclidean norm of every unit, [groups, units]."""
    wide = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
    return pattern.pool(wide.square()).sqrt()


def unit_steps(pattern: Pattern, step: float | Tensor, weight: Tensor) -> Tensor:
    """Return one step size for every unit: the harmonic mean of those of its weights, or the one number that holds for all."""
    if not isinstance(step, Tensor) or step.dim() == 0:
        return torch.as_tensor(step, dtype=torch.float32 if weight.dtype.itemsize < 8 else weight.dtype).to(
            weight.device
        )
    return pattern.unit_size(weight.shape) / pattern.pool(step.reciprocal())


def scale_units(pattern: Pattern, weight: Tensor, factors: Tensor) -> Tensor:
    """Multiply every unit by its factor [groups, units]; a unit of factor 0 becomes +0."""
    spread = pattern.expand(factors.to(weight.dtype), weight.shape)
    return torch.where(spread == 0, 0.0, weight * spread).to(weight.dtype)
