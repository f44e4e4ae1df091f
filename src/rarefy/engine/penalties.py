"""Penalties beside the user's loss: their gradient joins the loss's before an update, their proximal step follows it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rarefy.engine import step_size
from rarefy.engine.layer import Layer
from rarefy.engine.method import Method
from rarefy.engine.optimizer_state import Optimizers, inside_another_step

if TYPE_CHECKING:
    from rarefy.engine.sparsifier import Sparsifier


def has_penalty(method: Method) -> bool:
    """Whether the method has a penalty that is added to the loss's gradient."""
    return type(method).penalty is not Method.penalty


def has_proximal(method: Method) -> bool:
    """Whether the method has a penalty whose proximal operator follows the update."""
    return type(method).proximal is not Method.proximal


def value(sparse: Sparsifier) -> float:
    """Return what the method adds to the loss now, over all layers."""
    smooth = sparse.method.penalty(sparse) if has_penalty(sparse.method) else None
    total = 0.0 if smooth is None else float(smooth.detach())
    if has_proximal(sparse.method):
        for layer in sparse.layers.values():
            penalty = sparse.method.proximal(sparse, layer)
            total += 0.0 if penalty is None else penalty.value(layer.grouped())
    return total


class PenaltyHook:
    """Adds the penalty's gradient to what the loss has left in `.grad`, once for each time the optimizer uses it.

    A step pre-hook: gradients are whole by then, whatever the number of backward passes, and unscaled. Where a closure makes
    them inside the step, the closure is followed; its loss then holds the penalty too, for line searches compare it.
    """

    def __init__(self, sparse: Sparsifier) -> None:
        self._sparse = sparse

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
            more = self._add(optimizer)
            return loss if loss is None or more is None else loss + more

        return (args[0], with_penalty, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    def _add(self, optimizer: Optimizer) -> Tensor | None:
        groups = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        for layer in self._sparse.layers.values():
            layer.refresh()  # weights may have been set since the last step, or set alike on all ranks
        with torch.enable_grad():
            penalty = self._sparse.method.penalty(self._sparse)
        if penalty is None or not penalty.requires_grad:
            return None
        gradients = torch.autograd.grad(penalty, [p for p, _ in groups], allow_unused=True)
        scale = getattr(optimizer, "grad_scale", None)  # fused optimizers divide by it themselves
        for (parameter, group), gradient in zip(groups, gradients, strict=True):
            if gradient is None:
                continue
            gradient = -gradient if group.get("maximize") else gradient  # a penalty is to fall in any case
            gradient = gradient if scale is None else gradient * scale.to(gradient.device)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        for layer in self._sparse.layers.values():
            layer.mask_gradient()
        return penalty.detach()


def proximal_step(sparse: Sparsifier, layer: Layer) -> None:
    """Take the proximal step of the layer's penalty, where there is one and the optimizer has moved the weight."""
    if not has_proximal(sparse.method) or layer.target.parameter.grad is None:
        return
    penalty = sparse.method.proximal(sparse, layer)
    step = None if penalty is None else layer.step_size()
    if penalty is not None and step is not None:
        layer.set_grouped(penalty.prox(layer.grouped(), step))


def prepare(method: Method, layers: Mapping[str, Layer], optimizers: Optimizers) -> None:
    """Tell the layers whether they own their biases, and warn where a learning rate will stand in for a step size."""
    for layer in layers.values():
        layer.owns_bias = method.owns_bias()
    unknown = {type(o).__name__ for o in optimizers.all if has_proximal(method) and not step_size.is_known(o)}
    if unknown:
        warnings.warn(
            f"The step size of {', '.join(sorted(unknown))} is not known: {method.name} takes its learning rate for it, so "
            "training settles where loss and penalty balance in another proportion than the options say. Exact: "
            f"{', '.join(kind.__name__ for kind, _ in step_size.RULES)}.",
            stacklevel=4,
        )
