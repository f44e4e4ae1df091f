"""N:M linear layers as PyTorch operators, known to autograd, `torch.compile` and `torch.export`. See `rarefy.kernels.n_m`.

`values` float [R, C, steps, 16], `index` int32 [R, C, lines, 16] and `used` int16 [R, C, steps] are those of `NMIndex`; `both`
says that every step is a permutation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.kernels import reference
from rarefy.kernels.native import cpu_empty, native, threads
from rarefy.kernels.plans import PlanCache

TILE = 16
_NATIVE = (torch.float32, torch.bfloat16, torch.float16)
_FEW = 32  # samples up to which the unstructured kernel packs another way
_plans = PlanCache()

_library = torch.library.Library("rarefy", "FRAGMENT")
_INDEX = "Tensor index, Tensor used"
_library.define(f"n_m_gather(Tensor weight, {_INDEX}) -> Tensor")
_library.define(f"n_m_scatter(Tensor values, {_INDEX}, SymInt out_features, SymInt in_features) -> Tensor")
_library.define(
    f"n_m_linear(Tensor x, Tensor values, {_INDEX}, Tensor? bias, SymInt out_features, bool both) -> Tensor"
)
_library.define(
    f"n_m_linear_straight(Tensor x, Tensor values, {_INDEX}, Tensor? bias, Tensor weight, bool both) -> Tensor"
)
_library.define(f"n_m_input_gradient(Tensor dy, Tensor values, {_INDEX}, SymInt in_features, bool both) -> Tensor")
_library.define(f"n_m_values_gradient(Tensor x, Tensor dy, {_INDEX}, bool both) -> Tensor")


# --- on the CPU --------------------------------------------------------------------------------------------------------


def _floats(tensor: Tensor) -> Any:
    return tensor.detach().float().contiguous().numpy()


def _flat(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().view(-1).numpy()


def _gather_cpu(weight: Tensor, index: Tensor, used: Tensor) -> Tensor:
    if weight.dtype not in _NATIVE:
        return reference.n_m_gather(weight, index, used)
    values = cpu_empty(*used.shape, TILE)
    native.n_m_gather(_floats(weight), _flat(index), _flat(used), used.shape[2], values.view(-1).numpy(), threads())
    return values.to(weight.dtype)


def _scatter_cpu(values: Tensor, index: Tensor, used: Tensor, out_features: int, in_features: int) -> Tensor:
    if values.dtype not in _NATIVE:
        return reference.n_m_scatter(values, index, used, out_features, in_features)
    weight = cpu_empty(out_features, in_features)
    native.n_m_scatter(_flat(values.float()), _flat(index), _flat(used), used.shape[2], weight.numpy(), threads())
    return weight.to(values.dtype)


def _linear_cpu(
    x: Tensor, values: Tensor, index: Tensor, used: Tensor, bias: Tensor | None, out_features: int, both: bool
) -> Tensor:
    if x.dtype not in _NATIVE:
        return reference.n_m_linear(x, values, index, used, bias, out_features)
    y = cpu_empty(x.shape[0], out_features)
    given = None if bias is None else _floats(bias)
    native.n_m_forward(_flat(values.float()), _flat(index), used.shape[2], _floats(x), given, y.numpy(), threads())
    return y.to(x.dtype)


def _straight_cpu(
    x: Tensor, values: Tensor, index: Tensor, used: Tensor, bias: Tensor | None, weight: Tensor, both: bool
) -> Tensor:
    return _linear_cpu(x, values, index, used, bias, weight.shape[0], both)


def _input_cpu(dy: Tensor, values: Tensor, index: Tensor, used: Tensor, in_features: int, both: bool) -> Tensor:
    if dy.dtype not in _NATIVE:
        return reference.n_m_input_gradient(dy, values, index, used, in_features)
    dx = cpu_empty(dy.shape[0], in_features)
    if both:
        native.n_m_input_gradient(
            _flat(values.float()), _flat(index), used.shape[2], _floats(dy), dx.numpy(), threads()
        )
    else:
        training, order = _unstructured(index, used, dy.shape, in_features)
        kept = values.detach().float().reshape(-1)[order]
        training.input_gradient(kept.numpy(), _floats(dy), dx.numpy(), threads())
    return dx.to(dy.dtype)


def _unstructured(index: Tensor, used: Tensor, shape: torch.Size, in_features: int) -> tuple[Any, Tensor]:
    """Return the unstructured kernel for a weight that is N:M along its inputs only, and its values' places among ours."""
    index, used, t = index.contiguous(), used.contiguous(), threads()
    few = shape[0] <= _FEW

    def make() -> tuple[Any, Tensor]:
        rows, cols = (place[:, :, : used.shape[2]] for place in reference.n_m_places(index))
        kept = reference.n_m_used(used).reshape(-1).nonzero().squeeze(1)
        flat = rows.reshape(-1)[kept] * in_features + cols.reshape(-1)[kept]
        order = flat.argsort()
        position = flat[order]
        row = torch.div(position, in_features, rounding_mode="floor")
        crow = torch.searchsorted(row, torch.arange(shape[1] + 1, device="cpu"))
        col = (position - row * in_features).int()
        return native.linear_training(crow.numpy(), col.numpy(), in_features, shape[0], t), kept[order]

    found: tuple[Any, Tensor] = _plans.get(index, used, (shape[1], in_features, few, t), make)
    return found


def _values_cpu(x: Tensor, dy: Tensor, index: Tensor, used: Tensor, both: bool) -> Tensor:
    if dy.dtype not in _NATIVE:
        return reference.n_m_values_gradient(x, dy, index, used)
    out = cpu_empty(*used.shape, TILE)
    native.n_m_values_gradient(
        _flat(index), _flat(used), used.shape[2], _floats(x), _floats(dy), out.view(-1).numpy(), threads()
    )
    return out.to(dy.dtype)


# --- elsewhere: the references ------------------------------------------------------------------------------------------


def _linear_anywhere(
    x: Tensor, values: Tensor, index: Tensor, used: Tensor, bias: Tensor | None, out_features: int, both: bool
) -> Tensor:
    return reference.n_m_linear(x, values, index, used, bias, out_features)


def _straight_anywhere(
    x: Tensor, values: Tensor, index: Tensor, used: Tensor, bias: Tensor | None, weight: Tensor, both: bool
) -> Tensor:
    return reference.n_m_linear(x, values, index, used, bias, weight.shape[0])


def _input_anywhere(dy: Tensor, values: Tensor, index: Tensor, used: Tensor, in_features: int, both: bool) -> Tensor:
    return reference.n_m_input_gradient(dy, values, index, used, in_features)


def _values_anywhere(x: Tensor, dy: Tensor, index: Tensor, used: Tensor, both: bool) -> Tensor:
    return reference.n_m_values_gradient(x, dy, index, used)


# --- shapes for tracing -------------------------------------------------------------------------------------------------


def _gather_fake(weight: Tensor, index: Tensor, used: Tensor) -> Tensor:
    return weight.new_empty(*used.shape, TILE)


def _scatter_fake(values: Tensor, index: Tensor, used: Tensor, out_features: int, in_features: int) -> Tensor:
    return values.new_empty(out_features, in_features)


def _linear_fake(
    x: Tensor, values: Tensor, index: Tensor, used: Tensor, bias: Tensor | None, out_features: int, both: bool
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _straight_fake(
    x: Tensor, values: Tensor, index: Tensor, used: Tensor, bias: Tensor | None, weight: Tensor, both: bool
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _input_fake(dy: Tensor, values: Tensor, index: Tensor, used: Tensor, in_features: int, both: bool) -> Tensor:
    return dy.new_empty(dy.shape[0], in_features)


def _values_fake(x: Tensor, dy: Tensor, index: Tensor, used: Tensor, both: bool) -> Tensor:
    return dy.new_empty(*used.shape, TILE)


# --- gradients: every operator's are made of the others ------------------------------------------------------------------


def _save_gather(ctx: Any, inputs: Any, output: Tensor) -> None:
    weight, index, used = inputs
    ctx.shape = weight.shape
    ctx.save_for_backward(index, used)


def _gather_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    index, used = ctx.saved_tensors
    return torch.ops.rarefy.n_m_scatter(g, index, used, *ctx.shape), None, None


def _save_scatter(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _scatter_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.rarefy.n_m_gather(g, *ctx.saved_tensors), *[None] * 4


def _save_linear(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, values, index, used, _, _, ctx.both = inputs
    ctx.save_for_backward(x, values, index, used)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, index, used = ctx.saved_tensors
    ops, needs = torch.ops.rarefy, ctx.needs_input_grad
    return (
        ops.n_m_input_gradient(dy, values, index, used, x.shape[1], ctx.both) if needs[0] else None,
        ops.n_m_values_gradient(x, dy, index, used, ctx.both) if needs[1] else None,
        None,
        None,
        dy.sum(0) if needs[4] else None,
        None,
        None,
    )


def _straight_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, index, used = ctx.saved_tensors
    ops, needs = torch.ops.rarefy, ctx.needs_input_grad
    return (
        ops.n_m_input_gradient(dy, values, index, used, x.shape[1], ctx.both) if needs[0] else None,
        None,
        None,
        None,
        dy.sum(0) if needs[4] else None,
        dy.t() @ x if needs[5] else None,
        None,
    )


def _save_input(ctx: Any, inputs: Any, output: Tensor) -> None:
    dy, values, index, used, _, ctx.both = inputs
    ctx.save_for_backward(dy, values, index, used)


def _input_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, values, index, used = ctx.saved_tensors
    ops, needs = torch.ops.rarefy, ctx.needs_input_grad
    return (
        ops.n_m_linear(g, values, index, used, None, dy.shape[1], ctx.both) if needs[0] else None,
        ops.n_m_values_gradient(g, dy, index, used, ctx.both) if needs[1] else None,
        *[None] * 4,
    )


def _save_values(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, dy, index, used, ctx.both = inputs
    ctx.save_for_backward(x, dy, index, used)


def _values_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, index, used = ctx.saved_tensors
    ops, needs = torch.ops.rarefy, ctx.needs_input_grad
    # a place that is not used has no gradient, so nothing goes back through it
    g = torch.where(reference.n_m_used(used), g, 0) if needs[0] or needs[1] else g
    return (
        ops.n_m_input_gradient(dy, g, index, used, x.shape[1], ctx.both) if needs[0] else None,
        ops.n_m_linear(x, g, index, used, None, dy.shape[1], ctx.both) if needs[1] else None,
        *[None] * 3,
    )


for _name, _cpu, _anywhere, _fake, _save, _backward in (
    ("n_m_gather", _gather_cpu, reference.n_m_gather, _gather_fake, _save_gather, _gather_backward),
    ("n_m_scatter", _scatter_cpu, reference.n_m_scatter, _scatter_fake, _save_scatter, _scatter_backward),
    ("n_m_linear", _linear_cpu, _linear_anywhere, _linear_fake, _save_linear, _linear_backward),
    ("n_m_linear_straight", _straight_cpu, _straight_anywhere, _straight_fake, _save_linear, _straight_backward),
    ("n_m_input_gradient", _input_cpu, _input_anywhere, _input_fake, _save_input, _input_backward),
    ("n_m_values_gradient", _values_cpu, _values_anywhere, _values_fake, _save_values, _values_backward),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _anywhere, "CUDA")
    torch.library.register_fake(f"rarefy::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"rarefy::{_name}", _backward, setup_context=_save, lib=_library)
