"""From steps to what runs: native layers where they exist, PyTorch's operators everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.deploy.graph import Step
from rarefy.errors import OptionError
from rarefy.kernels import lowp, n_m, planes, sparse_layers

Run = Callable[..., Tensor]
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}


def in_torch(step: Step) -> Run:
    """Return the step as PyTorch computes it, for inputs of any shape."""
    o = step.options
    if step.call is not None:
        return step.call
    if step.kind == "conv":
        return lambda x, *residual: ACTS[o["act"]](
            F.conv2d(x, o["weight"], o["bias"], o["stride"], o["padding"], o["dilation"], o["groups"])
            + (residual[0] if residual else 0)
        )
    if step.kind == "linear":
        return lambda x: ACTS[o["act"]](F.linear(x, o["weight"], o["bias"]))
    if step.kind in ("add", "multiply"):
        combine = torch.add if step.kind == "add" else torch.mul
        return lambda a, b: ACTS[o["act"]](combine(a, b))
    if step.kind == "max_pool":
        return lambda x: F.max_pool2d(x, o["kernel"], o["stride"], o["padding"], o["dilation"], o["ceil_mode"])
    if step.kind == "avg_pool":
        return lambda x: F.avg_pool2d(x, o["kernel"], o["stride"], o["padding"], o["ceil_mode"], o["count_include_pad"])
    if step.kind == "affine":
        scale, shift = (o[k].view(1, -1, 1, 1) for k in ("scale", "shift"))
        return lambda x: ACTS[o["act"]](x * scale + shift)
    simple: dict[str, Run] = {
        "act": lambda x: ACTS[o["act"]](x),
        "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, o["out"]),
        "mean": lambda x: x.mean((2, 3), keepdim=o["keepdim"]),
        "concat": lambda *xs: torch.cat(xs, 1),
        "flatten": lambda x: x.flatten(1),
        "identity": lambda x: x,
    }
    return simple[step.kind]


def native_layers(
    step: Step, inputs: Sequence[Tensor], out: Tensor, threads: int, dtype: torch.dtype = torch.float32
) -> dict[str, planes.Layer]:
    """Return the native ways to run the step on inputs and an output of these shapes, by name; none where there is none.

    A linear layer that keeps N in every run of M inputs has a kernel of its own beside the unstructured one. With bfloat16
    allowed, sparse products come in both precisions; inputs and output are float32 in any case.
    """
    if not all(_plain(t) for t in (*inputs, out)) or any(t.shape[0] != out.shape[0] for t in inputs):
        return {}
    makers = {"native": _make, "native n:m": _make_n_m}
    if dtype == torch.bfloat16:
        makers["native bfloat16"] = _make_low
    layers = {}
    for name, make in makers.items():
        try:
            layer = make(step, inputs, out, threads)
        except OptionError:
            continue
        if layer is not None:
            layers[name] = layer
    return layers


def dense_layer(step: Step, x: Tensor, dtype: torch.dtype = torch.float32) -> Run | None:
    """Return a convolution or linear step as oneDNN runs it, in `dtype`, from weights packed beforehand; None without oneDNN.

    Inputs and output stay float32.
    """
    ops, o = torch.ops.mkldnn, step.options
    if not torch.backends.mkldnn.is_available() or not isinstance(x, Tensor) or x.dtype != torch.float32:
        return None
    fused = o["act"] == "relu" and not o.get("residual")
    post, act = ("relu", ACTS["none"]) if fused else ("none", ACTS[o["act"]])
    weight = o["weight"].to(dtype)
    bias = None if o["bias"] is None else o["bias"].to(dtype)
    if step.kind == "linear":
        packed = ops._reorder_linear_weight(weight, math.prod(x.shape[:-1]))
        return lambda x: act(ops._linear_pointwise(x.to(dtype), packed, bias, post, [], "").float())
    geometry = (list(o["padding"]), list(o["stride"]), list(o["dilation"]), o["groups"])
    packed = ops._reorder_convolution_weight(weight, *geometry, list(x.shape))

    def run(x: Tensor, *residual: Tensor) -> Tensor:
        y = ops._convolution_pointwise(x.to(dtype), packed, bias, *geometry, post, [], "").float()
        return act(y + residual[0]) if residual else act(y)

    return run


def _plain(t: Any) -> bool:
    return (
        isinstance(t, Tensor)
        and t.dtype == torch.float32
        and t.device.type == "cpu"
        and t.dim() in (2, 3, 4)
        and t.numel() > 0
    )


def _make(step: Step, inputs: Sequence[Tensor], out: Tensor, threads: int) -> planes.Layer | None:
    o, x = step.options, inputs[0]
    act = o.get("act", "none")
    if step.kind == "conv":
        return _conv(step, x, threads)
    if step.kind == "linear":
        if x.dim() == 2 and _density(o["weight"]) > 0.7 and x.shape[0] <= 16:
            return planes.dense_linear(o["weight"], o["bias"], act)
        tokens = math.prod(x.shape[1:-1])
        return sparse_layers.sparse_linear_layer(
            o["weight"], o["bias"], tokens=tokens, act=act, batch=x.shape[0], threads=threads
        )
    size = math.prod(out.shape[1:])
    if step.kind == "act":
        return planes.activation(size, act)
    if step.kind in ("add", "multiply"):
        a, b = inputs
        if a.shape == b.shape:
            return (planes.add if step.kind == "add" else planes.multiply)(size, act)
        if step.kind == "multiply" and a.dim() == 4 and b.shape == (*a.shape[:2], 1, 1):
            return planes.scale_channels(a.shape[1], tuple(a.shape[2:]), act)
        return None
    if x.dim() != 4:
        return None
    channels, plane = x.shape[1], tuple(x.shape[2:])
    if step.kind == "max_pool":
        return planes.max_pool(channels, plane, **o)
    if step.kind == "avg_pool":
        return planes.avg_pool(channels, plane, **o)
    if step.kind in ("adaptive_avg_pool", "mean"):
        return planes.adaptive_avg_pool(channels, plane, tuple(out.shape[2:]) if out.dim() == 4 else 1)
    if step.kind == "affine":
        return planes.affine(o["scale"], o["shift"], plane, act)
    if step.kind == "concat":
        return planes.concat([math.prod(t.shape[1:]) for t in inputs])
    return None


def _make_n_m(step: Step, inputs: Sequence[Tensor], out: Tensor, threads: int) -> planes.Layer | None:
    """A linear step whose weight is N:M for any M that divides 16."""
    o = step.options
    if step.kind != "linear" or (steps := n_m.n_m_steps(o["weight"] != 0)) is None:
        return None
    tokens = math.prod(inputs[0].shape[1:-1])
    return n_m.n_m_linear_layer(o["weight"], o["bias"], tokens=tokens, act=o.get("act", "none"), steps=steps)


def _make_low(step: Step, inputs: Sequence[Tensor], out: Tensor, threads: int) -> planes.Layer | None:
    """The same in bfloat16, for products without a window."""
    o, x = step.options, inputs[0]
    packed: dict[str, Any] = {"act": o.get("act", "none"), "batch": x.shape[0], "threads": threads}
    if step.kind == "linear":
        return lowp.bfloat16_linear_layer(o["weight"], o["bias"], tokens=math.prod(x.shape[1:-1]), **packed)
    if step.kind == "conv" and _pointwise(o):
        residual = bool(o.get("residual"))
        return lowp.bfloat16_pointwise_layer(
            o["weight"].flatten(1), o["bias"], tuple(x.shape[2:]), residual=residual, **packed
        )
    return None


def _pointwise(o: dict[str, Any]) -> bool:
    plain = (o["stride"], o["padding"], o["dilation"]) == ((1, 1), (0, 0), (1, 1))
    return plain and tuple(o["weight"].shape[2:]) == (1, 1) and o["groups"] == 1


def _conv(step: Step, x: Tensor, threads: int) -> planes.Layer | None:
    o, size = step.options, tuple(x.shape[2:])
    weight, bias = o["weight"], o["bias"]
    geometry: dict[str, Any] = {k: o[k] for k in ("stride", "padding", "dilation")}
    common: dict[str, Any] = {"act": o["act"], "residual": bool(o.get("residual"))}
    if o["groups"] == x.shape[1] and weight.shape[1] == 1:
        return planes.depthwise(weight, bias, size, channels=x.shape[1], **geometry, **common)
    packed: dict[str, Any] = {"batch": x.shape[0], "threads": threads}
    if size == (1, 1) and weight.shape[1:] == (x.shape[1], 1, 1) and not o.get("residual") and _density(weight) > 0.5:
        return planes.dense_linear(weight.flatten(1), bias, o["act"])  # squeeze and excitation
    if _pointwise(o):
        return sparse_layers.sparse_pointwise_layer(weight, bias, size, **common, **packed)
    return sparse_layers.sparse_conv_layer(weight, bias, size, **geometry, groups=o["groups"], **common, **packed)


def _density(weight: Tensor) -> float:
    return int(weight.count_nonzero()) / max(weight.numel(), 1)
