"""Masked storage: a dense parameter that is exactly zero outside a boolean mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rarefy import kernels
from rarefy.engine.distributed import active, average, from_first_rank, on_any_rank
from rarefy.engine.factors import watch_module
from rarefy.engine.layer import Change, Layer
from rarefy.engine.loading import AfterLoad
from rarefy.engine.optimizer_state import Optimizers
from rarefy.engine.passes import GradientSum
from rarefy.engine.selection import Target
from rarefy.engine.state import are_bits, check_layer, check_mask
from rarefy.errors import OptionError, PatternError, RarefyError, SelectionError, StateError
from rarefy.kernels.sampling import sample
from rarefy.nn import SparseModule
from rarefy.patterns import Pattern


class MaskedLayer(Layer):
    """A parameter that keeps its name, its shape and its place in the state dict; the mask rides beside it.

    Works on any device and dtype. Choices are bool tensors [groups, units per group].
    """

    def __init__(
        self,
        target: Target,
        pattern: Pattern,
        optimizers: Optimizers,
        *,
        on_change: Callable[[Layer, Change], None],
        on_load: Callable[[Layer, int], None],
    ) -> None:
        super().__init__(target, pattern, optimizers)
        self._mask = torch.ones(self.shape, dtype=torch.bool, device=target.parameter.device)
        self._nnz = self.numel
        self._ever: Tensor | None = None  # union of all masks, made when the mask first changes
        self._on_change = on_change
        self._on_load = on_load
        self._attached = False
        self._handles: list[RemovableHandle] = []
        self._gradient = GradientSum()
        self._end: RemovableHandle | None = None
        # What load_state_dict brought, until the next step, and the weight's version once it was masked.
        self._loaded: tuple[Tensor, int] | None = None

    @classmethod
    def check(cls, model: nn.Module, targets: Sequence[Target], pattern: Pattern, optimizers: Optimizers) -> None:
        for target in targets:
            if isinstance(target.module, SparseModule):
                raise SelectionError(
                    f"{target.name} {list(target.shape)} has kept weights only and no dense one to mask: use "
                    f'storage="compressed", or exclude={target.module_name!r}.'
                )

    # --- what it holds ----------------------------------------------------------------------------------------------

    @property
    def parameter(self) -> nn.Parameter:
        return self.target.parameter

    @property
    def nnz(self) -> int:
        return self._nnz

    def mask(self) -> Tensor:
        return self._mask.clone()

    def weight(self) -> Tensor:
        weight = self.parameter.detach()
        return weight if self._attached or self._nnz == self.numel else weight.masked_fill(~self._here(), 0)

    def newcomers(self, chosen: Tensor) -> Tensor:
        return (chosen & ~self._kept_units()).sum(dim=1)

    def live_weight(self) -> Tensor:
        return self.parameter

    def values(self) -> Tensor:
        return self.parameter.detach()[self._here()]

    def counts(self, *chosen: Tensor) -> Tensor:
        return (_union(*chosen) if chosen else self._kept_units()).sum(dim=1)

    def kept_per_output(self) -> Tensor:
        return self._mask.flatten(1).sum(dim=1)

    def kept_per_input(self) -> Tensor:
        return (
            self._mask.reshape(self.channel_groups, -1, self.shape[1], self.numel // (self.shape[0] * self.shape[1]))
            .sum(dim=(1, 3))
            .reshape(-1)
        )

    def explored(self) -> int:
        return self._nnz if self._ever is None else int(self._ever.sum())

    # --- choosing ---------------------------------------------------------------------------------------------------

    def best(
        self, scores: Tensor, counts: Tensor, *, among: Tensor | None = None, besides: Tensor | None = None
    ) -> Tensor:
        pooled = self.pattern.pool(scores)
        if among is not None:
            pooled = pooled.masked_fill(~among, -math.inf)
        if besides is not None:
            pooled = pooled.masked_fill(besides, -math.inf)
        return self._top(pooled, counts)

    def kept(self, where: Tensor | None = None) -> Tensor:
        if where is None:
            return self._kept_units()
        mask = self._here()
        return self._units(torch.zeros_like(mask).masked_scatter_(mask, where.to(mask.device)))

    def largest_magnitudes(self, counts: Tensor | int) -> Tensor:
        return self._top(self.pattern.pool(self.weight().abs()).masked_fill(~self._kept_units(), -math.inf), counts)

    def largest_gradients(self, counts: Tensor | int, *, besides: Tensor | None = None) -> Tensor:
        scores = self.pattern.pool(self._dense_gradient().abs())
        return self._top(scores if besides is None else scores.masked_fill(besides, -math.inf), counts)

    def _keeps(self, places: Tensor) -> Tensor:
        return self._here().view(-1)[places]

    def at(self, places: Tensor) -> Tensor:
        flat = torch.zeros(self.numel, dtype=torch.bool, device=self._mask.device)
        flat[places.to(flat.device)] = True
        return self._units(flat.view(self.shape))

    def mean_gradient(self) -> float:
        return float(self._dense_gradient()[self._here()].abs().mean(dtype=torch.float64))

    def _dense_gradient(self) -> Tensor:
        gradient = self._gradient.total
        if gradient is None:  # another rank may have seen one
            if not active():
                raise RarefyError(f"{self.name} {list(self.shape)}: no dense gradient was collected for this step.")
            gradient = torch.zeros_like(self.parameter)
        return average(gradient)

    def random(self, counts: Tensor, generator: torch.Generator, *, besides: Tensor | None = None) -> Tensor:
        shape = (self.groups, self.units_per_group)
        device = self._mask.device
        if self.groups > 1 or self.pattern.coupled:  # a count for each group: rank random scores within the groups
            scores = torch.rand(shape, generator=generator).to(device)
            return self._top(scores if besides is None else scores.masked_fill(besides, -math.inf), counts)
        chosen = torch.zeros(shape, dtype=torch.bool, device=device)
        if besides is None:
            chosen[0, sample(self.units_per_group, int(counts), generator).to(device)] = True
        else:
            absent = (~besides[0]).nonzero().squeeze(1)
            chosen[0, absent[sample(absent.numel(), int(counts), generator).to(device)]] = True
        return chosen

    def spread(self, chosen: Tensor) -> Tensor:
        return self.pattern.expand(chosen, self.shape)

    # --- changing ---------------------------------------------------------------------------------------------------

    def rewire(self, *chosen: Tensor) -> Change:
        return self.keep(self.pattern.expand(_union(*chosen), self.shape))

    @torch.no_grad()
    def keep(self, mask: Tensor) -> Change:
        check_mask(self, mask)
        old, taught = self._here(), self._taught()
        mask = mask.to(old.device)
        kept = int(mask.sum())
        dropped = int((old & ~mask).sum()) if self._nnz < self.numel else self.numel - kept
        change = Change(dropped, kept - (self._nnz - dropped))
        if self._attached:
            self._set(mask, kept)
            self._start_afresh(taught ^ self._taught())
        else:
            self._set(mask, kept)
        self._note(change)
        return change

    def _start_afresh(self, changed: Tensor) -> None:
        """Bring a weight that was dropped or grown to where it would be had it never been trained."""
        self.enforce()
        if self.parameter.grad is not None:
            self.parameter.grad.masked_fill_(changed, 0)
        self._optimizers.refresh(self.parameter, changed)

    def _note(self, change: Change) -> None:
        self._on_change(self, change)

    def _set(self, mask: Tensor, kept: int) -> None:
        # A new tensor each time: whoever holds the old mask keeps a true record of it.
        if self._attached and self._ever is None:
            self._ever = self._mask.clone()
        if self._ever is not None:
            self._ever = self._ever.to(mask.device) | mask
        self._mask, self._nnz, self._dead = mask.contiguous(), kept, None

    def reorder(self, move: Callable[[Tensor], None]) -> None:
        mask, ever = self._mask.clone(), None if self._ever is None else self._ever.clone()
        for tensor in (mask, ever, self._gradient.total):
            if tensor is not None:
                move(tensor)
        self._mask, self._ever, self._loaded = mask, ever, None

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        self.parameter.copy_(weight)
        self.enforce()

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        self.parameter.masked_scatter_(self._here(), values.to(self.parameter))

    @torch.no_grad()
    def scale_outputs(self, factors: Tensor) -> None:
        weight = self.parameter
        weight.mul_(factors.to(weight).view(-1, *[1] * (weight.ndim - 1)))

    # --- the life of the weight -------------------------------------------------------------------------------------

    def share(self) -> None:
        shared = from_first_rank(self._mask)
        if not torch.equal(self._mask, shared):
            self.keep(shared)

    @torch.no_grad()
    def attach(self) -> None:
        self._attached = True
        self.enforce()
        self._handles.append(self.module.register_load_state_dict_post_hook(AfterLoad(self)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._attached, self._loaded = False, None
        self._gradient.watch(None)
        self.watch_factors(False)

    @torch.no_grad()
    def enforce(self) -> None:
        self._loaded = None
        if self._nnz < self.numel:
            kernels.apply_mask_(self.parameter, self._here())
        if self._attached:
            self._enforce_bias()
            self._hook_parameter()

    def after_step(self) -> None:
        self.enforce()
        self._gradient.close()
        self._end_factors()

    def _hook_parameter(self) -> None:
        """Watch the parameter that the module holds now: it may have been replaced, swapped, or unfrozen, at any time."""
        parameter = self.parameter
        hooks = parameter._post_accumulate_grad_hooks
        if not parameter.requires_grad or (hooks and any(hook == self._after_backward for hook in hooks.values())):
            return
        self._handles.append(parameter.register_post_accumulate_grad_hook(self._after_backward))
        if self._nnz < self.numel:  # what came before the hook was not masked
            self.mask_gradient()
            self._optimizers.refresh(parameter, ~self._taught())

    @torch.no_grad()
    def _after_backward(self, parameter: Tensor) -> None:
        """Mask the gradient, so that clipping, momentum and mixing optimizers see kept weights only."""
        if parameter.grad is None or parameter is not self.parameter:
            return
        self._gradient.commit()
        self._factors.commit(parameter.grad)
        self.mask_gradient()
        self._gradient.leave(parameter.grad)

    def mask_gradient(self) -> None:
        if self._nnz < self.numel and self.parameter.grad is not None:
            kernels.apply_mask_(self.parameter.grad, self._taught())

    def watch_gradient(self, wanted: bool, carry: float | None = 0.0) -> None:
        self._gradient.watch(self.parameter if wanted else None, carry)

    def watch_factors(self, wanted: bool) -> None:
        self._end_factors()
        self._factors.begin()
        if wanted:
            self._end = watch_module(self.module, self.parameter, self._factors)
        else:
            self._factors.close()

    def _end_factors(self) -> None:
        self._factors.close()
        if self._end is not None:
            self._end.remove()
        self._end = None

    @property
    def has_gradient(self) -> bool:
        # Outside the mask GradScaler does not see an overflow; scores that are not numbers must not decide.
        overflow = on_any_rank(not self._gradient.finite, self._mask.device)
        return on_any_rank(self._gradient.total is not None, self._mask.device) and not overflow

    @torch.no_grad()
    def after_load(self) -> None:
        """Zero what a loaded dense weight holds outside the mask, and remember it until the next step.

        Whichever of the model's and the sparsifier's state is loaded first, nothing is lost: see `load_state_dict`.
        """
        self._loaded = None
        weight = self.parameter
        revived = int(torch.count_nonzero(weight.masked_fill(self._here(), 0)))
        if revived:
            loaded = weight.detach().clone()
            self.enforce()
            self._loaded = (loaded, weight._version)
            self._on_load(self, revived)
        else:
            self._hook_parameter()

    # --- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        return {
            "shape": list(self.shape),
            "pattern": str(self.pattern),
            "mask": kernels.pack_mask(self._mask.cpu()),
            "explored": None if self._ever is None else kernels.pack_mask(self._ever.cpu()),
            "gradient": self._gradient.past,
        }

    def check_state(self, state: object) -> None:
        state = check_layer(self, state, "mask", "explored", "gradient")
        for key in ("mask", "explored"):
            if not are_bits(state[key], self.numel) and not (key == "explored" and state[key] is None):
                raise StateError(
                    f"{self.name} {list(self.shape)}: the saved {key} is not a bit mask of {self.numel} bits."
                )
        gradient = state["gradient"]
        if gradient is not None and (not isinstance(gradient, Tensor) or tuple(gradient.shape) != self.shape):
            raise StateError(f"{self.name} {list(self.shape)}: the saved gradient is not one of this weight.")

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.parameter.device
        mask = kernels.unpack_mask(state["mask"], self.shape).to(device)
        if self._loaded is not None and self._loaded[1] == self.parameter._version:
            self.parameter.copy_(self._loaded[0])  # they came first, and were zeroed by a mask that was not theirs
        self._mask, self._nnz, self._dead = mask, int(mask.sum()), None
        ever = state["explored"]
        self._ever = None if ever is None else kernels.unpack_mask(ever, self.shape).to(device)
        self._gradient.past = None if state["gradient"] is None else state["gradient"].to(device)
        if self._attached:
            self.enforce()

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _here(self) -> Tensor:
        """The mask, on the device that the parameter is on now."""
        device = self.parameter.device
        if self._mask.device != device:
            self._mask = self._mask.to(device)
        return self._mask

    def _taught(self) -> Tensor:
        """Where gradients reach the optimizer, bool."""
        return self._here()

    def _top(self, scores: Tensor, counts: Tensor | int) -> Tensor:
        try:
            if isinstance(counts, int):
                return self.pattern.choose_anywhere(scores, counts)
            return self.pattern.choose(scores, counts)
        except OptionError as error:  # NaN: training has diverged
            raise OptionError(f"{self.name} {list(self.shape)}: {error}; try a lower learning rate") from error
        except PatternError as error:
            raise PatternError(f"{self.name} {list(self.shape)}: {error}.") from error

    def _kept_units(self) -> Tensor:
        return self._units(self._here())

    def _units(self, mask: Tensor) -> Tensor:
        """Return which units hold a weight where the mask is True."""
        if self.pattern.unit_size(self.shape) == 1:
            return self.pattern.pool(mask)
        return self.pattern.pool(mask.float()) > 0


def _union(*chosen: Tensor) -> Tensor:
    units = chosen[0]
    for more in chosen[1:]:
        units = units | more
    return units
