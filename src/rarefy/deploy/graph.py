"""A traced model as a list of steps: what can run natively, what was fused into it, and what stays PyTorch's."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_MODULE_ACTS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
}
_FUNCTION_ACTS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.silu: "silu",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.hardsigmoid: "hardsigmoid",
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
}
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_MULTIPLIES = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_FLATTENS = (torch.flatten, "flatten")
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(frozen=True, eq=False)
class Step:
    """One operation: `kind` says which, `inputs` name the values it reads, `options` hold the rest.

    kinds: "conv" and "linear" (weight, bias, act, residual and the geometry), "act", "add", "multiply", "max_pool",
    "avg_pool", "adaptive_avg_pool", "affine", "concat", "flatten", "softmax", and "torch" (`call` on the inputs).
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    call: Callable[..., Any] | None = None

    @property
    def weight(self) -> Tensor | None:
        return self.options.get("weight")


@dataclass(frozen=True, eq=False)
class Graph:
    """Steps in order, from named inputs to a structure of named outputs."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: Any  # nested tuples, lists and dicts of names and constants, each name as a `Name`


@dataclass(frozen=True)
class Name:
    """A value's name inside the structure of outputs."""

    name: str


def trace(model: nn.Module) -> Graph:
    """Trace a model in eval mode with torch.fx, fold and fuse. Raises what torch.fx raises where it cannot trace."""
    traced = fx.symbolic_trace(model)
    traced.graph.eliminate_dead_code()
    modules = dict(traced.named_modules())
    inputs, steps, outputs = [], [], None
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            inputs.append(node.name)
        elif node.op == "output":
            outputs = _names(node.args[0])
        else:
            steps.append(_step(node, modules, traced))
    return Graph(tuple(inputs), tuple(_fuse(_fold(steps, outputs), outputs)), outputs)


def _names(structure: Any) -> Any:
    if isinstance(structure, fx.Node):
        return Name(structure.name)
    if isinstance(structure, dict):
        return {key: _names(item) for key, item in structure.items()}
    if isinstance(structure, tuple | list):
        return type(structure)(_names(item) for item in structure)
    return structure


def names_in(structure: Any) -> list[str]:
    """Return the names of values inside a structure of outputs."""
    if isinstance(structure, Name):
        return [structure.name]
    if isinstance(structure, dict):
        structure = list(structure.values())
    if isinstance(structure, tuple | list):
        return [name for item in structure for name in names_in(item)]
    return []


def fill(structure: Any, values: dict[str, Any]) -> Any:
    """Return the structure with every name replaced by its value."""
    if isinstance(structure, Name):
        return values[structure.name]
    if isinstance(structure, dict):
        return {key: fill(item, values) for key, item in structure.items()}
    if isinstance(structure, tuple | list):
        filled = [fill(item, values) for item in structure]
        return tuple(filled) if isinstance(structure, tuple) else filled
    return structure


# --- one node ----------------------------------------------------------------------------------------------------------


def _step(node: fx.Node, modules: dict[str, nn.Module], root: nn.Module) -> Step:
    if node.op == "call_module":
        known = _module_step(node, modules[str(node.target)])
    elif node.op in ("call_function", "call_method"):
        known = _function_step(node)
    else:
        known = None
    if known is not None and all(isinstance(a, fx.Node) for a in node.args[: len(known.inputs)]):
        return known
    return _torch_step(node, modules, root)


def _module_step(node: fx.Node, module: Any) -> Step | None:
    one = (str(node.args[0]),) if node.args else ()
    if len(node.args) != 1 or node.kwargs:
        return None
    kind = type(module)
    if kind is nn.Conv2d and module.padding_mode == "zeros" and module.weight.dtype == torch.float32:
        options = _geometry(module) | {"weight": module.weight.detach(), "bias": _detached(module.bias)}
        return Step(node.name, "conv", one, options | {"act": "none", "label": str(node.target)})
    if kind is nn.Linear and module.weight.dtype == torch.float32:
        options = {"weight": module.weight.detach(), "bias": _detached(module.bias), "act": "none"}
        return Step(node.name, "linear", one, options | {"label": str(node.target)})
    if kind is nn.BatchNorm2d and module.running_var is not None:
        scale, shift = _batch_norm(module)
        return Step(node.name, "affine", one, {"scale": scale, "shift": shift, "act": "none"})
    if kind in _MODULE_ACTS:
        return Step(node.name, "act", one, {"act": _MODULE_ACTS[kind]})
    if kind in _IDENTITIES:
        return Step(node.name, "identity", one)
    if kind is nn.Flatten and module.start_dim == 1 and module.end_dim == -1:
        return Step(node.name, "flatten", one)
    if kind is nn.MaxPool2d and not module.return_indices:
        return Step(node.name, "max_pool", one, _pool(module) | {"dilation": _pair(module.dilation)})
    if kind is nn.AvgPool2d and module.divisor_override is None:
        return Step(node.name, "avg_pool", one, _pool(module) | {"count_include_pad": module.count_include_pad})
    if kind is nn.AdaptiveAvgPool2d:
        return Step(node.name, "adaptive_avg_pool", one, {"out": _pair(module.output_size)})
    return None


def _function_step(node: fx.Node) -> Step | None:
    args: Any = node.args
    target, kwargs = node.target, dict(node.kwargs)
    values = tuple(str(a) for a in args if isinstance(a, fx.Node))
    if target in _FUNCTION_ACTS and len(args) == 1 and not (kwargs.keys() - {"inplace"}):
        return Step(node.name, "act", values, {"act": _FUNCTION_ACTS[target]})
    if target in _ADDS + _MULTIPLIES and len(values) == 2 == len(args) and not kwargs:
        return Step(node.name, "add" if target in _ADDS else "multiply", values, {"act": "none"})
    if target in _FLATTENS and (*args[1:], *kwargs.values()) == (1,):
        return Step(node.name, "flatten", values)
    if target is F.adaptive_avg_pool2d and len(args) == 2 and not kwargs:
        return Step(node.name, "adaptive_avg_pool", values, {"out": _pair(args[1])})
    if target in (torch.mean, "mean") and not (kwargs.keys() - {"dim", "keepdim"}):
        dims: Any = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dims is not None and not isinstance(dims, int) and sorted(dims) in ([2, 3], [-2, -1]) and len(args) <= 2:
            return Step(node.name, "mean", values, {"keepdim": bool(kwargs.get("keepdim", False))})
    if target in (torch.cat, torch.concat) and isinstance(args[0], list | tuple):
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if dim == 1 and all(isinstance(a, fx.Node) for a in args[0]):
            return Step(node.name, "concat", tuple(str(a) for a in args[0]))
    return None


def _torch_step(node: fx.Node, modules: dict[str, nn.Module], root: nn.Module) -> Step:
    """Run the node as PyTorch would."""
    nodes: list[fx.Node] = []

    def note(n: fx.Node) -> fx.Node:
        if n not in nodes:
            nodes.append(n)
        return n

    fx.node.map_arg((node.args, node.kwargs), note)
    order = {n: i for i, n in enumerate(nodes)}
    target: Any = node.target
    if node.op == "get_attr":
        constant = operator.attrgetter(str(target))(root)
        return Step(node.name, "torch", (), call=lambda: constant)
    if node.op == "call_module":
        target = modules[str(target)]

    def call(*values: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[order[n]])
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    spelled = type(target).__name__ if node.op == "call_module" else getattr(target, "__name__", str(target))
    return Step(node.name, "torch", tuple(n.name for n in nodes), {"label": spelled}, call)


def _geometry(conv: nn.Conv2d) -> dict[str, Any]:
    padding = conv.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(r % 2 for r in reach):
            raise ValueError("same padding of an even kernel")
        padding = tuple(r // 2 for r in reach)
    return {
        "stride": tuple(conv.stride),
        "padding": tuple(padding),
        "dilation": tuple(conv.dilation),
        "groups": conv.groups,
    }


def _pool(pool: nn.MaxPool2d | nn.AvgPool2d) -> dict[str, Any]:
    return {
        "kernel": _pair(pool.kernel_size),
        "stride": _pair(pool.stride if pool.stride is not None else pool.kernel_size),
        "padding": _pair(pool.padding),
        "ceil_mode": pool.ceil_mode,
    }


def _pair(x: Any) -> tuple[Any, Any]:
    return (x, x) if isinstance(x, int) or x is None else (x[0], x[1])


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _batch_norm(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_var is not None and norm.running_mean is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale.float(), shift.float()


# --- rewriting ---------------------------------------------------------------------------------------------------------


def _uses(steps: list[Step], outputs: Any) -> dict[str, int]:
    uses: dict[str, int] = {}
    for name in [n for step in steps for n in step.inputs] + names_in(outputs):
        uses[name] = uses.get(name, 0) + 1
    return uses


def _fold(steps: list[Step], outputs: Any) -> list[Step]:
    """Drop identities, and fold each batch norm into the convolution before it, where nothing else reads that."""
    uses, renamed, done = _uses(steps, outputs), dict[str, str](), dict[str, Step]()
    kept_names = set(names_in(outputs))
    for step in steps:
        step = replace(step, inputs=tuple(renamed.get(n, n) for n in step.inputs))
        if step.kind == "identity" and step.name not in kept_names:
            renamed[step.name] = step.inputs[0]
            uses[step.inputs[0]] += uses.get(step.name, 0) - 1
            continue
        if step.kind == "affine":
            before = done.get(step.inputs[0])
            if (
                before is not None
                and before.kind == "conv"
                and before.options["act"] == "none"
                and uses[before.name] == 1
            ):
                scale, shift = step.options["scale"], step.options["shift"]
                weight, bias = before.options["weight"], before.options["bias"]
                folded = (weight.double() * scale.double().view(-1, 1, 1, 1)).float()
                moved = shift if bias is None else (bias.double() * scale.double() + shift.double()).float()
                del done[before.name]
                step = replace(before, name=step.name, options=before.options | {"weight": folded, "bias": moved})
        done[step.name] = step
    return list(done.values())


def _fuse(steps: list[Step], outputs: Any) -> list[Step]:
    """Let convolutions and linear layers add a residual and apply the activation that follow them."""
    uses, done = _uses(steps, outputs), dict[str, Step]()
    for step in steps:
        if step.kind == "add" and len(set(step.inputs)) == 2:
            # the later of the two takes the other in: by then that one is there
            places = list(done)
            order = sorted(step.inputs, key=lambda n: places.index(n) if n in done else -1, reverse=True)
            for mine, other in ((order[0], order[1]),):
                before = done.get(mine)
                if before is not None and before.kind == "conv" and _bare(before) and uses[mine] == 1:
                    del done[mine]
                    options = before.options | {"residual": True}
                    step = replace(before, name=step.name, inputs=(*before.inputs, other), options=options)
        elif step.kind == "act":
            before = done.get(step.inputs[0])
            if (
                before is not None
                and before.kind in _FUSES
                and before.options.get("act") == "none"
                and uses[before.name] == 1
            ):
                del done[before.name]
                step = replace(before, name=step.name, options=before.options | {"act": step.options["act"]})
        done[step.name] = step
    return list(done.values())


_FUSES = ("conv", "linear", "add", "multiply", "affine")


def _bare(step: Step) -> bool:
    return step.options["act"] == "none" and not step.options.get("residual")
