"""Put a network back to where it was: what the methods that train more than once in one run are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rarefy.engine.selection import named_modules
from rarefy.errors import StateError
from rarefy.nn import SparseModule

if TYPE_CHECKING:
    from rarefy.engine.sparsifier import Sparsifier


def snapshot(sparse: Sparsifier) -> dict[str, Tensor]:
    """Return a copy of all parameters and buffers (batch-norm statistics too) by name; sparse weights as dense tensors."""
    layers = {name: layer.weight().clone() for name, layer in sparse.layers.items()}
    return layers | {name: tensor.detach().clone() for name, tensor in _others(sparse).items()}


@torch.no_grad()
def rewind(sparse: Sparsifier, weights: Mapping[str, Tensor]) -> None:
    """Give the network the values of a `snapshot`; what is not kept now stays zero. Masks and optimizers stay as they are.

    Raises StateError, and changes nothing, where the values are not those of this network.
    """
    others = _others(sparse)
    shapes = {name: layer.shape for name, layer in sparse.layers.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in others.items()}
    if odd := sorted(set(shapes) ^ set(weights)):
        raise StateError(
            f"The values to rewind to are of another network: {', '.join(odd[:5])} is in one of them only."
        )
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise StateError(f"{name} {list(shape)}: the value to rewind to is {list(weights[name].shape)}.")
    for name, layer in sparse.layers.items():
        layer.set_weight(weights[name])
    for name, tensor in others.items():
        tensor.copy_(weights[name])


def start_afresh(sparse: Sparsifier) -> None:
    """Forget the optimizers' momenta and step counts, as if they had just been made."""
    sparse._optimizers.start_afresh()


def learning_rates(sparse: Sparsifier) -> list[float]:
    """Return the learning rate of every parameter group of the optimizers that the sparsifier follows."""
    return sparse._optimizers.learning_rates()


def _others(sparse: Sparsifier) -> dict[str, Tensor]:
    """Every parameter and buffer that no sparse layer holds, once, under its first name."""
    seen = {id(layer.target.parameter) for layer in sparse.layers.values()}
    found = {}
    for prefix, module in named_modules(sparse.model):
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or id(tensor) in seen or (isinstance(module, SparseModule) and key in ("crow", "col")):
                continue
            seen.add(id(tensor))
            found[f"{prefix}.{key}".removeprefix(".")] = tensor
    return found
