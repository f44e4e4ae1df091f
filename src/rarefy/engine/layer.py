"""The storage interface: one sparse weight, as methods see it.

A method never touches a parameter or a mask. It asks a layer to choose units (the weights that live and die together,
see `rarefy.patterns`), and tells it to keep them. What it gets back from a choice is opaque: hand it back, nothing else.
So the same method runs on masked storage and on any other storage that implements this interface.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rarefy.engine.optimizer_state import Optimizers
from rarefy.engine.selection import Target
from rarefy.errors import OptionError
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

    def trained(self) -> Tensor:
        """Return the tensor that training moves, detached: the weight, unless another is computed from it. Not for writing."""
        return self.weight()

    @property
    def extras(self) -> Mapping[str, nn.Parameter]:
        """The parameters that are trained beside the weight, by name (see `Method.reparametrise`)."""
        return {}

    @abstractmethod
    def kept(self) -> Tensor:
        """Return the kept units as a choice."""

    @abstractmethod
    def newcomers(self, chosen: Tensor) -> Tensor:
        """Return how many of the chosen units each group does not keep now; int64 [groups]."""

    @abstractmethod
    def counts(self, chosen: Tensor | None = None) -> Tensor:
        """Return how many units each group keeps, or has among the chosen ones; int64 [groups]."""

    @abstractmethod
    def kept_per_output(self) -> Tensor:
        """Return how many weights each output unit (dimension 0) keeps; int64 [shape[0]]."""

    @abstractmethod
    def explored(self) -> int:
        """Return how many weights have been kept at any time so far."""

    # --- choosing units (opaque results) ----------------------------------------------------------------------------

    @abstractmethod
    def best(
        self, scores: Tensor, counts: Tensor, *, among: Tensor | None = None, besides: Tensor | None = None
    ) -> Tensor:
        """Choose in each group the units with the largest summed `scores` (weight-shaped).

        Only units in the choice `among`, where given, and none in `besides`; there must be enough of them.
        """

    @abstractmethod
    def largest_magnitudes(self, counts: Tensor | int) -> Tensor:
        """Choose among the kept units those with the largest sum of |w|: so many in each group, or (int) in all."""

    @abstractmethod
    def random(self, counts: Tensor, generator: torch.Generator, *, besides: Tensor | None = None) -> Tensor:
        """Choose units uniformly at random, none of them in `besides`."""

    @abstractmethod
    def largest_gradients(self, counts: Tensor, *, besides: Tensor) -> Tensor:
        """Choose the units with the largest sum of |dense gradient|, none of them in `besides`.

        The method must have asked for this step's dense gradient (`Method.wants_gradient`).
        """

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

    def reorder(self, move: Callable[[Tensor], None]) -> None:
        """Follow channels that changed places in the weight: `move` does the same, in place, to a tensor of its shape."""
        raise OptionError(f"{self.name} {list(self.shape)}: this storage cannot follow channels that change places.")

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

    def restore(self, compressed: bool) -> None:
        """Give the module a plain weight, where this storage had taken it; called once detached.

        With `compressed`, kept values that are a module's own parameter stay so.
        """
        return

    def refresh(self) -> None:
        """Take note of what is kept now, where that follows from tensors that are trained; called after every step."""
        return

    def report(self) -> None:
        """Log the changes that were too many to log one by one."""
        return

    def mask_gradient(self) -> None:
        """Drop what was added to `.grad` outside the mask."""
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
    def watch_gradient(self, wanted: bool) -> None:
        """Collect the dense gradient of the coming step, or forget what was collected."""

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
