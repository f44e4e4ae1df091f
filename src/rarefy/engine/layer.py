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

from rarefy.engine.distributed import average, on_any_rank
from rarefy.engine.factors import Factors, draw
from rarefy.engine.optimizer_state import Optimizers
from rarefy.engine.passes import Passes
from rarefy.engine.selection import Target
from rarefy.errors import OptionError
from rarefy.nn import SparseConv2d, SparseModule
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

    def trained(self) -> Tensor:
        """Return the tensor that training moves, detached: the weight, unless another is computed from it. Not for writing."""
        return self.weight()

    @property
    def extras(self) -> Mapping[str, nn.Parameter]:
        """The parameters that are trained beside the weight, by name (see `Method.reparametrise`)."""
        return {}

    @property
    def settings(self) -> Mapping[str, Tensor]:
        """The numbers that the forward weight is computed with beside what is trained, by name: a method sets them in place.

        They are part of the saved state. After a change that moves the mask, call `refresh`.
        """
        return {}

    @abstractmethod
    def newcomers(self, chosen: Tensor) -> Tensor:
        """Return how many of the chosen units each group does not keep now; int64 [groups]."""

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

    @property
    def channel_groups(self) -> int:
        """Groups of a grouped convolution, each of which reads its own inputs; 1 for any other layer."""
        return int(self.module.groups) if isinstance(self.module, nn.modules.conv._ConvNd | SparseConv2d) else 1

    @abstractmethod
    def kept_per_input(self) -> Tensor:
        """Return how many weights read each input (dimension 1, of each channel group); int64 [groups * shape[1]]."""

    @abstractmethod
    def mean_gradient(self) -> float:
        """Return the mean |dense gradient| of the kept weights; as `largest_gradients`, of what was collected."""

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
    @abstractmethod
    def kept(self, where: Tensor | None = None) -> Tensor:
        """Choose the kept units: all, or those with a weight where `where` (bool [nnz], in the order of `values`) is True."""

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
    def largest_gradients(self, counts: Tensor | int, *, besides: Tensor | None = None) -> Tensor:
        """Choose the units with the largest sum of |dense gradient|: so many in each group, or (int) in all.

        None of them is in `besides`.

        The method must have asked for this step's dense gradient (`Method.wants_gradient`).
        """

    @abstractmethod
    def spread(self, chosen: Tensor) -> Tensor:
        """Return where the chosen units' weights are: bool, weight-shaped."""

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
        """Choose the units that hold these connections, which may come in any order and repeat."""

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

    def restore(self, compressed: bool) -> None:
        """Give the module a plain weight, where this storage had taken it; called once detached.

        With `compressed`, kept values that are a module's own parameter stay so.
        """
        return

    def refresh(self) -> None:
        """Take note of what is kept now, where that follows from tensors that are trained; called around every step."""
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
