"""Sparse linear layers and convolutions for training: PyTorch operators with kept values as their parameter.

A sparse weight is given by compressed rows over the flattened weight [M = outputs, K = everything else]: `crow` int64 [M + 1],
`col` int32 [nnz], ascending within a row, and `values` [nnz]. Gradients are taken for the input and the kept values only;
nothing as large as the dense weight is made (on the CPU). The operators `rarefy::sparse_linear` and `rarefy::sparse_conv2d`
are known to autograd (any number of times differentiable), `torch.compile` and `torch.export`.

On the CPU float32 runs natively, bfloat16 and float16 by way of float32; everything else runs on the references below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels import reference
from rarefy.kernels.native import cpu_empty, native, threads
from rarefy.kernels.plans import PlanCache
from rarefy.kernels.watch import watched

_NATIVE = (torch.float32, torch.bfloat16, torch.float16)
_FEW = 32  # columns up to which the kernels pack another way
_plans = PlanCache()

_library = torch.library.Library("rarefy", "FRAGMENT")
_INDEX = "Tensor crow, Tensor col"
_GEOMETRY = "SymInt[] weight_shape, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
_library.define(f"sparse_linear(Tensor x, Tensor values, {_INDEX}, Tensor? bias) -> Tensor")
_library.define(f"sparse_linear_input_gradient(Tensor dy, Tensor values, {_INDEX}, SymInt in_features) -> Tensor")
_library.define(f"sparse_linear_values_gradient(Tensor x, Tensor dy, {_INDEX}) -> Tensor")
_library.define(f"sparse_conv2d(Tensor x, Tensor values, {_INDEX}, Tensor? bias, {_GEOMETRY}) -> Tensor")
_library.define(
    f"sparse_conv2d_input_gradient(Tensor dy, Tensor values, {_INDEX}, SymInt[] size, {_GEOMETRY}) -> Tensor"
)
_library.define(f"sparse_conv2d_values_gradient(Tensor x, Tensor dy, {_INDEX}, {_GEOMETRY}) -> Tensor")


# --- what users call ---------------------------------------------------------------------------------------------------


def sparse_linear(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias for a sparse W [M, K]: x [..., K] -> [..., M], in the dtype of x; differentiable.

    `values` [nnz] and `bias` [M] have the dtype of x (under autocast: are cast to it). Raises OptionError where shapes,
    dtypes or devices do not fit. The columns must lie in [0, K) and ascend within each row: checked once per topology.

    >>> crow, col = torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1], dtype=torch.int32)
    >>> sparse_linear(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([10.0, 1.0, 1.0]), crow, col)
    tensor([[30.,  3.]])
    """
    x, values, bias = _autocast(x, values, bias)
    check_compressed("sparse_linear", x, values, crow, col, bias)
    flat = x.reshape(-1, x.shape[-1])
    return torch.ops.rarefy.sparse_linear(flat, values, crow, col, bias).view(*x.shape[:-1], crow.shape[0] - 1)


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return the 2-D convolution of x [batch, in, height, width] (or without batch) with a sparse weight; differentiable.

    `weight_shape` is that of the dense weight, [out, in / groups, kernel height, kernel width]; `crow` and `col` index it
    flattened to [out, the rest]. The other arguments are those of `torch.nn.functional.conv2d`, each a pair.
    Raises OptionError where shapes, dtypes or devices do not fit.
    """
    x, values, bias = _autocast(x, values, bias)
    check_compressed("sparse_conv2d", x, values, crow, col, bias)
    shape = list(weight_shape)
    check_geometry("sparse_conv2d", x, crow, shape, stride, padding, dilation, groups)
    batch = x if x.dim() == 4 else x[None]
    y = torch.ops.rarefy.sparse_conv2d(
        batch, values, crow, col, bias, shape, list(stride), list(padding), list(dilation), groups
    )
    return y if x.dim() == 4 else y[0]


def check_geometry(
    what: str,
    x: Tensor,
    crow: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Raise OptionError where a convolution's image, weight and geometry do not fit each other."""
    if groups < 1 or x.dim() not in (3, 4) or len(shape) != 4 or x.shape[-3] != shape[1] * groups or shape[0] % groups:
        raise OptionError(
            f"{what}: x of shape {list(x.shape)} does not fit a weight of shape {list(shape)} with {groups} group(s): "
            "x must be [batch, in, height, width] with in = weight_shape[1] * groups"
        )
    if crow.shape[0] != shape[0] + 1:
        raise OptionError(f"{what}: crow has {crow.shape[0]} entries; {shape[0]} output channels need one more")
    if any(len(pair) != 2 for pair in (stride, padding, dilation)) or min(*stride, *dilation) < 1 or min(padding) < 0:
        raise OptionError(
            f"{what}: stride {list(stride)}, padding {list(padding)} and dilation {list(dilation)} must be pairs "
            "(height, width), positive or, for the padding, not negative"
        )
    for size, kernel, pad, spread in zip(x.shape[-2:], shape[2:], padding, dilation, strict=True):
        if size + 2 * pad <= spread * (kernel - 1):
            raise OptionError(
                f"{what}: a kernel of {list(shape[2:])} (dilation {list(dilation)}) does not fit images of "
                f"{list(x.shape[-2:])} with padding {list(padding)}"
            )


def _autocast(x: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
    return x, values, bias


def check_compressed(what: str, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None) -> None:
    """Raise OptionError where dtypes, lengths or devices of a sparse operator's tensors do not fit."""
    if crow.dtype != torch.int64 or col.dtype != torch.int32 or crow.dim() != 1 or col.dim() != 1 or not crow.shape[0]:
        raise OptionError(
            f"{what}: crow must be int64 [rows + 1] and col int32 [nnz]; "
            f"they are {crow.dtype} {list(crow.shape)} and {col.dtype} {list(col.shape)}"
        )
    if values.shape != col.shape:
        raise OptionError(f"{what}: {list(values.shape)} values for {list(col.shape)} columns")
    if not x.dtype.is_floating_point or values.dtype != x.dtype:
        raise OptionError(f"{what}: x is {x.dtype} and the values are {values.dtype}; both must be of one float dtype")
    if bias is not None and (bias.dtype != x.dtype or tuple(bias.shape) != (crow.shape[0] - 1,)):
        raise OptionError(
            f"{what}: the bias must be {x.dtype} [{crow.shape[0] - 1}]; it is {bias.dtype} {list(bias.shape)}"
        )
    devices = {t.device for t in (x, values, crow, col, bias) if t is not None}
    if len(devices) > 1:
        raise OptionError(f"{what}: its tensors lie on several devices: {', '.join(sorted(map(str, devices)))}")


# --- on the CPU --------------------------------------------------------------------------------------------------------


def _linear_plan(crow: Tensor, col: Tensor, in_features: int, n: int) -> Any:
    crow, col, t = crow.contiguous(), col.contiguous(), threads()
    use = ("linear", in_features, n <= _FEW, t)
    return _plans.get(crow, col, use, lambda: native.linear_training(crow.numpy(), col.numpy(), in_features, n, t))


def _conv_plan(
    crow: Tensor,
    col: Tensor,
    batch: int,
    size: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    crow, col, t = crow.contiguous(), col.contiguous(), threads()
    use = (*map(tuple, (size, weight_shape, stride, padding, dilation)), groups, batch * size[0] * size[1] <= _FEW, t)
    geometry = (list(weight_shape), list(size), list(stride), list(padding), list(dilation), groups, batch, t)
    return _plans.get(crow, col, use, lambda: native.conv_training(crow.numpy(), col.numpy(), *geometry))


def _array(tensor: Tensor) -> Any:
    return tensor.detach().float().contiguous().numpy()


def _maybe(tensor: Tensor | None) -> Any:
    return None if tensor is None else _array(tensor)


def _linear_cpu(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype not in _NATIVE:
        return reference.sparse_linear(x, values, crow, col, bias)
    y = cpu_empty(x.shape[0], crow.shape[0] - 1)
    plan = _linear_plan(crow, col, x.shape[1], x.shape[0])
    plan.forward(_array(values), _array(x), _maybe(bias), y.numpy(), threads())
    return y.to(x.dtype)


def _linear_input_cpu(dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, in_features: int) -> Tensor:
    if dy.dtype not in _NATIVE:
        return reference.sparse_linear_input_gradient(dy, values, crow, col, in_features)
    dx = cpu_empty(dy.shape[0], in_features)
    plan = _linear_plan(crow, col, in_features, dy.shape[0])
    plan.input_gradient(_array(values), _array(dy), dx.numpy(), threads())
    return dx.to(dy.dtype)


def _linear_values_cpu(x: Tensor, dy: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    if dy.dtype not in _NATIVE:
        return reference.sparse_linear_values_gradient(x, dy, crow, col)
    out = cpu_empty(*col.shape)
    _linear_plan(crow, col, x.shape[1], x.shape[0]).values_gradient(_array(x), _array(dy), out.numpy(), threads())
    return out.to(dy.dtype)


def out_size(size: Sequence[int], kernel: Sequence[int], geometry: Sequence[Sequence[int]]) -> list[int]:
    """Return a convolution's output height and width; `geometry` is stride, padding and dilation."""
    stride, padding, dilation = geometry
    every = zip(size, kernel, stride, padding, dilation, strict=True)
    return [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in every]


def _conv_cpu(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, weight_shape: list[int], *geometry: Any
) -> Tensor:
    if x.dtype not in _NATIVE:
        return reference.sparse_conv2d(x, values, crow, col, bias, weight_shape, *geometry)
    y = cpu_empty(x.shape[0], weight_shape[0], *out_size(x.shape[2:], weight_shape[2:], geometry[:3]))
    plan = _conv_plan(crow, col, x.shape[0], x.shape[2:], weight_shape, *geometry)
    plan.forward(_array(values), _array(x), _maybe(bias), y.numpy(), threads())
    return y.to(x.dtype)


def _conv_input_cpu(
    dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, size: list[int], weight_shape: list[int], *geometry: Any
) -> Tensor:
    if dy.dtype not in _NATIVE:
        return reference.sparse_conv2d_input_gradient(dy, values, crow, col, size, weight_shape, *geometry)
    dx = cpu_empty(dy.shape[0], weight_shape[1] * geometry[3], *size)
    plan = _conv_plan(crow, col, dy.shape[0], size, weight_shape, *geometry)
    plan.input_gradient(_array(values), _array(dy), dx.numpy(), threads())
    return dx.to(dy.dtype)


def _conv_values_cpu(
    x: Tensor, dy: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int], *geometry: Any
) -> Tensor:
    if x.dtype not in _NATIVE:
        return reference.sparse_conv2d_values_gradient(x, dy, crow, col, weight_shape, *geometry)
    out = cpu_empty(*col.shape)
    plan = _conv_plan(crow, col, x.shape[0], x.shape[2:], weight_shape, *geometry)
    plan.values_gradient(_array(x), _array(dy), out.numpy(), threads())
    return out.to(dy.dtype)


# --- shapes for tracing ------------------------------------------------------------------------------------------------


def _linear_fake(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], crow.shape[0] - 1)


def _linear_input_fake(dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, in_features: int) -> Tensor:
    return dy.new_empty(dy.shape[0], in_features)


def _values_fake(x: Tensor, dy: Tensor, crow: Tensor, col: Tensor, *geometry: Any) -> Tensor:
    return dy.new_empty(col.shape)


def _conv_fake(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, weight_shape: list[int], *geometry: Any
) -> Tensor:
    return x.new_empty(x.shape[0], weight_shape[0], *out_size(x.shape[2:], weight_shape[2:], geometry[:3]))


def _conv_input_fake(
    dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, size: list[int], weight_shape: list[int], *geometry: Any
) -> Tensor:
    return dy.new_empty(dy.shape[0], weight_shape[1] * geometry[3], *size)


# --- gradients: every operator's are made of the other two, so that gradients of gradients come by themselves ------------


def _save_linear(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, values, crow, col, _ = inputs
    ctx.save_for_backward(x, values, crow, col)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, crow, col = ctx.saved_tensors
    want_x, want_values, _, _, want_bias = ctx.needs_input_grad
    ops = torch.ops.rarefy
    return (
        ops.sparse_linear_input_gradient(dy, values, crow, col, x.shape[1]) if want_x else None,
        ops.sparse_linear_values_gradient(x, dy, crow, col) if want_values else None,
        None,
        None,
        dy.sum(0) if want_bias else None,
    )


def _save_linear_input(ctx: Any, inputs: Any, output: Tensor) -> None:
    dy, values, crow, col, _ = inputs
    ctx.save_for_backward(dy, values, crow, col)


def _linear_input_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, values, crow, col = ctx.saved_tensors
    ops = torch.ops.rarefy
    return (
        ops.sparse_linear(g, values, crow, col, None) if ctx.needs_input_grad[0] else None,
        ops.sparse_linear_values_gradient(g, dy, crow, col) if ctx.needs_input_grad[1] else None,
        *[None] * 3,
    )


def _save_values(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, dy, crow, col, *ctx.geometry = inputs
    ctx.save_for_backward(x, dy, crow, col)


def _linear_values_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, crow, col = ctx.saved_tensors
    ops = torch.ops.rarefy
    return (
        ops.sparse_linear_input_gradient(dy, g, crow, col, x.shape[1]) if ctx.needs_input_grad[0] else None,
        ops.sparse_linear(x, g, crow, col, None) if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


def _save_conv(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, values, crow, col, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, values, crow, col)


def _conv_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, crow, col = ctx.saved_tensors
    ops, size = torch.ops.rarefy, list(x.shape[2:])
    want_x, want_values, _, _, want_bias = ctx.needs_input_grad[:5]
    return (
        ops.sparse_conv2d_input_gradient(dy, values, crow, col, size, *ctx.geometry) if want_x else None,
        ops.sparse_conv2d_values_gradient(x, dy, crow, col, *ctx.geometry) if want_values else None,
        None,
        None,
        dy.sum((0, 2, 3)) if want_bias else None,
        *[None] * 5,
    )


def _save_conv_input(ctx: Any, inputs: Any, output: Tensor) -> None:
    dy, values, crow, col, _, *ctx.geometry = inputs
    ctx.save_for_backward(dy, values, crow, col)


def _conv_input_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, values, crow, col = ctx.saved_tensors
    ops = torch.ops.rarefy
    return (
        ops.sparse_conv2d(g, values, crow, col, None, *ctx.geometry) if ctx.needs_input_grad[0] else None,
        ops.sparse_conv2d_values_gradient(g, dy, crow, col, *ctx.geometry) if ctx.needs_input_grad[1] else None,
        *[None] * 8,
    )


def _conv_values_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, crow, col = ctx.saved_tensors
    ops, size = torch.ops.rarefy, list(x.shape[2:])
    return (
        ops.sparse_conv2d_input_gradient(dy, g, crow, col, size, *ctx.geometry) if ctx.needs_input_grad[0] else None,
        ops.sparse_conv2d(x, g, crow, col, None, *ctx.geometry) if ctx.needs_input_grad[1] else None,
        *[None] * 7,
    )


for _name, _cpu, _fake, _save, _backward in (
    ("sparse_linear", _linear_cpu, _linear_fake, _save_linear, _linear_backward),
    ("sparse_linear_input_gradient", _linear_input_cpu, _linear_input_fake, _save_linear_input, _linear_input_backward),
    ("sparse_linear_values_gradient", _linear_values_cpu, _values_fake, _save_values, _linear_values_backward),
    ("sparse_conv2d", _conv_cpu, _conv_fake, _save_conv, _conv_backward),
    ("sparse_conv2d_input_gradient", _conv_input_cpu, _conv_input_fake, _save_conv_input, _conv_input_backward),
    ("sparse_conv2d_values_gradient", _conv_values_cpu, _values_fake, _save_values, _conv_values_backward),
):
    _seen = watched if _name.endswith("values_gradient") else lambda run: run
    _library.impl(_name, _seen(_cpu), "CPU")
    _library.impl(_name, _seen(getattr(reference, _name)), "CUDA")
    torch.library.register_fake(f"rarefy::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"rarefy::{_name}", _backward, setup_context=_save, lib=_library)
