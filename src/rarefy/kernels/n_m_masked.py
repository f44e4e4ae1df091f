"""A linear layer with a dense weight under a transposable N:M mask, its gradient passing straight through the mask.

What training with transposable masks computes at every step: y = x (W S)^T + b and dL/dx = dL/dy (W S) on the kernels of
`rarefy.kernels.n_m`, from one packed copy, and dL/dW = dL/dy^T x at every weight. The index is made once for each mask: a mask
that was changed in place is found to be another. A mask that is not N:M, such as one that keeps all, is multiplied in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.errors import OptionError, PatternError
from rarefy.kernels.n_m import TILE, NMIndex, index_of_tiles, n_m_gather
from rarefy.kernels.plans import PlanCache

SIZES = (2, 4, 8, 16)  # M that a tile of 16 holds
_indices = PlanCache()

_library = torch.library.Library("rarefy", "FRAGMENT")
_library.define("n_m_masked(Tensor x, Tensor weight, Tensor mask, Tensor? bias, int n, int m) -> (Tensor, Tensor)")
_library.define(
    "n_m_masked_input_gradient(Tensor dy, Tensor weight, Tensor values, Tensor mask, int n, int m) -> Tensor"
)


def n_m_masked_linear(x: Tensor, weight: Tensor, mask: Tensor, n: int, m: int, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, W the weight where the mask is True and zero elsewhere: x [..., in] -> [..., out].

    dL/dweight is dL/dy^T x, kept or not.

    Args:
        x, weight, bias: of one float dtype and device; weight [out, in]. Float32 on the CPU runs on the N:M kernels.
        mask: bool [out, in], True = kept; N of every M inputs and of every M outputs, else it is multiplied in.
        n, m: of the pattern; m is 2, 4, 8 or 16.

    Raises OptionError where shapes or dtypes do not fit.

    >>> mask = torch.eye(4, dtype=torch.bool)
    >>> n_m_masked_linear(torch.ones(1, 4), torch.full((4, 4), 2.0), mask, 1, 4)
    tensor([[2., 2., 2., 2.]])
    """
    if weight.dim() != 2 or mask.shape != weight.shape or mask.dtype != torch.bool or m not in SIZES or not 1 <= n <= m:
        raise OptionError(
            f"n_m_masked_linear: a weight [out, in] with a bool mask of its shape, and N:M with M in {SIZES}; given "
            f"{list(weight.shape)}, {mask.dtype} {list(mask.shape)} and {n}:{m}"
        )
    if x.shape[-1:] != weight.shape[1:] or x.dtype != weight.dtype:
        raise OptionError(
            f"n_m_masked_linear: x must be {weight.dtype} [..., {weight.shape[1]}]; it is {x.dtype} {list(x.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise OptionError(
            f"n_m_masked_linear: the bias must be {x.dtype} [{len(weight)}]; it is {bias.dtype} {list(bias.shape)}"
        )
    y, _ = torch.ops.rarefy.n_m_masked(x.reshape(-1, x.shape[-1]), weight, mask, bias, n, m)
    result: Tensor = y.view(*x.shape[:-1], weight.shape[0])
    return result


def _index_of(mask: Tensor, n: int, m: int) -> NMIndex | None:
    def make() -> NMIndex | None:
        try:
            return index_of_tiles(mask, n * (TILE // m), transposable=True)
        except PatternError:
            return None

    found: NMIndex | None = _indices.get(mask, mask, (n, m, mask.shape, mask.stride()), make)
    return found


def _places(weight: Tensor, n: int, m: int) -> tuple[int, int, int, int]:
    """Return the shape of packed values."""
    rows, cols = (-(-size // TILE) for size in weight.shape)
    return rows, cols, n * (TILE // m), TILE


def _linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor]:
    index = _index_of(mask, n, m) if weight.device.type == "cpu" and weight.dtype == torch.float32 else None
    if index is None:
        return F.linear(x, weight.masked_fill(~mask, 0), bias), weight.new_zeros(_places(weight, n, m))
    values = n_m_gather(weight, index)
    return torch.ops.rarefy.n_m_linear(x, values, index.index, index.used, bias, len(weight), True), values


def _linear_fake(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), weight.new_empty(_places(weight, n, m))


def _input(dy: Tensor, weight: Tensor, values: Tensor, mask: Tensor, n: int, m: int) -> Tensor:
    index = _index_of(mask, n, m) if weight.device.type == "cpu" and weight.dtype == torch.float32 else None
    if index is None:
        return dy @ weight.masked_fill(~mask, 0)
    dx: Tensor = torch.ops.rarefy.n_m_input_gradient(dy, values, index.index, index.used, weight.shape[1], True)
    return dx


def _input_fake(dy: Tensor, weight: Tensor, values: Tensor, mask: Tensor, n: int, m: int) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


def _save_linear(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    x, weight, mask, _, ctx.n, ctx.m = inputs
    ctx.save_for_backward(x, weight, output[1], mask)


def _linear_backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, values, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        torch.ops.rarefy.n_m_masked_input_gradient(dy, weight, values, mask, ctx.n, ctx.m) if needs[0] else None,
        dy.t() @ x if needs[1] else None,
        None,
        dy.sum(0) if needs[3] else None,
        None,
        None,
    )


def _save_input(ctx: Any, inputs: Any, output: Tensor) -> None:
    dy, weight, _, mask, ctx.n, ctx.m = inputs
    ctx.save_for_backward(dy, weight, mask)


def _input_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        torch.ops.rarefy.n_m_masked(g, weight, mask, None, ctx.n, ctx.m)[0] if needs[0] else None,
        dy.t() @ g if needs[1] else None,
        *[None] * 4,
    )


for _name, _run, _fake, _save, _backward in (
    ("n_m_masked", _linear, _linear_fake, _save_linear, _linear_backward),
    ("n_m_masked_input_gradient", _input, _input_fake, _save_input, _input_backward),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"rarefy::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"rarefy::{_name}", _backward, setup_context=_save, lib=_library)
