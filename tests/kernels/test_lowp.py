"""bfloat16 against float64 within its rounding, int8 exactly, on every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import OptionError
from rarefy.kernels import lowp
from rarefy.kernels.native import native

ISAS = st.sampled_from(native.available_isas())


def masked(rows: int, cols: int, sparsity: float, unit: int, g: torch.Generator) -> torch.Tensor:
    keep = torch.rand(rows, -(-cols // unit), generator=g) >= sparsity
    return keep.repeat_interleave(unit, 1)[:, :cols]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70), cols=st.integers(1, 300), n=st.integers(1, 150), sparsity=st.sampled_from([0, 0.5, 0.9, 1]),
    unit=st.sampled_from([1, 2, 4]), isa=ISAS, threads=st.integers(1, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_bfloat16_linear(rows, cols, n, sparsity, unit, isa, threads, seed):
    best, g = native.isa(), torch.Generator().manual_seed(seed)
    native.set_isa(isa)
    try:
        weight = torch.randn(rows, cols, generator=g) * masked(rows, cols, sparsity, unit, g)
        x, bias = torch.randn(n, cols, generator=g), torch.randn(rows, generator=g)
        layer = lowp.bfloat16_linear_layer(weight, bias, act="relu", batch=n, threads=threads)
        y = torch.full((n, rows), 7.0)
        layer.run([x.numpy()], y.numpy(), n, threads)
        expected = F.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.double()).relu()
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-3)
    finally:
        native.set_isa(best)


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize(("channels", "size", "batch"), [(5, (3, 3), 1), (64, (7, 7), 3), (33, (14, 15), 2)])
def test_bfloat16_pointwise(isa, channels, size, batch):
    best, g = native.isa(), torch.Generator().manual_seed(0)
    native.set_isa(isa)
    try:
        weight = torch.randn(20, channels, generator=g) * masked(20, channels, 0.6, 2, g)
        x, residual = torch.randn(batch, channels, *size, generator=g), torch.randn(batch, 20, *size, generator=g)
        layer = lowp.bfloat16_pointwise_layer(weight, None, size, residual=True, batch=batch, threads=1)
        y = torch.empty_like(residual)
        layer.run([x.numpy(), residual.numpy()], y.numpy(), batch, 1)
        expected = F.conv2d(x.bfloat16().double(), weight.bfloat16().double()[:, :, None, None]) + residual
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-3)
    finally:
        native.set_isa(best)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70), cols=st.integers(1, 300), n=st.integers(1, 150), sparsity=st.sampled_from([0, 0.5, 0.9, 1]),
    unit=st.sampled_from([1, 4]), isa=ISAS, zero=st.sampled_from([0, 128, 255]), extreme=st.booleans(),
)  # fmt: skip
def test_int8_is_exact(rows, cols, n, sparsity, unit, isa, zero, extreme):
    best, g = native.isa(), torch.Generator().manual_seed(1)
    native.set_isa(isa)
    try:
        weight = torch.randint(-128, 128, (rows, cols), generator=g)
        x = torch.randint(0, 256, (n, cols), generator=g)
        if extreme:  # pairs that would saturate in 16 bits
            weight, x = torch.where(weight < 0, -128, 127), torch.full_like(x, 255)
        weight = weight * masked(rows, cols, sparsity, unit, g)
        product = lowp.Int8Linear(weight.to(torch.int8), torch.ones(rows), batch=n)
        y = product(x.to(torch.uint8), 1.0, zero)
        assert torch.equal(y, ((x - zero) @ weight.T).float())
    finally:
        native.set_isa(best)


def test_int8_scales_bias_and_activation():
    g = torch.Generator().manual_seed(1)
    weight, x = torch.randint(-9, 9, (6, 10), generator=g), torch.randint(0, 256, (4, 10), generator=g)
    scale, bias = torch.rand(6, generator=g), torch.randn(6, generator=g)
    y = lowp.Int8Linear(weight.to(torch.int8), scale)(x.to(torch.uint8), 0.25, 100, bias, "relu")
    torch.testing.assert_close(y, F.relu(0.25 * scale * ((x - 100) @ weight.T).float() + bias))
    moved = torch.empty(41, dtype=torch.uint8)[1:].view(4, 10).copy_(x)  # not aligned
    assert torch.equal(lowp.Int8Linear(weight.to(torch.int8), scale)(moved, 0.25, 100, bias, "relu"), y)


def test_special_numbers_round_as_torch_does():
    x = torch.tensor([[1.0, float("inf"), -float("inf"), 1.00390625, 1.01171875, -0.0, 3.3e38, 65504.0]])
    layer = lowp.bfloat16_linear_layer(torch.eye(8), None, batch=1, threads=1)
    for isa in native.available_isas():
        best = native.isa()
        native.set_isa(isa)
        try:
            y = torch.empty(1, 8)
            for k in (0, 3, 4, 5, 7):
                one = torch.zeros(1, 8)
                one[0, k] = x[0, k]
                layer.run([one.numpy()], y.numpy(), 1, 1)
                assert y[0, k] == x[0, k].bfloat16().float()
        finally:
            native.set_isa(best)


def test_errors():
    with pytest.raises(OptionError):
        lowp.Int8Linear(torch.zeros(3, 4), torch.ones(3))
    product = lowp.Int8Linear(torch.ones(3, 4, dtype=torch.int8), torch.ones(3))
    for x, zero in (
        (torch.zeros(2, 5, dtype=torch.uint8), 0),
        (torch.zeros(2, 4), 0),
        (torch.zeros(2, 4, dtype=torch.uint8), 256),
    ):
        with pytest.raises(OptionError):
            product(x, 1.0, zero)
