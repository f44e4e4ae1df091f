"""The storage interface: one sparse weight, as methods see it.

A method never touches a parameter or a mask. It asks a layer to choose units (the weights that live and die together,
see `rarefy.patterns`), and tells it to keep them. What it gets back from a choice is opaque: hand it back, nothing else.
So the same method runs on masked storage and on any other storage that implements this interface.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rarefy.engine.optimizer_state import Optimizers
from rarefy.engine.selection import Target
from rarefy.errors import OptionError
from rarefy.nn import SparseConv2d
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
        self.owns_bias = False  # set by the engine: an output unit's bias lives and dies with its weights
        self._dead: Tensor | None = None  # output units that keep nothing, where that is known

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

    # --- the bias of a unit -----------------------------------------------------------------------------------------

    @property
    def bias(self) -> nn.Parameter | None:
        """The module's bias, one for each output unit, where the layer owns it."""
        bias = getattr(self.module, "bias", None) if self.owns_bias and self.target.attribute == "weight" else None
        return bias if isinstance(bias, nn.Parameter) and tuple(bias.shape) == self.shape[:1] else None

    def grouped(self) -> Tensor:
        """Return the weight, or where the layer owns its bias [outputs, weights + 1]: each row with its bias at the end.

        The pattern's units are those of the weight either way. Detached; not for writing.
        """
        bias = self.bias
        return self.weight() if bias is None else torch.cat([self.weight().flatten(1), bias.detach()[:, None]], dim=1)

    def set_grouped(self, grouped: Tensor) -> None:
        """Give weight and bias the values of what `grouped` returned; what is not kept stays zero."""
        bias = self.bias
        if bias is None:
            return self.set_weight(grouped)
        with torch.no_grad():
            bias.copy_(grouped[:, -1])
        return self.set_weight(grouped[:, :-1].reshape(self.shape))

    @torch.no_grad()
    def _enforce_bias(self, *, afresh: bool = False) -> None:
        """Zero the biases of output units that keep nothing; `afresh`, when the mask has changed, their optimizer state too."""
        bias = self.bias
        if bias is None or self.nnz == self.numel:
            return
        if self._dead is None:
            self._dead = self.kept_per_output() == 0
        dead = self._dead.to(bias.device)
        bias.masked_fill_(dead, 0)
        if afresh:
            self._optimizers.refresh(bias, dead)

    # --- what it holds ----------------------------------------------------------------------------------------------

    @abstractmethod
    def mask(self) -> Tensor:
        """Return a bool copy of the mask, in the weight's shape; True = kept."""

    @abstractmethod
    def weight(self) -> Tensor:
        """Return the weight as a dense tensor, detached, zero where it is not kept. Not for writing."""

    @abstractmethod
    def counts(self, chosen: Tensor | None = None) -> Tensor:
        """Return how many units each group keeps, or has among the chosen ones; int64 [groups]."""

    @abstractmethod
    def kept_per_output(self) -> Tensor:
        """Return how many weights each output unit (dimension 0) keeps; int64 [shape[0]]."""

    @property
    def channel_groups(self) -> int:
        """Groups of a grouped convolution, each of which reads its own inputs; 1 for any other layer."""
        return int(self.module.groups) if isinstance(self.module, nn.modules.conv._ConvNd | SparseConv2d) else 1

    @abstractmethod
    def kept_per_input(self) -> Tensor:
        """Return how many weights read each input (dimension 1, of each channel group); int64 [groups * shape[1]]."""

    @abstractmethod
    def explored(self) -> int:
        """Return how many weights have been kept at any time so far."""

    @abstractmethod
    def live_weight(self) -> Tensor:
        """Return the weight as a dense tensor that gradients flow through to what is trained."""

    def step_size(self) -> float | Tensor | None:
        """Return how far the optimizer goes along a constant gradient in a step: a number, or in the shape of `grouped`.

        None where no optimizer holds the weight. See `rarefy.engine.step_size`.
        """
        step, bias = self._weight_step(), self.bias
        other = None if bias is None or bias.grad is None else self._optimizers.step_size(bias)
        if step is None or bias is None:
            return step
        if isinstance(step, float) and (other is None or (isinstance(other, float) and other == step)):
            return step
        rows = torch.as_tensor(step, device=bias.device).expand(self.shape).flatten(1)
        column = rows.mean(1) if other is None else torch.as_tensor(other, device=bias.device).expand(bias.shape)
        return torch.cat([rows, column[:, None].to(rows.dtype)], dim=1)

    def _weight_step(self) -> float | Tensor | None:
        return self._optimizers.step_size(self.target.parameter)

    # --- choosing units (opaque results) ----------------------------------------------------------------------------

    @abstractmethod
    def best(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Choose in each group the units with the largest summed `scores` (weight-shaped)."""

    @abstractmethod
    def holding(self, positions: Tensor) -> Tensor:
        """Choose the units that hold the weights at these flat positions; int64, in any order, repeats allowed."""

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

    @abstractmethod
    def spread(self, chosen: Tensor) -> Tensor:
        """Return where the chosen units' weights are: bool, weight-shaped."""

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
    def set_weight(self, weight: Tensor) -> None:
        """Give the kept weights the values of a dense weight (weight-shaped); the others stay zero."""

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
