"""Sparse linear layers in bfloat16 and int8 as PyTorch operators, for inference: `torch.compile` and `torch.export` trace them.

A weight [M, K] is given by compressed rows, as in `ops`. It is packed at the first call, and again when it changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels import reference
from rarefy.kernels.lowp import Int8Linear, bfloat16_linear_layer
from rarefy.kernels.native import cpu_empty, threads
from rarefy.kernels.plans import PlanCache, Seen

_MANY = 64  # more samples than these are packed alike
_packed = PlanCache()
_library = torch.library.Library("rarefy", "FRAGMENT")
_library.define("sparse_linear_bfloat16(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? bias) -> Tensor")
_library.define(
    "sparse_linear_int8(Tensor x, float x_scale, int x_zero, Tensor values, Tensor crow, Tensor col, Tensor scale, "
    "Tensor? bias) -> Tensor"
)


def sparse_linear_bfloat16(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias with x and W rounded to bfloat16 and sums in float32; not differentiable.

    x [..., K] and values [nnz] are float32 or bfloat16, bias [M] float32 or bfloat16; the result [..., M] has the dtype of x.
    Raises OptionError where shapes, dtypes or devices do not fit, or where a gradient would be needed.

    >>> crow, col = torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1], dtype=torch.int32)
    >>> sparse_linear_bfloat16(torch.tensor([[1.0, 2.0, 3.001]]), torch.tensor([10.0, 1.0, 1.0]), crow, col)
    tensor([[30.,  3.]])
    """
    floats = (torch.float32, torch.bfloat16)
    _check("sparse_linear_bfloat16", x, values, crow, col, bias, floats, floats)
    flat = x.reshape(-1, x.shape[-1])
    return torch.ops.rarefy.sparse_linear_bfloat16(flat, values, crow, col, bias).view(*x.shape[:-1], crow.shape[0] - 1)


def sparse_linear_int8(
    x: Tensor,
    x_scale: float,
    x_zero: int,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Return scale * x_scale * (W (x - x_zero)) + bias, float32: products are exact in int32; not differentiable.

    x uint8 [..., K] stands for x_scale * (x - x_zero), values int8 [nnz], scale float32 [M], bias float32 [M]; the result is
    [..., M]. Raises OptionError where shapes, dtypes or devices do not fit, or the zero point is not in [0, 255].

    >>> crow, col = torch.tensor([0, 1]), torch.tensor([1], dtype=torch.int32)
    >>> weight, scale = torch.tensor([3], dtype=torch.int8), torch.tensor([0.5])
    >>> sparse_linear_int8(torch.tensor([[9, 12]], dtype=torch.uint8), 0.1, 10, weight, crow, col, scale)
    tensor([[0.3000]])
    """
    _check("sparse_linear_int8", x, values, crow, col, bias, (torch.uint8,), (torch.int8,))
    if scale.dtype != torch.float32 or tuple(scale.shape) != (crow.shape[0] - 1,) or scale.device != x.device:
        raise OptionError(
            f"sparse_linear_int8: scale must be float32 [{crow.shape[0] - 1}] on {x.device}; it is {scale.dtype} "
            f"{list(scale.shape)} on {scale.device}"
        )
    if not 0 <= x_zero <= 255:
        raise OptionError(f"sparse_linear_int8: the zero point {x_zero} is not in [0, 255]")
    flat = x.reshape(-1, x.shape[-1])
    y = torch.ops.rarefy.sparse_linear_int8(flat, x_scale, x_zero, values, crow, col, scale, bias)
    return y.view(*x.shape[:-1], crow.shape[0] - 1)


def _check(
    what: str, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, xs: Any, weights: Any
) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, values, bias) if t is not None):
        raise OptionError(f"{what}: it has no gradient; call it under torch.no_grad(), or train with sparse_linear")
    if x.dtype not in xs or values.dtype not in weights:
        raise OptionError(
            f"{what}: x is {x.dtype} and the values are {values.dtype}; they must be one of "
            f"{', '.join(map(str, xs))} and of {', '.join(map(str, weights))}"
        )
    if x.dim() < 1 or crow.dtype != torch.int64 or col.dtype != torch.int32 or values.shape != col.shape:
        raise OptionError(
            f"{what}: crow must be int64 [M + 1], col int32 [nnz] and values [nnz]; they are {crow.dtype} "
            f"{list(crow.shape)}, {col.dtype} {list(col.shape)} and {list(values.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (crow.shape[0] - 1,):
        raise OptionError(f"{what}: the bias must be [{crow.shape[0] - 1}]; it is {list(bias.shape)}")
    if len({t.device for t in (x, values, crow, col, bias) if t is not None}) > 1:
        raise OptionError(f"{what}: its tensors lie on several devices")


class _Packed:
    """A weight packed for a kernel, and what it was packed from. Calls from several threads take turns."""

    def __init__(self) -> None:
        self._turn, self._seen, self._kernel = threading.Lock(), Seen(), None

    def run(self, sources: tuple[Tensor, ...], pack: Callable[[], Any], call: Callable[[Any], Tensor]) -> Tensor:
        with self._turn:
            if not self._seen.again(*sources) or self._kernel is None:
                self._kernel = pack()
            return call(self._kernel)


def _size(n: int) -> int:
    """What a weight is packed for: powers of two, so that a few copies of it serve all numbers of samples."""
    return min(1 << (max(n, 1) - 1).bit_length(), _MANY)


def _bfloat16_cpu(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None) -> Tensor:
    n, features, t = x.shape[0], x.shape[1], threads()
    x32, y = x.detach().float().contiguous(), cpu_empty(x.shape[0], crow.shape[0] - 1)

    def pack() -> Any:
        vector = None if bias is None else bias.detach().float()
        return bfloat16_linear_layer((crow, col, values.detach()), vector, features=features, batch=n, threads=t)

    def call(layer: Any) -> Tensor:
        layer.run([x32.numpy()], y.numpy(), n, t)
        return y

    held: _Packed = _packed.get(crow, col, ("bfloat16", features, _size(n), t), _Packed)
    sources = (values,) if bias is None else (values, bias)
    held.run(sources, pack, call)
    return y.to(x.dtype)


def _bfloat16_reference(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None) -> Tensor:
    x32, v32 = x.bfloat16().float(), values.bfloat16().float()
    return reference.sparse_linear(x32, v32, crow, col, None if bias is None else bias.float()).to(x.dtype)


def _int8_cpu(
    x: Tensor,
    x_scale: float,
    x_zero: int,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    n, features, t = x.shape[0], x.shape[1], threads()

    held: _Packed = _packed.get(crow, col, ("int8", features, _size(n), t), _Packed)
    return held.run(
        (values, scale),
        lambda: Int8Linear((crow, col, values.detach()), scale.detach(), features=features, batch=n, threads=t),
        lambda product: product(x, x_scale, x_zero, bias),
    )


def _int8_reference(
    x: Tensor,
    x_scale: float,
    x_zero: int,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    product = reference.sparse_linear(x.double() - x_zero, values.double(), crow, col, None)
    y = product.float() * (scale * x_scale)
    return y if bias is None else y + bias


def _bfloat16_fake(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], crow.shape[0] - 1)


def _int8_fake(
    x: Tensor,
    x_scale: float,
    x_zero: int,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return scale.new_empty(x.shape[0], crow.shape[0] - 1)


for _name, _cpu, _reference, _fake in (
    ("sparse_linear_bfloat16", _bfloat16_cpu, _bfloat16_reference, _bfloat16_fake),
    ("sparse_linear_int8", _int8_cpu, _int8_reference, _int8_fake),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _reference, "CUDA")
    torch.library.register_fake(f"rarefy::{_name}", _fake, lib=_library)
