"""Gradients of the untouched model on calibration data, for methods that look before they train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from rarefy.engine.distributed import average
from rarefy.errors import OptionError

if TYPE_CHECKING:
    from rarefy.engine.sparsifier import Sparsifier


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The default loss: mean cross-entropy of `model(x)` and the labels y of a batch (x, y)."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise OptionError(
            f"A calibration batch must be a pair (x, y), not {type(batch).__name__}; for anything else pass "
            "loss=lambda model, batch: ..."
        )
    x, y = batch
    loss: Tensor = F.cross_entropy(model(x), y)
    return loss


def gradients(sparse: Sparsifier) -> dict[str, Tensor]:
    """Return dL/dw of every sparse layer, summed over the calibration batches; weight-shaped.

    Weights, buffers (batch-norm statistics too), `.grad`, training mode and the random state stay as they were.
    """
    loss = sparse.loss or cross_entropy
    for name, layer in sparse.layers.items():
        if layer.given:
            raise OptionError(
                f"{name} {list(layer.shape)}: {sparse.method.name} looks at the gradient of every weight, and this layer is "
                f"sparse from the start; exclude={layer.target.module_name!r}."
            )
    weights = {name: layer.target.parameter for name, layer in sparse.layers.items()}
    total = {n: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for n, w in weights.items()}
    buffers = {name: buffer.clone() for name, buffer in sparse.model.named_buffers()}
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    seen = 0
    with torch.random.fork_rng(), torch.enable_grad():
        for weight in frozen:
            weight.requires_grad_(True)
        try:
            for batch in sparse.calibration or ():
                value = functional_call(
                    _Objective(sparse.model, loss), {f"model.{k}": v for k, v in buffers.items()}, (batch,)
                )
                found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        total[name] += gradient
                seen += 1
        finally:
            for weight in frozen:
                weight.requires_grad_(False)
    if seen == 0:
        raise OptionError(f"{sparse.method.name}: the calibration set is empty; it needs at least one batch.")
    for name, gradient in total.items():
        if not torch.isfinite(gradient).all():
            raise OptionError(f"{name} {list(gradient.shape)}: its gradient on the calibration data is not finite.")
    return {name: average(gradient) for name, gradient in total.items()}


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


class _Objective(nn.Module):
    """The loss as a module around the model, so that its buffers can be swapped for copies."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        value: Tensor = self.loss(self.model, batch)
        return value
