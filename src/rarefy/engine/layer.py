"""The storage interface: one sparse weight, as methods see it.

A method never touches a parameter or a mask. It asks a layer to choose units (the weights that live and die together,
see `rarefy.patterns`), and tells it to keep them. What it gets back from a choice is opaque: hand it back, nothing else.
So the same method runs on masked storage and on any other storage that implements this interface.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rarefy.engine.distributed import average, on_any_rank
from rarefy.engine.factors import Factors, draw
from rarefy.engine.optimizer_state import Optimizers
from rarefy.engine.passes import Passes
from rarefy.engine.selection import Target
from rarefy.nn import SparseModule
from rarefy.patterns import Pattern


class Change(NamedTuple):
    """How many weights a rewiring dropped and grew."""

    dropped: int
    grown: int


class Layer(ABC):
    """One sparse weight: what it is, what it keeps, and the moves that methods are made of.

    "Counts" are int64 tensors [groups]: units kept in each group of the pattern (one group for most patterns).
    """

    def __init__(self, target: Target, pattern: Pattern, optimizers: Optimizers) -> None:
        self.target = target
        self.pattern = pattern
        self._optimizers = optimizers
        self.shape = target.shape
        self.numel = math.prod(self.shape)
        self.groups, self.units_per_group = pattern.units(self.shape)
        self._factors: Passes[Factors] = Passes()
        self.resting = 0  # weights that are trained and not kept: see `rarefy.engine.reserve`
        self.further_gradients = 0  # of weights that are not kept: how many were computed since the engine last asked

    @classmethod
    @abstractmethod
    def check(cls, model: nn.Module, targets: Sequence[Target], pattern: Pattern, optimizers: Optimizers) -> None:
        """Raise where this storage cannot hold these weights; changes nothing."""

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def module(self) -> nn.Module:
        return self.target.module

    @property
    @abstractmethod
    def nnz(self) -> int:
        """Number of kept weights."""

    @property
    def given(self) -> bool:
        """Whether the weight was sparse before: its first topology and its scale are not the method's to choose."""
        return False

    @property
    def density(self) -> float:
        return self.nnz / self.numel

    @property
    def sparsity(self) -> float:
        return 1 - self.nnz / self.numel

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {list(self.shape)}, {self.pattern}, sparsity={self.sparsity:.4f})"

    # --- what it holds ----------------------------------------------------------------------------------------------

    @abstractmethod
    def mask(self) -> Tensor:
        """Return a bool copy of the mask, in the weight's shape; True = kept."""

    @abstractmethod
    def weight(self) -> Tensor:
        """Return the weight as a dense tensor, detached, zero where it is not kept. Not for writing."""

    @abstractmethod
    def values(self) -> Tensor:
        """Return a copy of the kept weights, in the order of their places in the flattened weight; [nnz]."""

    @property
    def learning_rate(self) -> float:
        """What the optimizer multiplies this weight's update by now; 0 where no optimizer holds it."""
        return self._optimizers.learning_rate(self.target.parameter)

    @abstractmethod
    def counts(self, *chosen: Tensor) -> Tensor:
        """Return how many units each group keeps, or has among all that are chosen; int64 [groups]."""

    @abstractmethod
    def kept_per_output(self) -> Tensor:
        """Return how many weights each output unit (dimension 0) keeps; int64 [shape[0]]."""

    @abstractmethod
    def mean_gradient(self) -> float:
        """Return the mean |dense gradient| of the kept weights; as `largest_gradients`, of what was collected."""

    @abstractmethod
    def explored(self) -> int:
        """Return how many weights have been kept at any time so far."""

    # --- choosing units (opaque results) ----------------------------------------------------------------------------

    @abstractmethod
    def kept(self, where: Tensor | None = None) -> Tensor:
        """Choose the kept units: all, or those with a weight where `where` (bool [nnz], in the order of `values`) is True."""

    @abstractmethod
    def best(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Choose in each group the units with the largest summed `scores` (weight-shaped)."""

    @abstractmethod
    def largest_magnitudes(self, counts: Tensor | int) -> Tensor:
        """Choose among the kept units those with the largest sum of |w|: so many in each group, or (int) in all."""

    @abstractmethod
    def random(self, counts: Tensor, generator: torch.Generator, *, besides: Tensor | None = None) -> Tensor:
        """Choose units uniformly at random, none of them in `besides`."""

    @abstractmethod
    def largest_gradients(self, counts: Tensor | int, *, besides: Tensor | None = None) -> Tensor:
        """Choose the units with the largest sum of |dense gradient|: so many in each group, or (int) in all.

        None of them is in `besides`.

        The method must have asked for this step's dense gradient (`Method.wants_gradient`).
        """

    # --- connections: single weights, by their places in the flattened weight (int64, ascending) -----------------------

    @property
    def is_product(self) -> bool:
        """Whether the weight's gradient is a sum of outer products that can be seen: of a Linear or Conv2d's own weight."""
        return isinstance(self.module, nn.Linear | nn.Conv2d | SparseModule) and not self.target.aliases

    @property
    def has_factors(self) -> bool:
        """Whether finite factors were collected for this step, on any rank; every rank must ask."""
        device = self.target.parameter.device
        overflow = any(not bool(t.isfinite().all()) for part in self._factors.parts for t in part[:2])
        return on_any_rank(bool(self._factors.parts), device) and not on_any_rank(overflow, device)

    def sample_connections(self, draws: int, by: str, generator: torch.Generator) -> Tensor:
        """Draw absent connections with replacement, guided by this step's factors; return the different ones.

        `by` is "uniform", "grabo" or "graest": see `rarefy.engine.factors.draw`. The method must have asked for the
        factors (`Method.wants_factors`).
        """
        groups = int(getattr(self.module, "groups", 1))
        places = draw(self._factors.parts, self.shape, groups, draws, by, generator).to(self.target.parameter.device)
        return places[~self._keeps(places)]

    def absent_connections(self) -> Tensor:
        """Return all connections that are not kept."""
        places = torch.arange(self.numel, device=self.target.parameter.device)
        return places[~self._keeps(places)]

    def gradients_at(self, places: Tensor) -> Tensor:
        """Return the gradient of these connections from this step's factors, averaged over ranks."""
        self.further_gradients += places.numel()
        rows, total = self.shape[0], torch.zeros(places.shape, dtype=self._wide, device=places.device)
        for part in self._factors.parts:
            total += part.at(places, rows, self.numel // rows, self._wide)
        return average(total)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.target.parameter.dtype, torch.float32)

    @abstractmethod
    def _keeps(self, places: Tensor) -> Tensor:
        """Tell which of these connections are kept; bool."""

    @abstractmethod
    def at(self, places: Tensor) -> Tensor:
        """Choose the units at these connections."""

    # --- changing ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def rewire(self, *chosen: Tensor) -> Change:
        """Keep exactly the chosen units.

        A dropped weight becomes 0 and leaves no optimizer state behind; a grown one starts at 0 with fresh state; a weight
        that stays keeps its value and state, also one that was chosen to be dropped and to be grown in the same call.
        """

    @abstractmethod
    def keep(self, mask: Tensor) -> Change:
        """Keep exactly the weights where `mask` (bool, weight-shaped) is True; like `rewire` with a whole mask."""

    @abstractmethod
    def write(self, values: Tensor) -> None:
        """Set the kept weights, in the order of `values`."""

    @abstractmethod
    def scale_outputs(self, factors: Tensor) -> None:
        """Multiply the weights of each output unit (dimension 0) by a factor; float [shape[0]]."""

    # --- called by the engine ---------------------------------------------------------------------------------------

    @abstractmethod
    def share(self) -> None:
        """Keep what rank 0 keeps."""

    @abstractmethod
    def attach(self) -> None:
        """Begin to manage the weight: zero what is not kept, watch its gradients and its loading. Cannot fail."""

    @abstractmethod
    def detach(self) -> None:
        """Stop managing the weight and leave it as it is."""

    def restore(self) -> None:
        """Give the module its dense weight back, where this storage had taken it; called once detached."""
        return

    @abstractmethod
    def after_load(self) -> None:
        """Apply the mask to what `load_state_dict` brought, and remember that until the next step."""

    @abstractmethod
    def enforce(self) -> None:
        """Make the weight exactly zero wherever it is not kept."""

    @abstractmethod
    def after_step(self) -> None:
        """Enforce, and close the sum of gradients: what comes after this optimizer's step is not part of it."""

    @abstractmethod
    def watch_gradient(self, wanted: bool, carry: float | None = 0.0) -> None:
        """Collect the dense gradient of the coming step, or forget what was collected.

        What earlier steps collected goes in `carry` times. None: the step that is under way begins anew.
        """

    @abstractmethod
    def watch_factors(self, wanted: bool) -> None:
        """Collect what the gradient of the coming step is made of, or forget what was collected."""

    @property
    @abstractmethod
    def has_gradient(self) -> bool:
        """Whether a finite dense gradient was collected for this step, on any rank; every rank must ask."""

    @abstractmethod
    def state_dict(self) -> dict[str, object]:
        """Return the topology: plain tensors, numbers and strings."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take over a topology that was checked with `check_state`."""

    @abstractmethod
    def check_state(self, state: object) -> None:
        """Raise StateError when `state` does not fit this layer; changes nothing."""
