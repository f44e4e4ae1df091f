"""The layers that Sparse-IFT puts in place of a dense one, and their sizes and first weights."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from rarefy.errors import ModelError

Layer = nn.Linear | nn.Conv2d


class Parallel(nn.Module):
    """The sum of several layers on one input, each with its own norm and nonlinearity: y = sum_b g(norm_b(layer_b(x)))."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            y = y + branch(x)
        return y


class Doped(nn.Module):
    """A sparse layer and a dense one of low rank on one input: y = sparse(x) + up(down(x))."""

    def __init__(self, sparse: nn.Module, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.sparse, self.down, self.up = sparse, down, up

    def forward(self, x: Tensor) -> Tensor:
        return self.sparse(x) + self.up(self.down(x))


def factorized_rank(inputs: int, outputs: int, sparsity: float) -> int:
    """Return the inner width of two sparse factors that cost a dense layer: expanded, not low."""
    return math.ceil(inputs * outputs / ((1 - sparsity) * (inputs + outputs)) - 1e-9)


def doped_rank(inputs: int, outputs: int, sparsity: float) -> int:
    """Return the rank of two dense factors that cost what sparsity saves in a layer."""
    return math.floor(sparsity * inputs * outputs / (inputs + outputs) + 1e-9)


def branches_for(sparsity: float) -> int:
    """Return how many sparse layers cost one dense one."""
    return round(1 / (1 - sparsity))


def _inputs(layer: Layer) -> int:
    return layer.weight[0].numel()


def _outputs(layer: Layer) -> int:
    return layer.weight.shape[0]


def _power(layer: Layer) -> float:
    """The variance of outputs on independent inputs of variance 1."""
    return float(layer.weight.detach().float().var(correction=0)) * _inputs(layer)


def _first(layer: Layer, outputs: int, bias: bool) -> Layer:
    """A layer on the same inputs with another number of outputs; its weights are to be drawn."""
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, outputs, bias, device=weight.device, dtype=weight.dtype)
    return nn.Conv2d(
        layer.in_channels,
        outputs,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        layer.groups,
        bias,
        layer.padding_mode,
        device=weight.device,
        dtype=weight.dtype,
    )


def _second(layer: Layer, inputs: int, bias: bool) -> Layer:
    """A layer from another number of inputs to the same outputs, pixel by pixel."""
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs, layer.out_features, bias, device=weight.device, dtype=weight.dtype)
    return nn.Conv2d(inputs, layer.out_channels, 1, bias=bias, device=weight.device, dtype=weight.dtype)


def _draw(layer: Layer, variance: float, bias: Tensor | None = None) -> Layer:
    with torch.no_grad():
        layer.weight.normal_(0, math.sqrt(variance))
        if layer.bias is not None:
            layer.bias.zero_() if bias is None else layer.bias.copy_(bias)
    return layer


def _like(norm: nn.Module, channels: int) -> nn.Module:
    """A fresh norm of the same kind for so many channels."""
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    place = next((t.device for t in [*norm.parameters(), *norm.buffers()]), None)
    return type(norm)(channels, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device=place)


def parallel(layer: Layer, norm: nn.Module | None, sparsity: float, nonlinearity: str) -> tuple[nn.Module, list[str]]:
    count = branches_for(sparsity)
    found: list[nn.Module] = []
    for b in range(count):
        one = copy.deepcopy(layer)
        with torch.no_grad():
            if b == 0:
                one.weight.div_(math.sqrt(count))
            else:
                _draw(one, _power(layer) / _inputs(layer) / count)
            if one.bias is not None and layer.bias is not None:
                one.bias.copy_(layer.bias / count)
        parts: dict[str, nn.Module] = {"layer": one}
        if norm is not None:
            parts["norm"] = copy.deepcopy(norm)
        if nonlinearity == "relu":
            parts["act"] = nn.ReLU()
        found.append(nn.Sequential(OrderedDict(parts)))
    return Parallel(*found), [f"branches.{b}.layer" for b in range(count)]


def factorized(layer: Layer, norm: nn.Module | None, sparsity: float, nonlinearity: str) -> tuple[nn.Module, list[str]]:
    relu = nonlinearity == "relu"
    rank = factorized_rank(_inputs(layer), _outputs(layer), sparsity)
    expand = _draw(_first(layer, rank, bias=relu and norm is None), (2 if relu else 1) / _inputs(layer))
    middle = 0.5 if relu and norm is not None else 1.0  # mean square of what reaches the second factor
    project = _draw(_second(layer, rank, layer.bias is not None), _power(layer) / rank / middle, layer.bias)
    parts: dict[str, nn.Module] = {"expand": expand}
    if norm is not None and relu:
        parts["norm"] = _like(norm, rank)
    if relu:
        parts["act"] = nn.ReLU()
    return nn.Sequential(OrderedDict({**parts, "project": project})), ["expand", "project"]


def doped(layer: Layer, sparsity: float) -> tuple[nn.Module, list[str]]:
    rank = doped_rank(_inputs(layer), _outputs(layer), sparsity)
    if rank < 1:
        raise ModelError(
            f"a layer of {_inputs(layer)} inputs and {_outputs(layer)} outputs saves less at sparsity {sparsity:g} than one "
            "rank costs: raise the sparsity."
        )
    sparse = copy.deepcopy(layer)
    with torch.no_grad():
        sparse.weight.mul_(math.sqrt(1 - sparsity))
    down = _draw(_first(layer, rank, bias=False), 1 / _inputs(layer))
    up = _draw(_second(layer, rank, bias=False), sparsity * _power(layer) / rank)
    return Doped(sparse, down, up), ["sparse"]
