"""A dense weight that stays dense while it is trained; the network computes with another one, made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rarefy.engine.layer import Change, Layer
from rarefy.engine.loading import AfterLoad
from rarefy.engine.masked import MaskedLayer
from rarefy.engine.method import Method
from rarefy.engine.optimizer_state import Optimizers
from rarefy.engine.selection import Target
from rarefy.errors import OptionError, SelectionError, StateError
from rarefy.nn import Reparametrisation
from rarefy.nn.reparametrisation import accept_plain_weight, install, remove, set_forward
from rarefy.patterns import Pattern


class ReparametrisedLayer(MaskedLayer):
    """A layer whose forward weight a `Reparametrisation` computes from the trained one.

    Choices are those of masked storage. The trained weight, its gradient and its optimizer state are dense and left alone:
    what is dropped keeps its value and may come back with it. `detach()` leaves the trained weight, `finalize()` the
    forward one.
    """

    def __init__(
        self,
        target: Target,
        pattern: Pattern,
        optimizers: Optimizers,
        computes: Reparametrisation,
        *,
        on_change: Callable[[Layer, Change], None],
        on_load: Callable[[Layer, int], None],
    ) -> None:
        super().__init__(target, pattern, optimizers, on_change=on_change, on_load=on_load)
        self._computes = computes
        self._seen: list[tuple[int, int]] = []
        self._untold = Change(0, 0)  # a mask that moves at every step would fill the log
        if computes.follows:
            self._look()  # weights that no mask can be found for are refused before anything is changed
        if optimizers.all:
            for name, extra in self.extras.items():
                optimizers.check_join(extra, target.parameter, self._full_name(name))

    @classmethod
    def check(cls, model: nn.Module, targets: Sequence[Target], pattern: Pattern, optimizers: Optimizers) -> None:
        super().check(model, targets, pattern, optimizers)
        for target in targets:
            if target.aliases:
                raise SelectionError(
                    f"{target.name} {list(target.shape)} is tied ({', '.join(target.aliases)}): a weight that is computed "
                    f"cannot be another layer's too. Untie it, or exclude={target.module_name!r}."
                )
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise OptionError(
                "This method computes weights from what it trains, which DistributedDataParallel must see: call sparsify() on "
                "the model before wrapping it."
            )

    @staticmethod
    def made_for(
        method: Method, targets: Sequence[Target], storage: str, optimizers: Optimizers, resumed: bool
    ) -> dict[str, Reparametrisation]:
        """Return what computes the weights of these targets, where the method says so; checks, and changes nothing."""
        found = {t.name: made for t in targets if (made := method.reparametrise(t.parameter)) is not None}
        if found and storage != "masked":
            raise OptionError(
                f"{method.name} trains dense weights and computes sparse ones from them: storage={storage!r} has no "
                'dense weights; use storage="masked".'
            )
        if not optimizers.all and not resumed and any(True for made in found.values() for _ in made.parameters()):
            raise OptionError(
                f"{method.name} trains parameters of its own beside the weights: pass optimizer=..., the one that is made "
                "already; they join it."
            )
        return found

    # --- what it holds ----------------------------------------------------------------------------------------------

    @property
    def extras(self) -> Mapping[str, nn.Parameter]:
        return dict(self._computes.named_parameters())

    @property
    def settings(self) -> Mapping[str, Tensor]:
        return {name: buffer for name, buffer in self._computes.named_buffers() if name != "mask"}

    def trained(self) -> Tensor:
        return self.parameter.detach()

    @torch.no_grad()
    def weight(self) -> Tensor:
        return self._computes(self.parameter) if self._attached else super().weight()

    # --- changing ---------------------------------------------------------------------------------------------------

    def _set(self, mask: Tensor, kept: int) -> None:
        if not self._computes.follows:
            self._computes.keep(mask)
        super()._set(mask, kept)

    def _start_afresh(self, changed: Tensor) -> None:
        pass

    def _note(self, change: Change) -> None:
        if self._attached:
            self._untold = Change(self._untold.dropped + change.dropped, self._untold.grown + change.grown)
        else:
            super()._note(change)

    def report(self) -> None:
        if any(self._untold):
            self._on_change(self, self._untold)
            self._untold = Change(0, 0)

    def share(self) -> None:
        if not self._computes.follows:  # else it follows from weights, which DistributedDataParallel shares
            super().share()

    def after_step(self) -> None:
        self._seen = []  # an optimizer may write past the version counter
        super().after_step()

    def refresh(self) -> None:
        if self._computes.follows and self._seen != self._versions():
            mask = self._follow()
            if not torch.equal(mask, self._here()):
                super().keep(mask)

    def keep(self, mask: Tensor) -> Change:
        if self._computes.follows:
            self._computes.keep(mask)  # says why not
        return super().keep(mask)

    # --- the life of the weight -------------------------------------------------------------------------------------

    @torch.no_grad()
    def attach(self) -> None:
        self._attached = True
        install(self.module, self.target.attribute, self._computes)
        for name, extra in self.extras.items():
            self._optimizers.join(extra, self.parameter, self._full_name(name))
        self._handles.append(self.module.register_load_state_dict_pre_hook(accept_plain_weight))
        self._handles.append(self.module.register_load_state_dict_post_hook(AfterLoad(self)))
        self._look()
        self._hook_parameter()

    def detach(self) -> None:
        if self._attached:
            for extra in self.extras.values():
                self._optimizers.leave(extra)
            remove(self.module, self.target.attribute)
        super().detach()

    @torch.no_grad()
    def restore(self, compressed: bool) -> None:
        mask = set_forward(self.parameter, self._computes)
        self._mask, self._nnz = mask, int(mask.sum())
        if self.parameter.grad is not None:
            self.parameter.grad.masked_fill_(~mask, 0)
        self._optimizers.refresh(self.parameter, ~mask)

    def enforce(self) -> None:
        if self._attached:
            self._hook_parameter()

    def mask_gradient(self) -> None:
        pass

    def reorder(self, move: Callable[[Tensor], None]) -> None:
        Layer.reorder(self, move)  # what is trained beside the weight could not follow

    def _hook_parameter(self) -> None:
        parameter = self.parameter
        hooks = parameter._post_accumulate_grad_hooks
        if parameter.requires_grad and not (hooks and any(hook == self._after_backward for hook in hooks.values())):
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._after_backward))

    def _full_name(self, extra: str) -> str:
        return f"{self.target.inside}0.{extra}"

    # --- saving -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_load(self) -> None:
        self._look()
        self._hook_parameter()

    def _look(self) -> None:
        """Take over what the reparametrisation keeps, without a word in the log."""
        self._mask = self._follow()
        self._nnz = int(self._mask.sum())

    def _versions(self) -> list[tuple[int, int]]:
        """Tell the tensors that the mask follows from, and their values, from what they were and held before."""
        return [(id(t), t._version) for t in (self.parameter, *self.extras.values(), *self.settings.values())]

    def _follow(self) -> Tensor:
        versions = self._versions()
        try:
            mask = self._computes.kept(self.parameter)
        except OptionError as error:  # NaN
            raise OptionError(f"{self.name} {list(self.shape)}: {error}") from error
        self._seen = versions
        return mask

    def state_dict(self) -> dict[str, object]:
        extras = {name: extra.detach().clone() for name, extra in self.extras.items()}
        settings = {name: value.clone() for name, value in self.settings.items()}
        return {**super().state_dict(), "extras": extras, "settings": settings, "untold": list(self._untold)}

    def check_state(self, state: object) -> None:
        super().check_state(state)
        assert isinstance(state, dict)
        untold = state.get("untold")
        if not isinstance(untold, list) or [type(count) for count in untold] != [int, int]:
            raise StateError(f"{self.name}: the saved state of this layer is incomplete.")
        for part, mine in (("extras", self.extras), ("settings", self.settings)):
            saved = state.get(part)
            if not isinstance(saved, dict) or saved.keys() != mine.keys():
                raise StateError(f"{self.name}: the saved state of this layer is incomplete.")
            for name, tensor in mine.items():
                if not isinstance(saved[name], Tensor) or saved[name].shape != tensor.shape:
                    raise StateError(f"{self.name}: the saved {name} is not a tensor {list(tensor.shape)}.")

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, mine in (("extras", self.extras), ("settings", self.settings)):
            for name, tensor in mine.items():
                tensor.copy_(state[part][name])
        super().load_state_dict(state)
        if not self._computes.follows:
            self._computes.keep(self._mask)
        self._untold = Change(*state["untold"])
