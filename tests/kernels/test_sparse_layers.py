"""Sparse layers of native networks against torch, on every instruction set, with one thread and two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels import sparse_layers
from rarefy.kernels.native import native
from rarefy.kernels.planes import Layer


@pytest.fixture(params=native.available_isas(), autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def check(layer: Layer, expected: Tensor, *inputs: Tensor) -> None:
    for threads in (1, 2):
        got = torch.full_like(expected, float("nan"))
        layer.run([x.numpy() for x in inputs], got.numpy(), inputs[0].shape[0], threads)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def sparse(*shape: int, density: float) -> Tensor:
    w = torch.randn(shape) * (torch.rand(shape) < density) / max(1.0, density * shape[1]) ** 0.5
    w[0] = 0  # an empty row
    return w


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_pointwise(density: float) -> None:
    for batch, m, k, size in [(1, 40, 70, 7), (3, 17, 5, 14), (2, 64, 32, 33)]:
        w, bias, x = sparse(m, k, density=density), torch.randn(m), torch.randn(batch, k, size, size)
        y = F.conv2d(x, w[:, :, None, None], bias)
        check(sparse_layers.sparse_pointwise_layer(w, bias, size, act="relu6", batch=batch), F.relu6(y), x)
        r = torch.randn_like(y)
        layer = sparse_layers.sparse_pointwise_layer(
            w[:, :, None, None], bias, size, act="relu", residual=True, threads=1
        )
        check(layer, F.relu(y + r), x, r)
        inner = r.clone()
        layer.run([x.numpy(), inner.numpy()], inner.numpy(), batch, 2)
        torch.testing.assert_close(inner, F.relu(y + r), rtol=1e-5, atol=1e-5)


def test_linear() -> None:
    for batch, m, k in [(1, 10, 100), (5, 33, 17), (40, 64, 64)]:
        w, bias, x = sparse(m, k, density=0.2), torch.randn(m), torch.randn(batch, k)
        check(sparse_layers.sparse_linear_layer(w, bias, act="silu", batch=batch), F.silu(F.linear(x, w, bias)), x)


def test_convolution() -> None:
    for stride, padding, dilation, groups in [(1, 1, 1, 1), (2, 1, 1, 1), (2, (0, 2), (1, 2), 2)]:
        w, bias, x = sparse(8, 6 // groups, 3, 3, density=0.3), torch.randn(8), torch.randn(2, 6, 12, 15)
        y = F.conv2d(x, w, bias, stride, padding, dilation, groups)
        r = torch.randn_like(y)
        layer = sparse_layers.sparse_conv_layer(
            w, bias, (12, 15), stride=stride, padding=padding, dilation=dilation, groups=groups, act="hardswish", residual=True
        )  # fmt: skip
        check(layer, F.hardswish(y + r), x, r)


def test_a_compressed_weight_is_taken_as_it_is() -> None:
    w, x = sparse(9, 20, density=0.3), torch.randn(4, 20)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), (w != 0).sum(1).cumsum(0)])
    parts = (crow, w.nonzero()[:, 1], w[w != 0])
    check(sparse_layers.sparse_linear_layer(parts, None, features=20), x @ w.T, x)
    with pytest.raises(OptionError, match="how many inputs"):
        sparse_layers.sparse_linear_layer(parts, None)
    with pytest.raises(OptionError, match="columns of a row"):
        sparse_layers.sparse_linear_layer(parts, None, features=3)
