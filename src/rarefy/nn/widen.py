"""Multiply a network's hidden widths, in place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rarefy.errors import ModelError
from rarefy.nn.dataflow import follow, run

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SIZES = ("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_channels",
          "normalized_shape", "embedding_dim", "num_parameters")  # fmt: skip


def wider(units: int, factor: float, multiple: int = 1) -> int:
    """Return floor(units * factor), never below 1; where `units` is a multiple of `multiple`, the next such one below."""
    step = multiple if units % multiple == 0 else 1
    return max(step, math.floor(units * factor / step + 1e-9) * step)


@torch.no_grad()
def widen_(model: nn.Module, factor: float, example: Any) -> nn.Module:
    """Multiply every hidden width of a network by `factor`, in place, for training from scratch; returns the network.

    A width w becomes floor(w factor), or the next multiple below that grouped layers need. The network's inputs and
    outputs keep theirs: layers that make its output keep their number of outputs. Input sizes are not computed but
    seen: a copy of the network runs once on `example`, and each layer takes what reaches it, so that residual sums,
    concatenations and flattening fit by themselves, or the run fails and nothing is changed. Weights of a new shape are
    drawn from a normal distribution that gives outputs the variance they had; biases and norms repeat theirs. What
    keeps its shape keeps its values.

    Knows Linear, Conv1d/2d/3d (depthwise too), Embedding, batch, group, layer and RMS norm, and PReLU.

    Raises ModelError, and leaves the network as it was, where another module holds parameters or where the widened
    network does not run or gives outputs of another shape, for example because it counts channels itself. Then build
    it anew with wider layers.

    >>> net = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3))
    >>> widen_(net, 1.5, torch.zeros(1, 8))
    Sequential(
      (0): Linear(in_features=8, out_features=30, bias=True)
      (1): ReLU()
      (2): Linear(in_features=30, out_features=3, bias=True)
    )
    """
    flow = follow(model, example)
    trial = copy.deepcopy(model).eval()
    resized: dict[str, nn.Module] = {}
    rules = _find_rules(trial)
    multiple = math.lcm(*(_groups(module) for module, _ in rules.values()))
    for name, (module, rule) in rules.items():

        def grow(units: int, fixed: bool = name in flow.head) -> int:
            return units if fixed else wider(units, factor, multiple)

        module.register_forward_pre_hook(_before(name, module, rule, grow, resized))
    with torch.random.fork_rng(devices=[]):  # a failure draws no numbers
        try:
            out = run(trial, example)
        except ModelError as error:
            raise ModelError(
                f"{type(model).__name__} cannot be widened by {factor:g} from outside: build it anew, with wider layers. "
                f"{error}"
            ) from error
        state = torch.get_rng_state()
    if idle := [name for name in rules if name not in resized]:
        raise ModelError(f"the example input does not reach {', '.join(idle)}: their widths are not known.")
    shapes = [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor)]
    if shapes != flow.shapes:
        raise ModelError(
            f"{type(model).__name__}, widened by {factor:g}, gives outputs of shape {shapes} instead of {flow.shapes}: build "
            "it anew, with wider layers."
        )
    torch.set_rng_state(state)
    modules = dict(model.named_modules())
    for name, new in resized.items():
        old = modules[name]
        old._parameters.update(new._parameters)
        old._buffers.update(new._buffers)
        for size in _SIZES:
            if size in vars(old):
                setattr(old, size, getattr(new, size))
    return model


Grow = Callable[[int], int]
Rule = Callable[[Any, Tensor, Grow], tuple[dict[str, Any], dict[str, tuple[int, ...]]]]
"""From a module, its input, and what becomes of its outputs: its new sizes, and its parameters' new shapes."""


def _before(name: str, module: nn.Module, rule: Rule, grow: Grow, resized: dict[str, nn.Module]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        if name in resized:  # called again: its input must fit what it became
            return
        resized[name] = module
        sizes, shapes = rule(module, args[0], grow)
        vars(module).update(sizes)
        for key, shape in shapes.items():
            tensor = getattr(module, key, None)
            if tensor is not None and tuple(tensor.shape) != shape:
                new = _resized(tensor.detach(), shape)
                learned = isinstance(tensor, nn.Parameter)
                setattr(module, key, nn.Parameter(new, requires_grad=tensor.requires_grad) if learned else new)

    return hook


def _resized(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return old.repeat(-(-shape[0] // len(old)))[: shape[0]]
    spread = float(old.float().std(correction=0))
    if spread == 0:
        return old.new_full(shape, float(old.reshape(-1)[0]))
    return old.new_empty(shape).normal_(0, spread * math.sqrt(old[0].numel() / math.prod(shape[1:])))


def _find_rules(model: nn.Module) -> dict[str, tuple[nn.Module, Rule]]:
    """Return every module that has a width, with its rule; ModelError where one has none, or shares its weight."""
    found: dict[str, tuple[nn.Module, Rule]] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False)]
        rule = next((rule for types, rule in _RULES if type(module) in types), None)
        if rule is not None:
            found[name] = module, rule
        elif own:
            raise ModelError(
                f"{name or 'the model'} ({type(module).__name__}) holds parameters that cannot be widened from outside: build "
                "the network anew, with wider layers."
            )
        for parameter in own:
            if owners.setdefault(id(parameter), name) != name:
                raise ModelError(
                    f"{owners[id(parameter)]} and {name} share a weight, which cannot be widened from outside: build the "
                    "network anew, with wider layers."
                )
    return found


def _groups(module: nn.Module) -> int:
    """Return what this layer's widths must be a multiple of; depthwise layers have as many groups as channels."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    return module.groups if isinstance(module, _CONVS) and module.groups != module.in_channels else 1


def _linear(module: Any, x: Tensor, grow: Grow) -> Any:
    rows = grow(module.out_features)
    return {"in_features": x.shape[-1], "out_features": rows}, {"weight": (rows, x.shape[-1]), "bias": (rows,)}


def _conv(module: Any, x: Tensor, grow: Grow) -> Any:
    kernel = module.kernel_size
    channels = x.shape[-1 - len(kernel)]
    rows, groups = grow(module.out_channels), module.groups
    if groups > 1 and groups == module.in_channels:
        groups = channels
        rows = channels * (module.out_channels // module.in_channels)
    if channels % groups or rows % groups:
        raise ModelError(f"{channels} -> {rows} channels do not divide into {groups} groups")
    sizes = {"in_channels": channels, "out_channels": rows, "groups": groups}
    return sizes, {"weight": (rows, channels // groups, *kernel), "bias": (rows,)}


def _embedding(module: Any, x: Tensor, grow: Grow) -> Any:
    cols = grow(module.embedding_dim)
    return {"embedding_dim": cols}, {"weight": (module.num_embeddings, cols)}


def _channels(size: str) -> Rule:
    def rule(module: Any, x: Tensor, grow: Grow) -> Any:
        one = getattr(module, size) == 1
        channels = 1 if one and size == "num_parameters" else x.shape[1]
        return {size: channels}, dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (channels,))

    return rule


def _last(module: Any, x: Tensor, grow: Grow) -> Any:
    if len(module.normalized_shape) > 1:
        raise ModelError(f"a norm over {list(module.normalized_shape)} does not say which of these is a width")
    return {"normalized_shape": (x.shape[-1],)}, {"weight": (x.shape[-1],), "bias": (x.shape[-1],)}


_RULES: tuple[tuple[tuple[type[nn.Module], ...], Rule], ...] = (
    ((nn.Linear,), _linear),
    (_CONVS, _conv),
    ((nn.Embedding,), _embedding),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _channels("num_features")),
    ((nn.GroupNorm,), _channels("num_channels")),
    ((nn.PReLU,), _channels("num_parameters")),
    ((nn.LayerNorm, nn.RMSNorm), _last),
)
