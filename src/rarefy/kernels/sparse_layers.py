"""Sparse layers of a native network: 1 x 1 convolution, linear, and convolution of any geometry.

A weight is given dense, its zeros being what is left out, or as (crow, col, values): compressed rows of the flattened weight
[out, everything else], with crow int64 [out + 1], col int32 ascending in each row, values float32. Bias is [out] or None; `act`
is one of `planes.ACTIVATIONS`, applied after bias and residual; with `residual`, the layer has a second input of the output's
shape. `batch` and `threads` say what the weight is packed for: the layer runs with others too.
All raise OptionError when sizes do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels.native import native
from rarefy.kernels.native import threads as all_threads
from rarefy.kernels.planes import Ints, Layer, _array, _known, _pair, _said

__all__ = ["Weight", "sparse_conv_layer", "sparse_linear_layer", "sparse_pointwise_layer"]

Weight = Tensor | tuple[Tensor, Tensor, Tensor]


def sparse_pointwise_layer(
    weight: Weight,
    bias: Tensor | None,
    size: Ints,
    *,
    channels: int | None = None,
    act: str = "none",
    residual: bool = False,
    batch: int = 1,
    threads: int | None = None,
) -> Layer:
    """1 x 1 convolution of [in, *size] planes.

    `weight` is [out, in] or [out, in, 1, 1]; compressed, `channels` says how many go in.
    """
    crow, col, values, cols = _compressed(weight, channels)
    pixels = math.prod(_pair(size))
    with _said("sparse_pointwise_layer"):
        return native.SparsePlanes(
            crow, col, values, cols, pixels, _array(bias), residual, _known(act), batch, threads or all_threads()
        )


def sparse_linear_layer(
    weight: Weight,
    bias: Tensor | None,
    *,
    features: int | None = None,
    tokens: int = 1,
    act: str = "none",
    batch: int = 1,
    threads: int | None = None,
) -> Layer:
    """Linear layer with `weight` [out, in], for samples of [tokens, in]; compressed, `features` says how many go in."""
    crow, col, values, cols = _compressed(weight, features)
    with _said("sparse_linear_layer"):
        return native.SparseLinear(
            crow, col, values, cols, tokens, _array(bias), _known(act), batch, threads or all_threads()
        )


def sparse_conv_layer(
    weight: Weight,
    bias: Tensor | None,
    size: Ints,
    *,
    shape: Sequence[int] | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    act: str = "none",
    residual: bool = False,
    batch: int = 1,
    threads: int | None = None,
) -> Layer:
    """Convolution of [in, *size] planes. `weight` [out, in / groups, kh, kw]; compressed, `shape` is its dense shape."""
    if isinstance(weight, Tensor):
        shape = weight.shape
    if shape is None or len(shape) != 4:
        raise OptionError("sparse_conv_layer: the weight's shape [out, in / groups, kh, kw] is needed")
    crow, col, values, _ = _compressed(weight, math.prod(shape[1:]))
    with _said("sparse_conv_layer"):
        return native.SparseConv(
            crow, col, values, list(shape), _pair(size), _pair(stride), _pair(padding), _pair(dilation), groups,
            _array(bias), residual, _known(act), batch, threads or all_threads(),
        )  # fmt: skip


def _compressed(weight: Weight, cols: int | None) -> tuple[object, object, object, int]:
    if isinstance(weight, Tensor):
        flat = weight.detach().to("cpu", torch.float32).reshape(weight.shape[0], -1)
        kept = flat != 0
        crow = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), kept.sum(1).cumsum(0)])
        col, values, cols = kept.nonzero()[:, 1], flat[kept], flat.shape[1]
    else:
        crow, col, values = (x.detach().cpu() for x in weight)
    if cols is None:
        raise OptionError("a compressed weight does not tell how many inputs it has: give the number")
    return (
        crow.to(torch.int64).contiguous().numpy(),
        col.to(torch.int32).contiguous().numpy(),
        values.to(torch.float32).contiguous().numpy(),
        cols,
    )
