"""Derivatives of the untouched model on calibration data, for methods that look before they train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rarefy.engine.distributed import average
from rarefy.errors import OptionError
from rarefy.metrics.untouched import cross_entropy, looking

if TYPE_CHECKING:
    from rarefy.engine.sparsifier import Sparsifier

Derivative = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor | None]]


def hold(sparse: Sparsifier) -> None:
    """Read the calibration batches into memory, for methods that pass over them more than once."""
    sparse.calibration = list(sparse.calibration or ())


def gradients(sparse: Sparsifier) -> dict[str, Tensor]:
    """Return dL/dw of every sparse layer where it keeps what it keeps now; weight-shaped.

    Summed over the calibration batches, averaged over ranks; also at weights that are dropped (as zeros in the forward
    pass). Weights, buffers (batch-norm statistics too), `.grad`, training mode and the random state stay as they were.
    """
    return _summed(sparse, lambda value, weights: torch.autograd.grad(value, weights, allow_unused=True))


def hessian_product(sparse: Sparsifier, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return H v of every sparse layer, H the Hessian of the loss in all their weights together; weight-shaped.

    Args:
        sparse: as for `gradients`, whose promises hold here too. Random layers draw what they drew there.
        vector: weight-shaped, by layer name.
    """
    direction = list(vector.values())

    def product(value: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
        first = torch.autograd.grad(value, weights, create_graph=True, allow_unused=True)
        terms = [(g * v.to(g)).sum() for g, v in zip(first, direction, strict=True) if g is not None]
        along = torch.stack(terms).sum() if terms else value.new_zeros(())
        if not along.requires_grad:  # the loss is linear in the weights
            return [None] * len(weights)
        return torch.autograd.grad(along, weights, allow_unused=True)

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        return _summed(sparse, product)


@contextmanager
def tempered(model: nn.Module, temperature: float) -> Iterator[None]:
    """Divide the model's output by a temperature, for a block."""

    def divide(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise OptionError(
                f"temperature={temperature:g} divides the model's output, which is a {type(output).__name__} and not a "
                "tensor: set temperature=1 and divide the logits in your loss."
            )
        return output / temperature

    handle = model.register_forward_hook(divide)
    try:
        yield
    finally:
        handle.remove()


def refuse_given(sparse: Sparsifier) -> None:
    """Raise where a layer was sparse from the start: not all of its weights are there to be scored."""
    for name, layer in sparse.layers.items():
        if layer.given:
            raise OptionError(
                f"{name} {list(layer.shape)}: {sparse.method.name} looks at the gradient of every weight, and this layer is "
                f"sparse from the start; exclude={layer.target.module_name!r}."
            )


def _summed(sparse: Sparsifier, derivative: Derivative) -> dict[str, Tensor]:
    """Sum a derivative of the loss in the sparse layers' weights over the calibration batches."""
    loss = sparse.loss or cross_entropy
    refuse_given(sparse)
    weights = {name: layer.target.parameter for name, layer in sparse.layers.items()}
    total = {n: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for n, w in weights.items()}
    seen = 0
    with looking(sparse.model) as value, _as_kept(sparse):
        for batch in sparse.calibration or ():
            found = derivative(value(loss, batch), list(weights.values()))
            for name, part in zip(weights, found, strict=True):
                if part is not None:
                    total[name] += part
            seen += 1
    if seen == 0:
        raise OptionError(f"{sparse.method.name}: the calibration set is empty; it needs at least one batch.")
    for name, whole in total.items():
        if not torch.isfinite(whole).all():
            raise OptionError(f"{name} {list(whole.shape)}: its gradient on the calibration data is not finite.")
    # storage that holds kept weights alone has a vector of them: here all are kept, in their order
    return {name: average(whole).view(sparse.layers[name].shape) for name, whole in total.items()}


def mean_gradients(sparse: Sparsifier) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over all calibration batches, the model in evaluation mode; as `gradients`.

    The calibration batches must have a length (a list, a DataLoader): each counts alike.
    """
    modes = {module: module.training for module in sparse.model.modules()}
    sparse.model.eval()
    try:
        summed = gradients(sparse)
    finally:
        for module, training in modes.items():
            module.training = training
    batches = len(sparse.calibration)  # type: ignore[arg-type]
    return {name: gradient / batches for name, gradient in summed.items()}


@contextmanager
def _as_kept(sparse: Sparsifier) -> Iterator[None]:
    """Let every sparse weight be trainable, and zero where its layer keeps nothing, for a block."""
    frozen, whole = [], []
    try:
        for layer in sparse.layers.values():
            parameter = layer.target.parameter
            if not parameter.requires_grad:
                frozen.append(parameter.requires_grad_(True))
            if layer.nnz < layer.numel:
                whole.append((parameter, parameter.detach().clone()))
                parameter.data.copy_(layer.weight())  # .data: graphs that saved this weight will find it as it was
        yield
    finally:
        for thawed in frozen:
            thawed.requires_grad_(False)
        for pruned, weight in whole:
            pruned.data.copy_(weight)
