"""Masked storage: a dense parameter that is exactly zero outside a boolean mask."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rarefy import kernels
from rarefy.engine.distributed import active, average, from_first_rank, on_any_rank
from rarefy.engine.layer import Change, Layer
from rarefy.engine.loading import AfterLoad
from rarefy.engine.optimizer_state import Optimizers
from rarefy.engine.selection import Target
from rarefy.errors import OptionError, RarefyError, SelectionError, StateError
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
        self._gradient = _GradientSum()
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

    def kept(self) -> Tensor:
        return self._kept_units()

    def newcomers(self, chosen: Tensor) -> Tensor:
        return (chosen & ~self._kept_units()).sum(dim=1)

    def counts(self, chosen: Tensor | None = None) -> Tensor:
        return (self._kept_units() if chosen is None else chosen).sum(dim=1)

    def kept_per_output(self) -> Tensor:
        return self._mask.flatten(1).sum(dim=1)

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

    def largest_magnitudes(self, counts: Tensor | int) -> Tensor:
        scores = self.pattern.pool(self.weight().abs()).masked_fill(~self._kept_units(), -1)
        if isinstance(counts, int):
            return self._top(scores.reshape(-1), counts).view_as(scores)
        return self._top(scores, counts)

    def largest_gradients(self, counts: Tensor, *, besides: Tensor) -> Tensor:
        gradient = self._gradient.total
        if gradient is None:  # another rank may have seen one
            if not active():
                raise RarefyError(f"{self.name} {list(self.shape)}: no dense gradient was collected for this step.")
            gradient = torch.zeros_like(self.parameter)
        scores = self.pattern.pool(average(gradient).abs())
        return self._top(scores.masked_fill(besides, -1), counts)

    def random(self, counts: Tensor, generator: torch.Generator, *, besides: Tensor | None = None) -> Tensor:
        shape = (self.groups, self.units_per_group)
        device = self._mask.device
        if self.groups > 1:  # a count for each group: rank random scores within the groups
            scores = torch.rand(shape, generator=generator).to(device)
            return self._top(scores if besides is None else scores.masked_fill(besides, -1), counts)
        chosen = torch.zeros(shape, dtype=torch.bool, device=device)
        if besides is None:
            chosen[0, sample(self.units_per_group, int(counts), generator).to(device)] = True
        else:
            absent = (~besides[0]).nonzero().squeeze(1)
            chosen[0, absent[sample(absent.numel(), int(counts), generator).to(device)]] = True
        return chosen

    # --- changing ---------------------------------------------------------------------------------------------------

    def rewire(self, *chosen: Tensor) -> Change:
        units = chosen[0]
        for more in chosen[1:]:
            units = units | more
        return self.keep(self.pattern.expand(units, self.shape))

    @torch.no_grad()
    def keep(self, mask: Tensor) -> Change:
        if tuple(mask.shape) != self.shape or mask.dtype != torch.bool:
            raise StateError(
                f"{self.name}: a mask must be bool {list(self.shape)}, not {mask.dtype} {list(mask.shape)}."
            )
        old = self._here()
        mask = mask.to(old.device)
        kept = int(mask.sum())
        dropped = int((old & ~mask).sum()) if self._nnz < self.numel else self.numel - kept
        change = Change(dropped, kept - (self._nnz - dropped))
        if self._attached:
            changed = old ^ mask
            self._set(mask, kept)
            self._start_afresh(changed)
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
        self._mask, self._nnz = mask.contiguous(), kept

    def reorder(self, move: Callable[[Tensor], None]) -> None:
        mask, ever = self._mask.clone(), None if self._ever is None else self._ever.clone()
        for tensor in (mask, ever, self._gradient.total):
            if tensor is not None:
                move(tensor)
        self._mask, self._ever, self._loaded = mask, ever, None

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

    @torch.no_grad()
    def enforce(self) -> None:
        self._loaded = None
        if self._nnz < self.numel:
            kernels.apply_mask_(self.parameter, self._here())
        if self._attached:
            self._hook_parameter()

    def after_step(self) -> None:
        self.enforce()
        self._gradient.close()

    def _hook_parameter(self) -> None:
        """Watch the parameter that the module holds now: it may have been replaced, swapped, or unfrozen, at any time."""
        parameter = self.parameter
        hooks = parameter._post_accumulate_grad_hooks
        if not parameter.requires_grad or (hooks and any(hook == self._after_backward for hook in hooks.values())):
            return
        self._handles.append(parameter.register_post_accumulate_grad_hook(self._after_backward))
        if self._nnz < self.numel:  # what came before the hook was not masked
            self.mask_gradient()
            self._optimizers.refresh(parameter, ~self._here())

    @torch.no_grad()
    def _after_backward(self, parameter: Tensor) -> None:
        """Mask the gradient, so that clipping, momentum and mixing optimizers see kept weights only."""
        if parameter.grad is None or parameter is not self.parameter:
            return
        self._gradient.commit()
        self.mask_gradient()
        self._gradient.leave(parameter.grad)

    def mask_gradient(self) -> None:
        if self._nnz < self.numel and self.parameter.grad is not None:
            kernels.apply_mask_(self.parameter.grad, self._here())

    def watch_gradient(self, wanted: bool) -> None:
        self._gradient.watch(self.parameter if wanted else None)

    @property
    def has_gradient(self) -> bool:
        total, device = self._gradient.total, self._mask.device
        # Outside the mask GradScaler does not see an overflow; scores that are not numbers must not decide.
        overflow = on_any_rank(total is not None and not bool(torch.isfinite(total).all()), device)
        return on_any_rank(total is not None, device) and not overflow

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
        }

    def check_state(self, state: object) -> None:
        if not isinstance(state, dict) or not {"shape", "pattern", "mask", "explored"} <= state.keys():
            raise StateError(f"{self.name}: the saved state of this layer is incomplete.")
        for key, mine in (("shape", list(self.shape)), ("pattern", str(self.pattern))):
            if state[key] != mine:
                raise StateError(f"{self.name}: the saved {key} is {state[key]!r}, this model's is {mine!r}.")
        for key in ("mask", "explored"):
            bits: Any = state[key]
            if bits is None and key == "explored":
                continue
            if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-self.numel // 8),):
                raise StateError(
                    f"{self.name} {list(self.shape)}: the saved {key} is not a bit mask of {self.numel} bits."
                )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.parameter.device
        mask = kernels.unpack_mask(state["mask"], self.shape).to(device)
        if self._loaded is not None and self._loaded[1] == self.parameter._version:
            self.parameter.copy_(
                self._loaded[0]
            )  # the weights came first, and were zeroed by a mask that was not theirs
        self._mask, self._nnz = mask, int(mask.sum())
        ever = state["explored"]
        self._ever = None if ever is None else kernels.unpack_mask(ever, self.shape).to(device)
        if self._attached:
            self.enforce()

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _here(self) -> Tensor:
        """The mask, on the device that the parameter is on now."""
        device = self.parameter.device
        if self._mask.device != device:
            self._mask = self._mask.to(device)
        return self._mask

    def _top(self, scores: Tensor, counts: Tensor | int) -> Tensor:
        try:
            return kernels.select_k(scores, counts)
        except OptionError as error:  # NaN: training has diverged
            raise OptionError(f"{self.name} {list(self.shape)}: {error}; try a lower learning rate") from error

    def _kept_units(self) -> Tensor:
        mask = self._here()
        if self.pattern.unit_size(self.shape) == 1:
            return self.pattern.pool(mask)
        return self.pattern.pool(mask.float()) > 0


class _GradientSum:
    """The dense gradient of one optimizer step, summed over its backward passes as `.grad` itself is.

    A tensor hook sees each pass's own gradient before it is accumulated (and masked); the sum takes it in once the pass
    has been accumulated, so that `torch.autograd.grad` leaves no trace. It begins anew when `.grad` was dropped or zeroed.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self._handle: RemovableHandle | None = None
        self._pass: tuple[Tensor, bool] | None = None
        self._left_zero = False

    def watch(self, parameter: nn.Parameter | None) -> None:
        """Begin a new sum for this parameter; None: forget it."""
        self.close()
        self.total, self._left_zero = None, False
        if parameter is not None and parameter.requires_grad:
            weak = weakref.ref(parameter)
            self._handle = parameter.register_hook(lambda gradient: self._see(gradient, weak()))

    def close(self) -> None:
        """Take in nothing more."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._pass = None, None

    def _see(self, gradient: Tensor, parameter: Tensor | None) -> None:
        old = None if parameter is None else parameter.grad
        self._pass = (gradient.detach(), old is None or (not self._left_zero and not bool(old.any())))

    def commit(self) -> None:
        """Take in the pass that was seen last."""
        if self._pass is not None:
            gradient, anew = self._pass
            self.total = gradient.clone() if anew or self.total is None else self.total.add_(gradient)
            self._pass = None

    def leave(self, grad: Tensor) -> None:
        """Remember whether the masked sum is zero by itself, and not because it was zeroed."""
        if self._handle is not None:
            self._left_zero = not bool(grad.any())
