"""A sparse matrix times one vector: every instruction set, shape and activation against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.kernels import sparse_layers
from rarefy.kernels.native import native


def run(weight, bias, x, act="none", threads=1):
    layer = sparse_layers.sparse_linear_layer(weight, bias, act=act, batch=1, threads=threads)
    y = torch.full((x.shape[0], weight.shape[0]), 7.0)
    layer.run([x.numpy()], y.numpy(), x.shape[0], threads)
    return y


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 80), cols=st.integers(1, 400), sparsity=st.sampled_from([0, 0.3, 0.9, 0.99, 1]),
    seed=st.integers(0, 99),
    isa=st.sampled_from(native.available_isas()), threads=st.integers(1, 2), samples=st.integers(1, 3),
)  # fmt: skip
def test_product(rows, cols, sparsity, seed, isa, threads, samples):
    best = native.isa()
    native.set_isa(isa)
    try:
        g = torch.Generator().manual_seed(seed)
        weight = torch.randn(rows, cols, generator=g) * (torch.rand(rows, cols, generator=g) >= sparsity)
        x, bias = torch.randn(samples, cols, generator=g), torch.randn(rows, generator=g)
        expected = F.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(run(weight, bias, x, threads=threads).double(), expected, rtol=1e-5, atol=1e-4)
    finally:
        native.set_isa(best)


@pytest.mark.parametrize("act", ["relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid"])
def test_activations(act):
    torch.manual_seed(0)
    weight, x = torch.randn(40, 50) * 3 * (torch.rand(40, 50) < 0.3), torch.randn(1, 50)
    functions = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu, "sigmoid": torch.sigmoid}
    function = functions.get(act, F.hardsigmoid)
    torch.testing.assert_close(run(weight, None, x, act), function(F.linear(x, weight)), rtol=1e-4, atol=1e-5)


def test_uneven_rows():
    """One full row among empty ones: more steps in a segment than a loop has, and slices with nothing."""
    weight = torch.zeros(70, 333)
    weight[5] = torch.randn(333)
    weight[64, ::7] = 1.0
    x = torch.randn(1, 333)
    torch.testing.assert_close(run(weight, None, x), F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_threads_agree_exactly():
    torch.manual_seed(0)
    weight, x = torch.randn(512, 700) * (torch.rand(512, 700) < 0.2), torch.randn(1, 700)
    assert torch.equal(run(weight, None, x, threads=1), run(weight, None, x, threads=2))


def test_packed_in_five_bytes_a_weight_and_filling():
    weight = torch.randn(1024, 1024) * (torch.rand(1024, 1024) < 0.1)
    layer = sparse_layers.sparse_linear_layer(weight, None, batch=1)
    assert (
        layer.bytes < weight.count_nonzero() * 9 * 2.5
    )  # 4 for the value, 1 for the index, 4 to renew it; lanes filled up
