"""What flows through a network's weights from its inputs to its outputs, whatever the data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rarefy.engine.calibration import refuse_given
from rarefy.engine.selection import unwrapped
from rarefy.errors import OptionError
from rarefy.metrics.untouched import uncompiled

if TYPE_CHECKING:
    from rarefy.engine.sparsifier import Sparsifier


class SynapticFlow:
    """A copy of the network in float64 and eval mode, every value replaced by its absolute value; the network is untouched.

    R is the sum of the copy's outputs for an input of ones less that for zeros: what flows from the inputs to the outputs,
    without what biases feed in on the way. Inputs have the shape of the first calibration batch's samples (a batch is x or
    (x, ...)); where the sparsifier has a `loss`, R is `loss(copy, batch)` of that batch. Sums of products over all paths
    leave float32's range in deep networks, hence float64.
    """

    def __init__(self, sparse: Sparsifier) -> None:
        refuse_given(sparse)
        self._layers = sparse.layers
        self._method = sparse.method.name
        original = unwrapped(sparse.model)
        names = {id(parameter): name for name, parameter in original.named_parameters()}
        model = copy.deepcopy(original)
        if any(parameter.device.type == "mps" for parameter in model.parameters()):  # which has no float64
            model = model.cpu()
        model = model.double().eval()
        for tensor in chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                tensor.data.abs_()
        found = dict(model.named_parameters())
        self._weights = {
            name: found[names[id(layer.target.parameter)]].requires_grad_(True) for name, layer in sparse.layers.items()
        }
        self._model = model
        self._loss = sparse.loss
        self._batch: Any = next(iter(sparse.calibration or ()), None)
        if self._loss is None:
            self._batch = _ones(self._batch, self._method, next(iter(self._weights.values())).device)

    def gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return (|w| as kept now, dR/dw there) of every sparse layer; float64, weight-shaped.

        On the layer's device, or on the CPU where that device has no float64.
        """
        for name, weight in self._weights.items():
            weight.data.copy_(self._layers[name].weight().abs())
        weights = list(self._weights.values())
        with torch.random.fork_rng(), torch.enable_grad(), uncompiled():
            flow = self._flow()
            found: Sequence[Tensor | None] = [None] * len(weights)
            if flow.requires_grad:
                found = torch.autograd.grad(flow, weights, allow_unused=True)
        result = {
            n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(self._weights.items(), found, strict=True)
        }
        for name, gradient in result.items():
            if not torch.isfinite(gradient).all():
                raise OptionError(
                    f"{name} {list(gradient.shape)}: the sum of outputs R = {float(flow.detach()):g}, or its gradient here, is "
                    f"out of float64's range. Scale the weights of this network down before {self._method}."
                )
        return {n: w.detach() for n, w in self._weights.items()}, result

    def _flow(self) -> Tensor:
        if self._loss is not None:
            return self._loss(self._model, self._batch).sum()
        return self._output(self._batch) - self._output(torch.zeros_like(self._batch))

    def _output(self, x: Tensor) -> Tensor:
        output = self._model(x)
        if not isinstance(output, Tensor):
            raise OptionError(
                f"{self._method} sums the model's output, which is a {type(output).__name__} and not a tensor: pass "
                "loss=lambda model, batch: ... that returns the sum to follow."
            )
        return output.sum()


def _ones(batch: Any, method: str, device: torch.device) -> Tensor:
    """Return one float64 sample of ones, of the shape of a batch's samples."""
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        said = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise OptionError(
            f"{method} feeds the network ones of the shape of its input, and needs a calibration batch x or (x, y) with float "
            f"x [samples, ...], not {said}. For other networks pass loss=lambda model, batch: ... that returns the sum of "
            "outputs to follow."
        )
    return torch.ones(1, *x.shape[1:], dtype=torch.float64, device=device)
