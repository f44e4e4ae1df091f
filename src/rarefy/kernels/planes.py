"""Dense layers of a native network: depthwise convolution, pools, elementwise operators, joins and small linear layers.

Each function returns a `Layer` for `rarefy.kernels.Program`. A layer takes and gives float32 with the batch first, NCHW or
[batch, features], contiguous; sizes given here are per sample. What each computes is what the function of the same name in
`torch.nn.functional` computes, then the activation `act`: none, relu, relu6, hardswish, silu, sigmoid or hardsigmoid.
All raise OptionError when sizes do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels.native import native

__all__ = [
    "ACTIVATIONS",
    "Layer",
    "activation",
    "adaptive_avg_pool",
    "add",
    "affine",
    "avg_pool",
    "concat",
    "dense_conv",
    "dense_linear",
    "depthwise",
    "max_pool",
    "multiply",
    "narrow",
    "scale_channels",
    "softmax",
    "upsample_nearest",
]

Layer = native.Layer
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid")
Ints = int | Sequence[int]


def depthwise(
    weight: Tensor,
    bias: Tensor | None,
    size: Ints,
    *,
    channels: int | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    act: str = "none",
    residual: bool = False,
) -> Layer:
    """Depthwise convolution of [channels, *size] planes.

    With `residual`, a second input of the output's shape is added before `act`.
    `weight` is [channels * multiplier, 1, kh, kw] and `bias` [channels * multiplier], as `conv2d(groups=channels)` takes them.
    """
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise OptionError(f"a depthwise weight is [channels * multiplier, 1, kh, kw]; this one is {list(weight.shape)}")
    top, left = _pair(padding)
    with _said("depthwise"):
        return native.Depthwise(
            _floats(weight).squeeze(1).numpy(), _array(bias), channels or weight.shape[0], _pair(size), _pair(stride),
            [top, left, top, left], _pair(dilation), residual, _known(act),
        )  # fmt: skip


def dense_conv(
    weight: Tensor,
    bias: Tensor | None,
    size: Ints,
    *,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    act: str = "none",
    residual: bool = False,
) -> Layer:
    """Dense convolution of [in, *size] planes with `weight` [out, in, kh, kw], kw <= 16: made for a network's first layer.

    With `residual`, a second input of the output's shape is added before `act`.
    """
    if weight.dim() != 4:
        raise OptionError(f"a convolution's weight is [out, in, kh, kw]; this one is {list(weight.shape)}")
    top, left = _pair(padding)
    with _said("dense_conv"):
        return native.DirectConv(
            _floats(weight).numpy(), _array(bias), _pair(size), _pair(stride), [top, left, top, left], _pair(dilation),
            residual, _known(act),
        )  # fmt: skip


def max_pool(
    channels: int,
    size: Ints,
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
) -> Layer:
    """Maximum over windows of [channels, *size] planes. Unlike torch's, a NaN is not sure to pass."""
    return _pool("max", channels, size, kernel, stride, padding, dilation, ceil_mode)


def avg_pool(
    channels: int,
    size: Ints,
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Layer:
    """Mean over windows of [channels, *size] planes."""
    kind = "avg_with_padding" if count_include_pad else "avg"
    return _pool(kind, channels, size, kernel, stride, padding, 1, ceil_mode)


def adaptive_avg_pool(channels: int, size: Ints, out: Ints = 1) -> Layer:
    """Mean of [channels, *size] planes under each cell of [channels, *out]."""
    with _said("adaptive_avg_pool"):
        return native.AdaptiveAverage(channels, _pair(size), _pair(out))


def activation(size: int, act: str) -> Layer:
    """`act` of each of `size` floats a sample."""
    return native.Elementwise("activation", size, _known(act))


def add(size: int, act: str = "none") -> Layer:
    """Sum of two inputs of `size` floats a sample."""
    return native.Elementwise("add", size, _known(act))


def multiply(size: int, act: str = "none") -> Layer:
    """Product of two inputs of `size` floats a sample."""
    return native.Elementwise("multiply", size, _known(act))


def scale_channels(channels: int, size: Ints, act: str = "none") -> Layer:
    """Planes [channels, *size], the first input, times one number per channel, the second (squeeze and excitation)."""
    return native.Scale(channels, math.prod(_pair(size)), None, None, _known(act))


def affine(scale: Tensor, shift: Tensor | None, size: Ints, act: str = "none") -> Layer:
    """Planes times `scale` [channels] plus `shift` [channels]: a batch norm that could not be folded."""
    with _said("affine"):
        return native.Scale(scale.numel(), math.prod(_pair(size)), _array(scale), _array(shift), _known(act))


def softmax(size: int) -> Layer:
    """Softmax over all `size` floats of a sample."""
    return native.Softmax(size)


def concat(sizes: Sequence[int]) -> Layer:
    """Put inputs of these many floats a sample one after the other: channels of planes, or features."""
    return native.Concat(list(sizes))


def narrow(size: int, start: int, stop: int) -> Layer:
    """Floats [start, stop) of each sample."""
    with _said("narrow"):
        return native.Slice(size, start, stop)


def upsample_nearest(channels: int, size: Ints, out: Ints) -> Layer:
    """Planes [channels, *size] to [channels, *out] by nearest neighbour."""
    with _said("upsample_nearest"):
        return native.Upsample(channels, _pair(size), _pair(out))


def dense_linear(weight: Tensor, bias: Tensor | None, act: str = "none") -> Layer:
    """Dense `linear` with weight [out, in], made for few samples at a time."""
    if weight.dim() != 2:
        raise OptionError(f"a linear weight is [out, in]; this one is {list(weight.shape)}")
    with _said("dense_linear"):
        return native.Dense(_floats(weight).numpy(), _array(bias), _known(act))


def _pool(
    kind: str, channels: int, size: Ints, kernel: Ints, stride: Ints | None, padding: Ints, dilation: Ints, ceil: bool
) -> Layer:
    n, k, p, d = _pair(size), _pair(kernel), _pair(padding), _pair(dilation)
    s = k if stride is None else _pair(stride)
    end = list(p)
    if ceil:  # the last window may reach over the end, but must begin before it
        for i in range(2):
            reach = d[i] * (k[i] - 1) + 1
            steps = -(-(n[i] + 2 * p[i] - reach) // s[i])
            steps -= steps * s[i] >= n[i] + p[i]
            end[i] = max(0, steps * s[i] + reach - n[i] - p[i])
    with _said(f"{kind} pool"):
        return native.Pool(kind, channels, n, k, s, [*p, *end], d, p)


class _said:
    """Turn the native core's complaint about sizes into this library's error, naming the layer."""

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | TypeError) and not isinstance(error, OptionError):
            raise OptionError(f"{self.layer}: {str(error).splitlines()[0]}") from error


def _pair(x: Ints) -> list[int]:
    pair = [x, x] if isinstance(x, int) else [int(v) for v in x]
    if len(pair) != 2:
        raise OptionError(f"one number or two (height, width) are needed, not {x!r}")
    return pair


def _floats(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32).contiguous()


def _array(x: Tensor | None) -> object:
    return None if x is None else _floats(x).reshape(-1).numpy()


def _known(act: str) -> str:
    if act not in ACTIVATIONS:
        raise OptionError(f"no such activation: {act!r}; choose one of {', '.join(ACTIVATIONS)}")
    return act
