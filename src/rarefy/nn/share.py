"""Make a network read its weights from one small array, in place, and back."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from rarefy.errors import ModelError, OptionError
from rarefy.nn.rewriting import replaceable
from rarefy.nn.shared_array import SharedArray, check_mapping, power_of_two
from rarefy.nn.shared_layers import SharedConv2d, SharedEmbedding, SharedLinear, SharedModule

_TWINS: dict[type[nn.Module], type[SharedModule]] = {
    nn.Linear: SharedLinear,
    nn.Conv2d: SharedConv2d,
    nn.Embedding: SharedEmbedding,
}
_DENSE = {shared: dense for dense, shared in _TWINS.items()}


def share_(
    model: nn.Module,
    keep: float,
    *,
    mapping: str = "fold",
    tile: int = 32,
    scope: str = "global",
    init_std: float = 0.04,
    scaler: str = "v1",
    smallest: int = 0,
    seed: int = 0,
) -> list[SharedArray]:
    """Turn every Linear, Conv2d and Embedding of a model, in place, into a layer that reads a shared array.

    n weights become m = floor(keep n) trainable values. Layers stay where they are in the model, under their names and
    with their biases; their `weight` is gone. Call it before the optimizer is made, and outside of
    DistributedDataParallel. The values are drawn from U(-init_std, init_std) with PyTorch's own generator, and each
    layer has a fixed scale that gives it the standard deviation that its weight had. At keep = 1 and mapping "fold"
    nothing is shared: the weights are taken over as they are, scales are powers of two, and the network computes, and
    under SGD trains, bit for bit what the dense one does.

    Args:
        model: is changed. Layers of derived types, with computed weights, or inside `nn.MultiheadAttention` stay dense.
        keep: share of the weights' memory that remains, in (0, 1].
        mapping: "fold" (RANDOMFOLD: balanced, the dense network at keep = 1) or "tile" (ROAST).
        tile: side of the tiles; an embedding's are one row high. Used by "tile".
        scope: "global" (one array for all layers) or "local" (one for each).
        init_std, scaler, seed: see `SharedArray`.
        smallest: layers with fewer weights stay dense.

    Returns:
        The arrays: one, or one for each layer.

    Raises:
        OptionError: a number or name out of its range.
        ModelError: nothing to share, or a layer that cannot be; the model is then as it was.

    Source: Desai & Shrivastava 2024, arXiv 2310.11611.

    Example:
        >>> import torch, rarefy
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.ReLU(), torch.nn.Linear(300, 10))
        >>> arrays = rarefy.nn.share_(model, keep=0.01)
        >>> model
        Sequential(
          (0): SharedLinear(
            in_features=64, out_features=300, bias=True, shared=222 of 22200
            (shared): SharedArray(size=222, represented=22200, mapping='fold', scaler='v1', seed=0)
          )
          (1): ReLU()
          (2): SharedLinear(in_features=300, out_features=10, bias=True, shared=222 of 22200)
        )
        >>> sum(p.numel() for p in model.parameters())
        532
    """
    check_options(keep, mapping, tile, scope, init_std, scaler, smallest)
    layers = {
        name: module
        for name, module in replaceable(model, tuple(_TWINS), tied=True)[0].items()
        if _weight(module).numel() >= max(1, smallest)
    }
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no Linear, Conv2d or Embedding of at least {smallest} weights to share."
        )
    for name, module in layers.items():
        _check_layer(name, module)
    names = [*layers]
    groups = [names] if scope == "global" else _by_weight(layers)
    arrays = [_array(layers, group, keep, mapping, tile, init_std, scaler, seed + i) for i, group in enumerate(groups)]
    for group, array in zip(groups, arrays, strict=True):
        numbers = _numbers(layers, group)
        for name in group:
            _convert(layers[name], array, numbers[id(_weight(layers[name]))], owner=name == group[0])
    return arrays


def unshare_(model: nn.Module) -> nn.Module:
    """Turn every shared layer, in place, into the plain dense layer with the weights it has now; returns the model.

    For export and deployment: the network has all its weights again. Each layer's are its own from then on, tied ones too.
    """
    for module in list(model.modules()):
        if isinstance(module, SharedModule):
            weight = module.weight_now().detach().clone()
            if isinstance(module, SharedEmbedding) and module.padding_idx is not None:
                weight[module.padding_idx] = 0
            frozen = not module.array.values.requires_grad
            for name in ("array", "index", "weight_shape"):
                del module.__dict__[name]
            module._modules.pop("shared", None)
            module.__class__ = _DENSE[type(module)]  # type: ignore[assignment]
            parameters = {"weight": nn.Parameter(weight, requires_grad=not frozen), **module._parameters}
            module._parameters.clear()
            module._parameters.update(parameters)
    return model


def check_options(
    keep: float, mapping: str, tile: int, scope: str, init_std: float, scaler: str, smallest: int
) -> None:
    """Raise OptionError for options of `share_` that are out of their range."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise OptionError(f"keep={keep!r} must be a number in (0, 1].")
    check_mapping(mapping, scaler)
    if scope not in ("global", "local"):
        raise OptionError(f"scope={scope!r} must be 'global' or 'local'.")
    for name, value, least in (("tile", tile, 1), ("smallest", smallest, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name}={value!r} must be a whole number of at least {least}.")
    if isinstance(init_std, bool) or not isinstance(init_std, int | float) or not 0 < init_std < math.inf:
        raise OptionError(f"init_std={init_std!r} must be a positive number.")


def _check_layer(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise ModelError(f"{name}: an Embedding with {option} cannot read a shared array; build it without.")
    weight = _weight(module)
    if not weight.is_meta and not float(weight.detach().float().std(correction=0)) > 0:
        raise ModelError(
            f"{name} {list(weight.shape)}: all its weights are {weight.detach().reshape(-1)[0].item():g}, and a shared weight "
            "needs a scale; initialise it otherwise, or leave it dense with smallest=."
        )


def _weight(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")


def _numbers(layers: dict[str, nn.Module], group: list[str]) -> dict[int, int]:
    """Number the weights of a group; a tied one has one number."""
    numbers: dict[int, int] = {}
    for name in group:
        numbers.setdefault(id(_weight(layers[name])), len(numbers))
    return numbers


def _by_weight(layers: dict[str, nn.Module]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, module in layers.items():
        groups.setdefault(id(_weight(module)), []).append(name)
    return [*groups.values()]


def _array(
    layers: dict[str, nn.Module],
    group: list[str],
    keep: float,
    mapping: str,
    tile: int,
    init_std: float,
    scaler: str,
    seed: int,
) -> SharedArray:
    first: dict[int, nn.Module] = {}
    for name in group:
        first.setdefault(id(_weight(layers[name])), layers[name])
    modules = [*first.values()]
    weights = [_weight(module).detach() for module in modules]
    total = sum(weight.numel() for weight in weights)
    size = math.floor(keep * total + 1e-6)
    if size < 1:
        raise OptionError(f"keep={keep} leaves none of {total} weights of {', '.join(group)}; raise it.")
    whole = mapping == "fold" and size == total
    root3 = math.sqrt(3)  # the standard deviation of U(-C, C) is C / sqrt(3)
    scales = [1.0 if w.is_meta else float(w.float().std(correction=0)) * root3 / init_std for w in weights]
    array = SharedArray(
        size,
        [(len(w), w[0].numel()) for w in weights],
        [power_of_two(s) for s in scales] if whole else scales,
        mapping=mapping,
        tile=[(1 if isinstance(m, nn.Embedding) else tile, tile) for m in modules],
        scaler=scaler,
        seed=seed,
        device=weights[0].device,
        dtype=weights[0].dtype,
    )
    array.values.requires_grad_(any(_weight(m).requires_grad for m in modules))
    if whole:
        array.take(weights)
    else:
        nn.init.uniform_(array.values, -init_std, init_std)
    return array


def _convert(module: nn.Module, array: SharedArray, number: int, owner: bool) -> None:
    shape: Any = tuple(_weight(module).shape)
    del module._parameters["weight"]
    module.__class__ = _TWINS[type(module)]
    assert isinstance(module, SharedModule)
    module._read_from(array, number, shape, owner)
