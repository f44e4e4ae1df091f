"""Sparse products in bfloat16 and int8.

A word of 32 bits holds two bfloat16 or four int8 of neighbouring inputs, so the natural unit of a weight is 1 x 2 or 1 x 4:
where one weight of a unit is kept, the others ride along. Any zeros are used; those in whole units are used best.
CPUs with AVX-512 BF16 and VNNI multiply such words in one instruction (`has_dot_products`); others emulate them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels.native import cpu_empty, native
from rarefy.kernels.native import threads as all_threads
from rarefy.kernels.planes import Ints, Layer, _array, _known, _pair, _said
from rarefy.kernels.sparse_layers import Weight, _compressed

__all__ = ["Int8Linear", "bfloat16_linear_layer", "bfloat16_pointwise_layer", "has_dot_products"]


def has_dot_products() -> bool:
    """Return whether this CPU multiplies pairs of bfloat16 and quads of int8 in one instruction."""
    return native.has_dot_products()


def bfloat16_linear_layer(
    weight: Weight,
    bias: Tensor | None,
    *,
    features: int | None = None,
    tokens: int = 1,
    act: str = "none",
    batch: int = 1,
    threads: int | None = None,
) -> Layer:
    """Linear layer as `sparse_linear_layer`, with weight and input rounded to bfloat16 and sums in float32."""
    crow, col, values, cols = _compressed(weight, features)
    with _said("bfloat16_linear_layer"):
        return native.Bfloat16Linear(
            crow, col, values, cols, tokens, _array(bias), _known(act), batch, threads or all_threads()
        )


def bfloat16_pointwise_layer(
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
    """1 x 1 convolution as `sparse_pointwise_layer`, with weight and input rounded to bfloat16 and sums in float32."""
    crow, col, values, cols = _compressed(weight, channels)
    pixels = math.prod(_pair(size))
    with _said("bfloat16_pointwise_layer"):
        return native.Bfloat16Planes(
            crow, col, values, cols, pixels, _array(bias), residual, _known(act), batch, threads or all_threads()
        )


class Int8Linear:
    """A sparse int8 weight [out, in] with one scale per output, for uint8 activations; exact in int32.

    y = act(scale * x_scale * (W (x - x_zero)) + bias), float32. `weight` is int8 (its zeros are what is left out), or
    compressed: then `features` says how many go in; `scale` is float32 [out]. Raises OptionError where shapes or dtypes do
    not fit.
    """

    def __init__(
        self,
        weight: Weight,
        scale: Tensor,
        *,
        features: int | None = None,
        batch: int = 128,
        threads: int | None = None,
    ) -> None:
        values = weight if isinstance(weight, Tensor) else weight[2]
        outputs = weight.shape[0] if isinstance(weight, Tensor) else weight[0].shape[0] - 1
        if values.dtype != torch.int8 or tuple(scale.shape) != (outputs,) or values.dim() > 2:
            raise OptionError(
                f"Int8Linear takes an int8 weight [out, in] and one scale per output; these are {values.dtype} "
                f"{list(values.shape)} and {list(scale.shape)}"
            )
        crow, col, numbers, cols = _compressed(weight.float() if isinstance(weight, Tensor) else weight, features)
        self.out_features, self.in_features = outputs, cols
        with _said("Int8Linear"):
            self._native = native.Int8Product(
                crow, col, numbers, cols, scale.float().contiguous().numpy(), batch, threads or all_threads()
            )

    def __call__(
        self, x: Tensor, x_scale: float, x_zero: int = 0, bias: Tensor | None = None, act: str = "none"
    ) -> Tensor:
        """Return float32 [n, out] for uint8 x [n, in] that stands for x_scale * (x - x_zero)."""
        if x.dtype != torch.uint8 or x.dim() != 2 or x.shape[1] != self.in_features or not 0 <= x_zero <= 255:
            raise OptionError(
                f"Int8Linear takes uint8 [n, {self.in_features}] and a zero point in [0, 255]; "
                f"this is {x.dtype} {list(x.shape)} with zero point {x_zero}"
            )
        y = cpu_empty(x.shape[0], self.out_features)
        self._native.linear(
            x.contiguous().numpy(), x_scale, x_zero, y.numpy(), _array(bias), _known(act), all_threads()
        )
        return y

    @property
    def bytes(self) -> int:
        """Memory of the packed weight."""
        return self._native.bytes
