"""Convolution with sparse weights for inference: bias, residual and activation in the same pass, packed once.

The weight is given by compressed rows, as `rarefy.kernels.ops` says; the operator `rarefy::spconv2d` is known to
`torch.compile` and `torch.export`. On the CPU float32 runs natively, everything else on the reference below. It has no
gradient: to train, use `kernels.sparse_conv2d`; for whole networks, `sparse_layers.sparse_conv_layer` in a `Program`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels import reference
from rarefy.kernels.native import native, threads
from rarefy.kernels.ops import check_compressed, check_geometry, out_size
from rarefy.kernels.plans import PlanCache, Seen

__all__ = ["ACTIVATIONS", "spconv2d"]

ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}

_MANY = 64  # more columns than these are packed alike
_packed = PlanCache()
_library = torch.library.Library("rarefy", "FRAGMENT")
_library.define(
    "spconv2d(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? bias, Tensor? residual, SymInt[] weight_shape, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str act) -> Tensor"
)


def spconv2d(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    act: str = "none",
) -> Tensor:
    """Return act(conv2d(x, W) + bias + residual) for x [batch, in, height, width] and a sparse W; not differentiable.

    `weight_shape` is that of the dense weight, [out, in / groups, kernel height, kernel width]; `crow` int64 [out + 1]
    and `col` int32 [nnz] index it flattened to [out, the rest]; `residual` has the output's shape;
    `act` is one of `ACTIVATIONS`.
    The weight is packed at the first call and again when `crow` or `col` changed; `values` that changed are renewed in place.
    Raises OptionError where shapes, dtypes or devices do not fit, or where a gradient would be needed.
    Method: the direct sparse convolution of Elsen et al., "Fast Sparse ConvNets", 2019, widened from 1 x 1 to any kernel.

    >>> crow, col = torch.tensor([0, 1]), torch.tensor([4], dtype=torch.int32)  # one 3 x 3 filter, only its centre
    >>> spconv2d(torch.ones(1, 1, 1, 2), torch.tensor([2.0]), crow, col, weight_shape=(1, 1, 3, 3), padding=(1, 1))
    tensor([[[[2., 2.]]]])
    """
    given = [t for t in (x, values, bias, residual) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise OptionError(
            "spconv2d: it has no gradient; call it under torch.no_grad(), or use kernels.sparse_conv2d to train"
        )
    check_compressed("spconv2d", x, values, crow, col, bias)
    shape = list(weight_shape)
    pairs = (list(stride), list(padding), list(dilation))
    if x.dim() != 4:
        raise OptionError(f"spconv2d: x must be [batch, in, height, width]; it is {list(x.shape)}")
    check_geometry("spconv2d", x, crow, shape, *pairs, groups)
    if act not in ACTIVATIONS:
        raise OptionError(f"spconv2d: no such activation: {act!r}; choose one of {', '.join(ACTIVATIONS)}")
    if residual is not None:
        want = [x.shape[0], shape[0], *out_size(x.shape[2:], shape[2:], pairs)]
        if list(residual.shape) != want or residual.dtype != x.dtype or residual.device != x.device:
            raise OptionError(
                f"spconv2d: the residual must be {x.dtype} {want} on {x.device}; "
                f"it is {residual.dtype} {list(residual.shape)} on {residual.device}"
            )
    return torch.ops.rarefy.spconv2d(x, values, crow, col, bias, residual, shape, *pairs, groups, act)


class _Packed:
    """A packed weight and which values it holds. Calls from several threads take turns."""

    def __init__(self, conv: Any) -> None:
        self._conv = conv
        self._turn = threading.Lock()
        self._seen = Seen()

    def run(self, values: Tensor, *args: Any) -> None:
        """Convolve with these values."""
        with self._turn:
            if not self._seen.again(values):
                self._conv.set_values(values.contiguous().numpy())
            self._conv.run(*args)


def _cpu(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, residual: Tensor | None,
    weight_shape: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int, act: str,
) -> Tensor:  # fmt: skip
    if x.dtype != torch.float32:
        return _reference(x, values, crow, col, bias, residual, weight_shape, stride, padding, dilation, groups, act)
    values, crow, col, t = values.detach(), crow.contiguous(), col.contiguous(), threads()
    batch, size = x.shape[0], list(x.shape[2:])
    y = x.new_empty(batch, weight_shape[0], *out_size(size, weight_shape[2:], (stride, padding, dilation)))
    geometry = (weight_shape, size, stride, padding, dilation)

    def pack() -> _Packed:
        arrays = (crow.numpy(), col.numpy(), values.contiguous().numpy())
        return _Packed(native.conv(*arrays, *geometry, groups, batch, t))

    use = (*map(tuple, geometry), groups, min(batch * y.shape[2] * y.shape[3], _MANY), t)
    arrays = [None if a is None else a.detach().contiguous().numpy() for a in (bias, residual)]
    packed = _packed.get(crow, col, use, pack)
    packed.run(values, x.detach().contiguous().numpy(), y.numpy(), *arrays, act, t)
    return y


def _reference(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, residual: Tensor | None,
    weight_shape: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int, act: str,
) -> Tensor:  # fmt: skip
    y = reference.sparse_conv2d(x, values, crow, col, bias, weight_shape, stride, padding, dilation, groups)
    return ACTIVATIONS[act](y if residual is None else y + residual)


def _fake(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, residual: Tensor | None,
    weight_shape: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int, act: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(
        x.shape[0], weight_shape[0], *out_size(x.shape[2:], weight_shape[2:], (stride, padding, dilation))
    )


_library.impl("spconv2d", _cpu, "CPU")
_library.impl("spconv2d", _reference, "CUDA")
torch.library.register_fake("rarefy::spconv2d", _fake, lib=_library)
