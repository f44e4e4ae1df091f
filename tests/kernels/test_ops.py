"""The training operators against autograd on the dense weight, in float64 and natively, and as PyTorch sees them."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy import kernels
from rarefy.errors import OptionError
from rarefy.kernels import ops
from rarefy.kernels.native import native
from rarefy.metrics import PeakMemory


def compressed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, crow and col of a weight's nonzeros."""
    flat = weight.reshape(weight.shape[0], -1)
    kept = flat != 0
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    return flat[kept], crow, kept.nonzero()[:, 1].int()


def sparse_weight(*shape: int, sparsity: float = 0.8, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g, dtype=torch.float64) * (torch.rand(shape, generator=g) >= sparsity)
    return weight.to(dtype)


def compare(make_sparse, make_dense, weight: Tensor, x: Tensor, bias: Tensor | None, tolerance: float) -> None:
    """Run both forwards and backwards and compare outputs and all gradients."""
    values, crow, col = compressed(weight)
    mine = [t.clone().requires_grad_() for t in (x, values)] + (
        [bias.clone().requires_grad_()] if bias is not None else []
    )
    theirs = [t.double().requires_grad_() for t in (x, weight)] + (
        [bias.double().requires_grad_()] if bias is not None else []
    )
    y = make_sparse(mine[0], mine[1], crow, col, mine[2] if bias is not None else None)
    expected = make_dense(theirs[0], theirs[1], theirs[2] if bias is not None else None)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    y.backward(dy.to(y.dtype))
    expected.backward(dy.double())
    scale = max(1.0, float(expected.detach().abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * scale)
    kept = weight.reshape(weight.shape[0], -1) != 0
    pairs = [(mine[0].grad, theirs[0].grad), (mine[1].grad, theirs[1].grad.reshape(weight.shape[0], -1)[kept])]
    pairs += [(mine[2].grad, theirs[2].grad)] if bias is not None else []
    for got, want in pairs:
        scale = max(1.0, float(want.abs().max()) if want.numel() else 1.0)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * scale)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 90), k=st.integers(1, 300), n=st.integers(0, 200), sparsity=st.sampled_from([0, 0.5, 0.9, 0.99, 1]),
    seed=st.integers(0, 99), biased=st.booleans(), threads=st.integers(1, 2), isa=st.sampled_from(native.available_isas()),
)  # fmt: skip
def test_linear(m, k, n, sparsity, seed, biased, threads, isa):
    best = native.isa()
    native.set_isa(isa)
    torch.set_num_threads(threads)
    try:
        weight = sparse_weight(m, k, sparsity=sparsity, seed=seed)
        x = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
        bias = torch.randn(m, generator=torch.Generator().manual_seed(seed)) if biased else None
        compare(kernels.sparse_linear, F.linear, weight, x, bias, 2e-5)
    finally:
        native.set_isa(best)
        torch.set_num_threads(1)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_conv2d(data):
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    out, inside = groups * draw(st.integers(1, 20)), draw(st.integers(1, 8))
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    kernel, stride, padding, dilation = pair(1, 5), pair(1, 3), pair(0, 5), pair(1, 2)
    size = draw(st.sampled_from([(16, 16), (7, 7)])) if draw(st.booleans()) else pair(1, 33)
    if any(s + 2 * p <= d * (k - 1) for s, k, p, d in zip(size, kernel, padding, dilation, strict=True)):
        return
    batch, best = draw(st.integers(1, 4)), native.isa()
    native.set_isa(draw(st.sampled_from(native.available_isas())))
    torch.set_num_threads(draw(st.integers(1, 2)))
    try:
        weight = sparse_weight(out, inside, *kernel, sparsity=draw(st.sampled_from([0, 0.5, 0.9, 1.0])))
        x = torch.randn(batch, inside * groups, *size, generator=torch.Generator().manual_seed(1))
        bias = torch.randn(out, generator=torch.Generator().manual_seed(2))
        geometry = (stride, padding, dilation, groups)
        compare(
            lambda x, v, crow, col, b: kernels.sparse_conv2d(x, v, crow, col, b, weight.shape, *geometry),
            lambda x, w, b: F.conv2d(x, w, b, *geometry),
            weight, x, bias, 2e-5,
        )  # fmt: skip
    finally:
        native.set_isa(best)
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    tolerance = 1e-9 if dtype == torch.float64 else 3e-2
    weight, x = sparse_weight(12, 40, dtype=dtype), torch.randn(9, 40).to(dtype)
    compare(kernels.sparse_linear, F.linear, weight, x, torch.randn(12).to(dtype), tolerance)
    weight, x = sparse_weight(6, 4, 3, 3, dtype=dtype), torch.randn(2, 4, 8, 8).to(dtype)
    compare(
        lambda x, v, crow, col, b: kernels.sparse_conv2d(x, v, crow, col, b, weight.shape, (2, 1), (1, 1)),
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 1)), weight, x, None, tolerance,
    )  # fmt: skip


def test_gradients_of_gradients():
    values, crow, col = compressed(sparse_weight(5, 7, dtype=torch.float64))
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    torch.autograd.gradcheck(lambda x, v: kernels.sparse_linear(x, v, crow, col), (x, values))
    torch.autograd.gradgradcheck(lambda x, v: kernels.sparse_linear(x, v, crow, col), (x, values))
    weight = sparse_weight(4, 2, 3, 3, sparsity=0.6, dtype=torch.float64)
    values, crow, col = compressed(weight)
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    call = lambda x, v: kernels.sparse_conv2d(x, v, crow, col, None, weight.shape, (2, 1), (1, 0))  # noqa: E731
    torch.autograd.gradcheck(call, (x, values))
    torch.autograd.gradgradcheck(call, (x, values))


def test_leading_dimensions_and_strides():
    weight = sparse_weight(11, 33)
    values, crow, col = compressed(weight)
    x = torch.randn(33, 5, 4).permute(2, 1, 0)  # not contiguous
    torch.testing.assert_close(kernels.sparse_linear(x, values, crow, col), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    one = torch.randn(33)
    torch.testing.assert_close(
        kernels.sparse_linear(one, values, crow, col), F.linear(one, weight), rtol=1e-5, atol=1e-5
    )
    moved = torch.randn(8 * 33 + 1)[1:].view(8, 33)  # not aligned
    torch.testing.assert_close(
        kernels.sparse_linear(moved, values, crow, col), F.linear(moved, weight), rtol=1e-5, atol=1e-5
    )
    weight = sparse_weight(6, 4, 3, 3)
    values, crow, col = compressed(weight)
    image = torch.randn(4, 9, 10)
    y = kernels.sparse_conv2d(image, values, crow, col, None, weight.shape, padding=(1, 1))
    torch.testing.assert_close(y, F.conv2d(image, weight, padding=1), rtol=1e-5, atol=1e-5)


def test_pytorch_accepts_the_operators():
    weight = sparse_weight(6, 9)
    values, crow, col = compressed(weight)
    x = torch.randn(4, 9, requires_grad=True)
    values.requires_grad_()
    torch.library.opcheck(torch.ops.rarefy.sparse_linear, (x, values, crow, col, torch.randn(6)))
    weight = sparse_weight(6, 2, 3, 3)
    values, crow, col = compressed(weight)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    values.requires_grad_()
    geometry = ([6, 2, 3, 3], [2, 2], [1, 1], [1, 1], 2)
    torch.library.opcheck(torch.ops.rarefy.sparse_conv2d, (x, values, crow, col, None, *geometry))


class Layer(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        values, crow, col = compressed(weight)
        self.values = nn.Parameter(values)
        self.register_buffer("crow", crow)
        self.register_buffer("col", col)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.sparse_linear(x, self.values, self.crow, self.col).relu()


def test_compile_and_export():
    layer, x = Layer(sparse_weight(16, 24)), torch.randn(5, 24)
    expected = layer(x)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, expected)
    expected.sum().backward()
    want = layer.values.grad.clone()
    layer.values.grad = None
    y.sum().backward()
    torch.testing.assert_close(layer.values.grad, want)


def test_autocast_runs_in_the_lower_precision():
    layer, x = Layer(sparse_weight(16, 24)), torch.randn(5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.values.grad.dtype == torch.float32


def test_ten_steps_equal_masked_training():
    weight = sparse_weight(30, 50, sparsity=0.9)
    layer, dense, mask = Layer(weight), nn.Parameter(weight.clone()), weight != 0
    mine, theirs = (torch.optim.SGD([p], lr=0.05, momentum=0.9, weight_decay=1e-3) for p in (layer.values, dense))
    for step in range(10):
        x = torch.randn(64, 50, generator=torch.Generator().manual_seed(step))
        for optimizer, y in ((mine, layer(x)), (theirs, F.linear(x, dense * mask).relu())):
            optimizer.zero_grad()
            (y - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer.values, dense[mask], rtol=1e-5, atol=1e-6)


def test_a_topology_changed_in_place_is_noticed():
    values, crow, col = compressed(sparse_weight(4, 8, sparsity=0.5))
    x = torch.randn(3, 8)
    kernels.sparse_linear(x, values, crow, col)
    with torch.no_grad():
        for row in range(4):
            n = int(crow[row + 1] - crow[row])
            col[int(crow[row]) : int(crow[row + 1])] = torch.arange(8 - n, 8, dtype=torch.int32)
    dense = torch.zeros(4, 8)
    dense[torch.arange(4).repeat_interleave(crow.diff()), col.long()] = values
    torch.testing.assert_close(kernels.sparse_linear(x, values, crow, col), F.linear(x, dense), rtol=1e-5, atol=1e-5)


def test_plans_die_with_their_topology():
    values, crow, col = compressed(sparse_weight(4, 8))
    kernels.sparse_linear(torch.randn(3, 8), values, crow, col)
    before = len(ops._plans)
    del crow, col
    gc.collect()
    values, crow, col = compressed(sparse_weight(5, 8))
    kernels.sparse_linear(torch.randn(3, 8), values, crow, col)
    assert len(ops._plans) <= before


def test_nothing_as_large_as_the_dense_weight():
    size, nnz = 20_000, 20_000  # the dense weight would take 1.6 GB
    crow = torch.arange(size + 1, dtype=torch.int64)
    col = torch.randint(size, (nnz,), dtype=torch.int32)
    values = torch.randn(nnz, requires_grad=True)
    x = torch.randn(8, size, requires_grad=True)
    with PeakMemory() as peak:
        kernels.sparse_linear(x, values, crow, col).sum().backward()
    assert peak.increase < 200e6
    torch.testing.assert_close(values.grad, x.detach()[:, col.long()].sum(0), rtol=1e-4, atol=1e-4)


def test_errors():
    values, crow, col = compressed(sparse_weight(4, 8))
    x = torch.randn(3, 8)
    for wrong in (
        lambda: kernels.sparse_linear(x, values[:-1], crow, col),
        lambda: kernels.sparse_linear(x, values.double(), crow, col),
        lambda: kernels.sparse_linear(x, values, crow.int(), col),
        lambda: kernels.sparse_linear(x, values, crow, col.long()),
        lambda: kernels.sparse_linear(x, values, crow, col, torch.randn(5)),
        lambda: kernels.sparse_linear(x[:, :5], values, crow, torch.full_like(col, 7)),
        lambda: kernels.sparse_linear(x, values, crow, col.flip(0).clone()),
        lambda: kernels.sparse_conv2d(torch.randn(1, 3, 4, 4), values, crow, col, None, (4, 2, 2, 2)),
        lambda: kernels.sparse_conv2d(torch.randn(1, 2, 1, 1), values, crow, col, None, (4, 2, 2, 2)),
    ):
        with pytest.raises((OptionError, ValueError)):
            wrong()
