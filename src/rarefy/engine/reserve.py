"""Layers that remember what they drop: every weight has a value, few are used, and some of the others are trained too.

The forward pass, the state dict and `mask()` see the kept weights only. The values of all others lie in a store outside
the parameter: one dense tensor, without gradient or optimizer state. While the optimizer steps, the trained ones among
them stand in the parameter beside the kept ones, so that any optimizer moves them as its own; a closure that it calls
sees the kept ones alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy import kernels
from rarefy.engine.compressed import CompressedLayer
from rarefy.engine.distributed import active, check_length, from_first_rank
from rarefy.engine.layer import Change, Layer
from rarefy.engine.masked import MaskedLayer
from rarefy.engine.optimizer_state import Optimizers
from rarefy.engine.selection import Target
from rarefy.engine.state import are_bits, are_positions
from rarefy.errors import SelectionError, StateError
from rarefy.nn import SparseModule
from rarefy.nn.topology import Move, union
from rarefy.patterns import Pattern


class ReservingLayer(Layer):
    """What a method can do with such a layer, beside what it can do with any."""

    _store: Tensor | None = None  # all values that are not kept; None before the layer is attached
    _shown = False

    @abstractmethod
    def theta(self) -> Tensor:
        """Return every weight's value as a dense tensor, kept or not; detached."""

    @abstractmethod
    def rewire_within(self, kept: Tensor, trained: Tensor) -> Change:
        """Keep exactly the units `kept`, and train exactly those of `trained`, which holds them too.

        All others keep their values. Optimizer state follows `trained`: what leaves it leaves no state behind.
        """

    @abstractmethod
    def resting_values(self) -> Tensor:
        """Return a copy of the weights that are trained and not kept, in the order of their places."""

    @abstractmethod
    def write_resting(self, values: Tensor) -> None:
        """Set the weights that are trained and not kept, in the order of `resting_values`."""

    @abstractmethod
    def show(self) -> None:
        """Put the resting weights into the parameter, for the optimizer to move."""

    @abstractmethod
    def hide(self) -> None:
        """Take the resting weights out of the parameter again."""


def reserving(layers: Mapping[str, Layer]) -> dict[str, ReservingLayer]:
    """Return the layers as what they are: see `Method.reserves`."""
    found = {name: layer for name, layer in layers.items() if isinstance(layer, ReservingLayer)}
    assert len(found) == len(layers)
    return found


def show(layers: Sequence[Layer], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Do what comes before an optimizer's step(*args, **kwargs): show the reserve, and hide it from a closure.

    args[0] is the optimizer, as torch's hooks have it.
    """
    mine = [layer for layer in layers if isinstance(layer, ReservingLayer)]
    for layer in mine:
        layer.show()
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return None

    def without_reserve() -> Any:
        for layer in mine:
            layer.hide()
        loss = closure()
        for layer in mine:
            layer.show()
        return loss

    if len(args) > 1:
        return (args[0], without_reserve, *args[2:]), kwargs
    return args, kwargs | {"closure": without_reserve}


class ReservingMaskedLayer(MaskedLayer, ReservingLayer):
    """A masked parameter, and a store of its shape."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trained = self._mask
        self._coming: Tensor | None = None

    def _taught(self) -> Tensor:
        self._trained = self._trained.to(self.parameter.device)
        return self._trained

    def _resting(self) -> Tensor:
        return self._taught() & ~self._here()

    def theta(self) -> Tensor:
        weight = self.parameter.detach()
        return weight if self._store is None else torch.where(self._here(), weight, self._store)

    @torch.no_grad()
    def rewire_within(self, kept: Tensor, trained: Tensor) -> Change:
        mask = self.pattern.expand(kept, self.shape)
        self._coming = self.pattern.expand(trained, self.shape) | mask
        if self._store is not None:
            whole = self.theta()
            self.parameter.copy_(whole)
            self._store = whole.masked_fill(mask, 0)
        return self.keep(mask)

    def _set(self, mask: Tensor, kept: int) -> None:
        super()._set(mask, kept)
        self._trained, self._coming = self._mask if self._coming is None else self._coming, None
        self.resting = int(self._trained.sum()) - kept

    def resting_values(self) -> Tensor:
        return self.theta()[self._resting()]

    def write_resting(self, values: Tensor) -> None:
        assert self._store is not None
        self._store.masked_scatter_(self._resting(), values.to(self._store))

    def scale_outputs(self, factors: Tensor) -> None:
        super().scale_outputs(factors)
        assert self._store is not None
        self._store.mul_(factors.to(self._store).view(-1, *[1] * (self._store.ndim - 1)))

    def share(self) -> None:
        if active():
            self._coming = from_first_rank(self._trained)
            self.keep(from_first_rank(self._mask))

    def attach(self) -> None:
        self._store = from_first_rank(self.parameter.detach()).masked_fill(self._here(), 0)
        super().attach()

    @torch.no_grad()
    def show(self) -> None:
        if not self._shown and self._store is not None:
            self._store = self._store.to(self.parameter.device)
            self.parameter.copy_(torch.where(self._resting(), self._store, self.parameter))
            self._shown = True

    @torch.no_grad()
    def hide(self) -> None:
        if self._shown and self._store is not None:
            self._store = torch.where(self._resting(), self.parameter, self._store)
            self.parameter.masked_fill_(~self._here(), 0)
            self._shown = False

    @torch.no_grad()
    def after_step(self) -> None:
        if not self._shown and self._store is not None:  # a loop without a torch optimizer: they moved from 0
            self._store = torch.where(self._resting(), self._store + self.parameter, self._store)
        self.hide()
        super().after_step()

    def state_dict(self) -> dict[str, object]:
        assert self._store is not None
        more = {"trained": kernels.pack_mask(self._trained.cpu()), "store": self._store.clone()}
        return super().state_dict() | more

    def check_state(self, state: object) -> None:
        super().check_state(state)
        assert isinstance(state, dict)
        if not are_bits(state.get("trained"), self.numel) or not _is_store(state.get("store"), self.shape):
            raise StateError(
                f"{self.name} {list(self.shape)}: the saved weights that are not kept are not of this weight."
            )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.parameter.device
        self._trained = kernels.unpack_mask(state["trained"], self.shape).to(device)
        self._store = state["store"].to(self.parameter).clone()
        super().load_state_dict(state)
        self.resting = int(self._trained.sum()) - self._nnz
        if self._attached and self.parameter.grad is not None:
            kernels.apply_mask_(self.parameter.grad, self._taught())


class ReservingCompressedLayer(CompressedLayer, ReservingLayer):
    """A sparse module that holds the trained weights, zeros where they rest, and a dense store of all values."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._used: Tensor | None = None  # which of the held weights are kept; None: all

    @classmethod
    def check(cls, model: nn.Module, targets: Sequence[Target], pattern: Pattern, optimizers: Optimizers) -> None:
        super().check(model, targets, pattern, optimizers)
        if given := [t for t in targets if isinstance(t.module, SparseModule)]:
            names = ", ".join(f"{t.name} {list(t.shape)}" for t in given)
            raise SelectionError(
                f"These have kept weights only, and the method needs the values of all: {names}. Begin with dense layers, "
                f"or exclude={[t.module_name for t in given]}."
            )

    @property
    def nnz(self) -> int:
        return super().nnz if self._used is None else int(self._used.sum())

    def _kept(self) -> Tensor:
        held = self._held()
        return held if self._used is None else held[self._used.to(held.device)]

    def _values(self) -> Tensor:
        found = super()._values()
        inside = isinstance(self.module, SparseModule) and self._chosen is None and self._used is not None
        return found[self._used] if inside else found

    def _rests(self) -> Tensor:
        """Return which of the held weights are not kept."""
        return torch.zeros(len(self._held()), dtype=torch.bool) if self._used is None else ~self._used

    def theta(self) -> Tensor:
        if self._store is None:
            return self.target.parameter.detach().view(self.shape)
        return self._store.index_copy(0, self._kept(), self._values()).view(self.shape)

    @torch.no_grad()
    def rewire_within(self, kept: Tensor, trained: Tensor) -> Change:
        before, held = self._kept(), union(trained, kept)
        change = Move(before, kept)
        used = _members(held, kept)
        if self._store is None:
            self._chosen = held
        else:
            whole, old = self.theta().view(-1), self._held().numel()
            check_length(self.name, old, held.numel())
            move = self._sparse.rewire_(held)
            self._optimizers.follow(self._sparse.values, old, move.carry)
            self._sparse.values.copy_(whole[held] * used)
            self._store = whole.index_fill(0, kept, 0)
            self._ever = union(before if self._ever is None else self._ever.to(kept.device), kept)
            self._known = held.numel()
        self._used = used
        self.resting = held.numel() - kept.numel()
        done = Change(change.dropped, change.grown)
        self._on_change(self, done)
        return done

    def _keep(self, new: Tensor) -> Change:
        return self.rewire_within(new, new)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        self._sparse.values[~self._rests()] = values.to(self._sparse.values)

    def resting_values(self) -> Tensor:
        return self.theta().view(-1)[self._held()[self._rests()]]

    def write_resting(self, values: Tensor) -> None:
        assert self._store is not None
        self._store[self._held()[self._rests()]] = values.to(self._store)

    @torch.no_grad()
    def scale_outputs(self, factors: Tensor) -> None:
        super().scale_outputs(factors)
        assert self._store is not None
        self._store.view(self.shape[0], -1).mul_(factors.to(self._store)[:, None])

    def share(self) -> None:
        if active():
            self.rewire_within(self._from_first(self._kept()), self._from_first(self._held()))

    @torch.no_grad()
    def attach(self) -> None:
        whole = from_first_rank(self.target.parameter.detach().reshape(-1)).clone()
        super().attach()
        self._sparse.values.masked_fill_(self._rests(), 0)
        self._store = whole.index_fill(0, self._kept(), 0)

    @torch.no_grad()
    def detach(self) -> None:
        super().detach()
        if self._used is not None and isinstance(
            self.module, SparseModule
        ):  # the resting weights are not the network's
            old = self._held().numel()
            move = self._sparse.rewire_(self._kept())
            self._optimizers.follow(self._sparse.values, old, move.carry)
            self._used, self.resting = None, 0

    @torch.no_grad()
    def show(self) -> None:
        if not self._shown and self._store is not None:
            rests = self._rests()
            self._sparse.values[rests] = self._store[self._held()[rests]]
            self._shown = True

    @torch.no_grad()
    def hide(self) -> None:
        if self._shown and self._store is not None:
            rests = self._rests()
            self._store[self._held()[rests]] = self._sparse.values[rests]
            self._sparse.values.masked_fill_(rests, 0)
            self._shown = False

    @torch.no_grad()
    def after_step(self) -> None:
        if not self._shown and self._store is not None:  # a loop without a torch optimizer: they moved from 0
            rests = self._rests()
            self._store[self._held()[rests]] += self._sparse.values[rests]
            self._sparse.values.masked_fill_(rests, 0)
        self.hide()
        super().after_step()

    def after_load(self) -> None:
        super().after_load()
        values = self._sparse.values.detach()
        if self._used is not None and (self._used.shape != values.shape or bool(values[~self._used].any())):
            self._used = values != 0  # the sparsifier's own state says it better, where it is loaded too

    def _saved_positions(self, state: dict[str, Any]) -> Tensor:
        trained: Tensor = state["trained"]
        return trained

    def state_dict(self) -> dict[str, object]:
        assert self._store is not None
        return super().state_dict() | {"trained": self._held().cpu(), "store": self._store.clone()}

    def check_state(self, state: object) -> None:
        super().check_state(state)
        assert isinstance(state, dict)
        if not are_positions(state.get("trained"), self.numel) or not _is_store(state.get("store"), (self.numel,)):
            raise StateError(
                f"{self.name} {list(self.shape)}: the saved weights that are not kept are not of this weight."
            )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        held, kept = self._held(), super()._saved_positions(state).to(self.target.parameter.device)
        self._used, self.resting = _members(held, kept), held.numel() - kept.numel()
        self._store = state["store"].to(self.target.parameter).clone()


def _members(held: Tensor, kept: Tensor) -> Tensor:
    """Tell which of the ascending places `held` are among `kept`; bool."""
    return torch.isin(held, kept, assume_unique=True)


def _is_store(store: object, shape: tuple[int, ...]) -> bool:
    return isinstance(store, Tensor) and store.is_floating_point() and tuple(store.shape) == tuple(shape)


RESERVING: dict[str, type[ReservingMaskedLayer] | type[ReservingCompressedLayer]] = {
    "masked": ReservingMaskedLayer,
    "compressed": ReservingCompressedLayer,
}
