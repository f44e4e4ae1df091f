"""What a method does beside the masks: a penalty that joins the loss, and a network whose own weights stand still."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.engine.optimizer_state import inside_another_step

if TYPE_CHECKING:
    from rarefy.engine.sparsifier import Sparsifier


class PenaltyHook:
    """Adds a penalty's gradient to what the loss has left in `.grad`, once for each time the optimizer uses it.

    A step pre-hook: gradients are whole and unscaled by then. Where a closure makes them inside the step, it is the closure
    that is followed; its loss then holds the penalty too, since line searches compare it.
    """

    def __init__(self, penalty: Callable[[], Tensor | None], added: Callable[[], None]) -> None:
        self._penalty = penalty
        self._added = added

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if inside_another_step(optimizer):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            self._add(optimizer)
            return None

        def with_penalty() -> Any:
            with torch.enable_grad():
                loss = closure()
            value = self._add(optimizer)
            return loss if loss is None or value is None else loss + value

        return (args[0], with_penalty, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    def _add(self, optimizer: Optimizer) -> Tensor | None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        with torch.enable_grad():
            value = self._penalty()
        if value is None or not value.requires_grad:
            return None
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        scale = getattr(optimizer, "grad_scale", None)  # fused optimizers divide by it themselves
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            gradient = gradient if scale is None else gradient * scale.to(gradient.device)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self._added()
        return value.detach()


class Freezer:
    """Makes a model's own parameters stand still, and lets those go again that moved before."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._frozen: list[nn.Parameter] = []
        self.on = False

    def set(self, on: bool, besides: Collection[int] = ()) -> None:
        """Freeze all but the parameters with these ids, or thaw what was frozen."""
        if on == self.on:
            return
        self.on = on
        if on:
            self._frozen = [p for p in self._model.parameters() if p.requires_grad and id(p) not in besides]
        for parameter in self._frozen:
            parameter.requires_grad_(not on)
            if on:
                parameter.grad = None  # an optimizer moves whatever has a gradient, be it zero
        if not on:
            self._frozen = []


def start_afresh(sparse: Sparsifier) -> None:
    """Bring the state of the optimizers (momentum, moments, step counts) to what it was before the first step."""
    sparse._optimizers.start_afresh()
