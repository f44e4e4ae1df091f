"""Node masks: which hidden units and channels a network may lose one by one, as masks of weights and as a smaller network."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rarefy.errors import ModelError

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Dropout,
    nn.Dropout1d, nn.Dropout2d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten,
)  # fmt: skip
_FUNCTIONS = (
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.sigmoid, torch.sigmoid, F.tanh,
    torch.tanh, F.dropout, F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.flatten,
)  # fmt: skip
_METHODS = ("relu", "relu_", "sigmoid", "tanh", "flatten", "contiguous")


@dataclass(frozen=True)
class HiddenLayer:
    """A layer whose outputs are hidden nodes: everything they reach is its normalisations and the layers that read them.

    Attributes:
        name: module name of the Linear or Conv layer.
        nodes: its output units or channels.
        norms: batch norms on the way.
        readers: module names of the layers that read the nodes, each with how many of its input columns a node feeds (1;
            more where channels are flattened).
    """

    name: str
    nodes: int
    norms: tuple[str, ...]
    readers: tuple[tuple[str, int], ...]


def hidden_layers(model: nn.Module) -> list[HiddenLayer]:
    """Find, in order, the layers whose output nodes can each be removed without touching anything else.

    A node passes through batch norms and functions of single nodes or channels (activations, dropout, pooling, flatten) to
    Linear or ungrouped Conv layers. Where it meets anything else on its way (an addition, an output), its layer is no hidden
    one: input and output nodes, and those of a residual stream, are never removed.
    Units of a `rarefy.coupling.Group` are something else: they may change places, behind a LayerNorm too, where removing one
    changes what the others are normalised to.

    Raises ModelError where torch.fx cannot trace the model, or no layer is hidden.
    """
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be traced to find its nodes: {error}") from error
    modules = dict(traced.named_modules())
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    found = []
    for node in traced.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is None or not _is_layer(module) or calls.count(node.target) != 1:
            continue
        if (layer := _hidden(node, module, modules, calls)) is not None:
            found.append(layer)
    if not found:
        raise ModelError(f"{type(model).__name__} has no hidden layer whose nodes could be removed one by one.")
    return found


def _hidden(node: fx.Node, module: nn.Module, modules: dict[str, nn.Module], calls: list[Any]) -> HiddenLayer | None:
    """Follow a layer's outputs to their readers; None where they meet anything that joins or mixes nodes."""
    nodes, spatial = _shape(module)[0], not isinstance(module, nn.Linear)
    norms, readers = set(), {}
    todo = [(user, False) for user in node.users]
    while todo:
        user, flat = todo.pop()
        inner = modules.get(str(user.target)) if user.op == "call_module" else None
        if inner is not None and (_is_layer(inner) or isinstance(inner, _NORMS)) and calls.count(user.target) != 1:
            return None  # used twice: its other input has other nodes
        if inner is not None and _is_layer(inner):
            times, rest = divmod(_shape(inner)[1], nodes)
            fits = (times == 1 or flat) if not spatial else flat or not isinstance(inner, nn.Linear)
            if rest or not fits:
                return None
            readers[str(user.target)] = times
        elif isinstance(inner, _NORMS):
            if inner.num_features != nodes:
                return None
            norms.add(str(user.target))
            todo += [(later, flat) for later in user.users]
        elif isinstance(inner, _MODULES) or _is_simple(user):
            flat = flat or isinstance(inner, nn.Flatten) or user.target in (torch.flatten, "flatten")
            todo += [(later, flat) for later in user.users]
        else:
            return None
    if not readers:
        return None
    return HiddenLayer(str(node.target), nodes, tuple(sorted(norms)), tuple(sorted(readers.items())))


def _shape(layer: nn.Module) -> torch.Size:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.shape


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def _is_simple(node: fx.Node) -> bool:
    first = [a for a in node.args if isinstance(a, fx.Node)]
    one = len(first) == 1 and not any(isinstance(v, fx.Node) for v in node.kwargs.values())
    return one and (
        (node.op == "call_function" and node.target in _FUNCTIONS)
        or (node.op == "call_method" and node.target in _METHODS)
    )


def weight_masks(model: nn.Module, nodes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks of weights that removing nodes amounts to: their rows, and the columns that read them.

    With its readers' columns gone a removed node adds exactly 0 to what follows, whatever its bias and batch norm make of
    it, and no gradient reaches it. Every mask here covers rows and columns of whole nodes.

    Args:
        nodes: bool [nodes] for each hidden layer by module name, True = kept.

    Returns:
        Parameter name -> bool mask, for the weights of all hidden layers and their readers.
    """
    masks: dict[str, Tensor] = {}

    def mask(name: str) -> Tensor:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return masks.setdefault(f"{name}.weight" if name else "weight", torch.ones(weight.shape, dtype=torch.bool))

    for layer in hidden_layers(model):
        kept = nodes[layer.name].cpu()
        mask(layer.name)[~kept] = False
        for reader, times in layer.readers:
            mask(reader)[:, ~kept.repeat_interleave(times)] = False
    return masks


def shrink(model: nn.Module, nodes: Mapping[str, Tensor]) -> nn.Module:
    """Return a smaller copy of a model without the nodes that are not kept: the same function as with `weight_masks`.

    Rows, biases, batch norms (with their statistics) and readers' columns are taken over; parameters keep their names.
    """
    small = copy.deepcopy(model)
    for layer in hidden_layers(model):
        kept = nodes[layer.name].nonzero().squeeze(1).cpu()
        for name in (layer.name, *layer.norms):
            _take(small.get_submodule(name), kept, 0)
        for reader, times in layer.readers:
            columns = (kept[:, None] * times + torch.arange(times)).reshape(-1)
            _take(small.get_submodule(reader), columns, 1)
    return small


@torch.no_grad()
def _take(module: nn.Module, indices: Tensor, dim: int) -> None:
    """Keep some outputs (dim 0: of all a module holds) or inputs (dim 1: of its weight) of a layer or norm, in place."""
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is None or tensor.ndim <= dim or (dim == 1 and name != "weight"):
            continue
        taken = tensor.index_select(dim, indices.to(tensor.device))
        setattr(module, name, nn.Parameter(taken, tensor.requires_grad) if name in module._parameters else taken)
    for attribute in ("out_features", "out_channels", "num_features") if dim == 0 else ("in_features", "in_channels"):
        if hasattr(module, attribute):
            setattr(module, attribute, len(indices))


def kept_nodes(nodes: int, keep: float) -> int:
    """Return how many of a layer's nodes a keep fraction leaves: rounded to the nearest number, at least 1."""
    return max(1, math.floor(keep * nodes + 0.5))


def draw_nodes(model: nn.Module, keep: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw node masks with exact counts, uniformly at random, the same fraction in every hidden layer."""
    drawn: dict[str, Any] = {}
    for layer in hidden_layers(model):
        mask = torch.zeros(layer.nodes, dtype=torch.bool)
        mask[torch.randperm(layer.nodes, generator=generator)[: kept_nodes(layer.nodes, keep)]] = True
        drawn[layer.name] = mask
    return drawn
