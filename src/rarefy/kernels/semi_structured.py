"""2:4 on CUDA by `torch.sparse`'s semi-structured tensors, behind checks of our own that say why it cannot be used.

Sparse tensor cores (compute capability 8.0 and later) take a weight that keeps at most 2 of every 4 inputs. `reason_against`
looks at all that PyTorch's two backends (cuSPARSELt, CUTLASS) ask for, and at the zeros themselves, which they do not check:
cuSPARSELt would compute something else without a word.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Multiples of rows and columns that both backends take (torch/sparse/semi_structured.py: _DTYPE_SHAPE_CONSTRAINTS).
MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (32, 128)}
LEAST_CAPABILITY = (8, 0)
_ALIGNMENT = 16  # bytes


def reason_against(weight: Tensor, mask: Tensor | None = None, *, both: bool = False) -> str | None:
    """Say why a weight cannot run as 2:4 by `torch.sparse`; None where it can.

    Args:
        weight: [out, in], in the dtype that it will be computed in (float16, bfloat16 or int8).
        mask: bool [out, in], True = kept; default: where the weight is not zero.
        both: its transpose too, for the input's gradient: at most 2 of every 4 outputs are kept, and the shape fits both ways.

    >>> reason_against(torch.zeros(32, 64, dtype=torch.float16))
    'it is on cpu; PyTorch has semi-structured kernels for CUDA only'
    """
    return layout_problem(weight, both=both) or pattern_problem(weight != 0 if mask is None else mask, both=both)


def layout_problem(weight: Tensor, *, both: bool = False) -> str | None:
    """The part of `reason_against` that costs nothing: device, dtype, shape, strides and alignment."""
    if (problem := device_problem(weight.device)) is not None:
        return problem
    if weight.dtype not in MULTIPLES:
        tip = "; use float16 or bfloat16, or autocast" if weight.dtype == torch.float32 else ""
        return f"it is {weight.dtype}; sparse tensor cores take {', '.join(map(str, MULTIPLES))}{tip}"
    if weight.dim() != 2:
        return f"it has {weight.dim()} dimensions, not 2"
    rows, cols = MULTIPLES[weight.dtype]
    if both:
        rows = cols = max(rows, cols)
    if weight.shape[0] % rows or weight.shape[1] % cols or 0 in weight.shape:
        return f"its shape {list(weight.shape)} is not a multiple of [{rows}, {cols}], as {weight.dtype} needs"
    if not weight.is_contiguous():
        return f"it is not contiguous (strides {list(weight.stride())}); call .contiguous()"
    if weight.data_ptr() % _ALIGNMENT:
        return f"it does not begin at a multiple of {_ALIGNMENT} bytes; copy it with .clone()"
    return None


def device_problem(device: torch.device) -> str | None:
    """Say why this device, with this PyTorch, has no semi-structured product."""
    if device.type != "cuda":
        return f"it is on {device}; PyTorch has semi-structured kernels for CUDA only"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm; the check knows CUDA's sparse tensor cores only"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}; sparse tensor cores need {least}"
    return None


def pattern_problem(mask: Tensor, *, both: bool = False) -> str | None:
    """Say where a mask [out, in] keeps more than 2 of 4."""
    for kept, what in ((mask, "inputs"), (mask.t(), "outputs"))[: 1 + both]:
        if kept.shape[1] % 4:
            return f"its {kept.shape[1]} {what} are not a multiple of 4"
        most = int(kept.reshape(kept.shape[0], -1, 4).sum(2).max()) if kept.numel() else 0
        if most > 2:
            also = ", which the input's gradient needs (a transposable mask)" if what == "outputs" else ""
            return f"it keeps {most} of 4 neighbouring {what} somewhere, not 2{also}"
    return None


def convert(weight: Tensor) -> Any:
    """Compress a weight that has passed the checks."""
    return torch.sparse.to_sparse_semi_structured(weight)


def linear(
    x: Tensor, weight: Tensor, mask: Tensor, packed: Any, turned: Any, bias: Tensor | None, *, dense_gradient: bool
) -> Tensor:
    """Return x W^T + bias on sparse tensor cores; differentiable in x, weight and bias.

    Args:
        x: [..., in]. weight: the dense weight, for the gradients: of all its entries with `dense_gradient`, else of the kept.
        mask: bool [out, in].
        packed, turned: `convert` of the masked weight and of its transpose; without the latter (None) the input's gradient is
            a dense product.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()  # cuSPARSELt takes any other strides for those of a transpose
    y: Tensor = _Linear.apply(flat, weight, mask, packed, turned, bias, dense_gradient)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, packed: Any, turned: Any, bias: Tensor | None, dense: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        ctx.turned, ctx.dense = turned, dense
        return _product(x, packed, len(weight), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        dy = dy.contiguous()
        need_x, need_weight, *_, need_bias, _ = ctx.needs_input_grad
        dx = dw = None
        if need_x:
            kept = weight.masked_fill(~mask, 0) if ctx.turned is None else None
            dx = _product(dy, ctx.turned, weight.shape[1], None) if kept is None else dy @ kept
        if need_weight:
            dw = dy.t() @ x
            dw = dw if ctx.dense else dw.masked_fill_(~mask, 0)
        return dx, dw, None, None, None, dy.sum(0) if need_bias else None, None


def _product(x: Tensor, packed: Any, outputs: int, bias: Tensor | None) -> Tensor:
    """x [n, in] -> [n, out]. PyTorch's product of a packed weight refuses n = 0."""
    return F.linear(x, packed, bias) if len(x) else x.new_empty(0, outputs)
