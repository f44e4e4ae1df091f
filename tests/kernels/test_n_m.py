"""N:M kernels against the dense product in float64, natively on every instruction set, and as PyTorch sees them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.errors import OptionError, PatternError
from rarefy.kernels import n_m, reference
from rarefy.kernels.n_m import n_m_dense, n_m_gather, n_m_index, n_m_linear, n_m_linear_layer, n_m_steps
from rarefy.kernels.native import native

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (2, 8), (5, 8), (1, 16), (4, 16), (13, 16), (16, 16)]


def circulant(rows: int, cols: int, n: int, m: int, seed: int = 0) -> Tensor:
    """Return a transposable mask: every m x m tile is a circulant of n ones whose rows and columns changed places."""
    g = torch.Generator().manual_seed(seed)
    at = torch.arange(m)
    ring = (at[:, None] - at) % m < n
    up = [-(-size // m) for size in (rows, cols)]
    tiles = torch.stack(
        [ring[torch.randperm(m, generator=g)][:, torch.randperm(m, generator=g)] for _ in range(up[0] * up[1])]
    )
    return tiles.view(*up, m, m).transpose(1, 2).reshape(up[0] * m, up[1] * m)[:rows, :cols].contiguous()


def along_inputs(rows: int, cols: int, n: int, m: int, seed: int = 0) -> Tensor:
    """Return a random mask that keeps n in every run of m inputs."""
    g = torch.Generator().manual_seed(seed)
    runs = torch.rand(rows, -(-cols // m), m, generator=g).argsort(2).argsort(2) < n
    return runs.view(rows, -1)[:, :cols].contiguous()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    scale = max(1.0, float(want.abs().max()) if want.numel() else 1.0)
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance * scale)


def compare(mask: Tensor, index: n_m.NMIndex, n: int, biased: bool, tolerance: float, dtype=torch.float32) -> None:
    """Compare output and all gradients with those of the masked dense layer in float64."""
    out, inside = mask.shape
    dense, x, bias = (
        randn(out, inside, seed=1, dtype=dtype),
        randn(n, inside, seed=2, dtype=dtype),
        randn(out, seed=3, dtype=dtype),
    )
    mine = [t.clone().requires_grad_() for t in (x, dense, bias)]
    theirs = [t.double().requires_grad_() for t in (x, dense, bias)]
    y = n_m_linear(mine[0], n_m_gather(mine[1], index), index, mine[2] if biased else None)
    expected = F.linear(theirs[0], theirs[1] * mask, theirs[2] if biased else None)
    close(y, expected.detach(), tolerance)
    dy = randn(n, out, seed=4)
    y.backward(dy.to(dtype))
    expected.backward(dy.double())
    for got, want in zip(mine[: 2 + biased], theirs[: 2 + biased], strict=True):
        close(got.grad, want.grad, tolerance)
    assert not mine[1].grad[~mask].any()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70), cols=st.integers(1, 100), n=st.integers(0, 70), pattern=st.sampled_from(PATTERNS),
    both=st.booleans(), seed=st.integers(0, 99), biased=st.booleans(), threads=st.integers(1, 2),
    isa=st.sampled_from(native.available_isas()),
)  # fmt: skip
def test_forward_and_all_gradients(rows, cols, n, pattern, both, seed, biased, threads, isa):
    best = native.isa()
    native.set_isa(isa)
    torch.set_num_threads(threads)
    try:
        mask = (circulant if both else along_inputs)(rows, cols, *pattern, seed=seed)
        index = n_m_index(mask, *pattern, transposable=both)
        assert torch.equal(index.mask(), mask)
        compare(mask, index, n, biased, 2e-5)
    finally:
        native.set_isa(best)
        torch.set_num_threads(1)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_steps_of_a_transposable_mask_are_permutations(data):
    """Also where some of the allowed places are empty, so that steps have to be completed."""
    n, m = data.draw(st.sampled_from(PATTERNS))
    rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    mask = circulant(rows, cols, n, m, seed=data.draw(st.integers(0, 99)))
    mask &= torch.rand(rows, cols, generator=torch.Generator().manual_seed(1)) < data.draw(
        st.sampled_from([0.3, 0.9, 1.0])
    )
    index = n_m_index(mask, n, m, transposable=True)
    assert index.steps == n * 16 // m and torch.equal(index.mask(), mask)
    shifts = torch.arange(0, 16, 4).view(4, 1)
    words = index.index.long()[:, :, :, None]
    inputs, outputs = ((words >> shifts + up & 15).flatten(2, 3)[:, :, : index.steps] for up in (0, 16))
    lanes = torch.arange(16)
    assert torch.equal(inputs.sort(3).values, lanes.expand(inputs.shape))
    assert torch.equal(inputs.gather(3, outputs), lanes.expand(inputs.shape))


def test_the_same_values_serve_both_products():
    mask = circulant(48, 64, 2, 8)
    index = n_m_index(mask, 2, 8, transposable=True)
    values = n_m_gather(randn(48, 64), index)
    assert values.numel() == int(mask.sum())
    x = randn(5, 64, seed=1).requires_grad_()
    y = n_m_linear(x, values, index)
    y.backward(torch.ones_like(y))
    weight = n_m_dense(values, index)
    close(y, F.linear(x.detach(), weight), 1e-5)
    close(x.grad, weight.sum(0).expand(5, 64), 1e-5)


def test_straight_through_gives_all_weights_a_gradient():
    mask = circulant(32, 48, 2, 4)
    index = n_m_index(mask, 2, 4, transposable=True)
    weight, x, bias = (t.requires_grad_() for t in (randn(32, 48), randn(6, 48, seed=1), randn(32, seed=2)))
    dy = randn(6, 32, seed=3)
    n_m_linear(x, n_m_gather(weight, index), index, bias, straight_through=weight).backward(dy)
    close(weight.grad, dy.t() @ x.detach(), 1e-5)
    close(x.grad, dy @ (weight.detach() * mask), 1e-5)
    close(bias.grad, dy.sum(0), 1e-5)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, both):
    mask = circulant(20, 40, 2, 8)
    compare(mask, n_m_index(mask, 2, 8, transposable=both), 9, True, 1e-12 if dtype == torch.float64 else 3e-2, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_packing_moves_numbers_and_changes_none(dtype):
    mask = circulant(20, 40, 2, 8)
    index, weight = n_m_index(mask, 2, 8), randn(20, 40, dtype=dtype)
    values = n_m_gather(weight, index)
    assert values.dtype == dtype and torch.equal(values, reference.n_m_gather(weight, index.index, index.used))
    assert torch.equal(n_m_dense(values, index), weight * mask)


@pytest.mark.parametrize("both", [True, False])
def test_gradients_of_gradients(both):
    mask = circulant(6, 20, 2, 4)
    mask[0, :3] = False
    index = n_m_index(mask, 2, 4, transposable=both)
    weight, x = (
        randn(6, 20, dtype=torch.float64).requires_grad_(),
        randn(3, 20, dtype=torch.float64, seed=1).requires_grad_(),
    )
    call = lambda x, w: n_m_linear(x, n_m_gather(w, index), index)  # noqa: E731
    torch.autograd.gradcheck(call, (x, weight))
    torch.autograd.gradgradcheck(call, (x, weight))


def test_pytorch_accepts_the_operators():
    mask = circulant(32, 48, 2, 8)
    index = n_m_index(mask, 2, 8, transposable=True)
    weight = randn(32, 48).requires_grad_()
    values = n_m_gather(weight.detach(), index).requires_grad_()
    x, dy, ops, at = randn(4, 48).requires_grad_(), randn(4, 32), torch.ops.rarefy, (index.index, index.used)
    torch.library.opcheck(ops.n_m_gather, (weight, *at))
    torch.library.opcheck(ops.n_m_scatter, (values, *at, 32, 48))
    torch.library.opcheck(ops.n_m_linear, (x, values, *at, randn(32), 32, True))
    torch.library.opcheck(ops.n_m_linear_straight, (x, values.detach(), *at, None, weight, True))
    torch.library.opcheck(ops.n_m_input_gradient, (dy, values, *at, 48, True))
    torch.library.opcheck(ops.n_m_values_gradient, (x, dy, *at, True))


def test_leading_dimensions_and_strides():
    mask = circulant(24, 33, 1, 4)
    index = n_m_index(mask, 1, 4, transposable=True)
    weight = randn(24, 33)
    values, want = n_m_gather(weight, index), weight * mask
    moved = randn(33, 5, 4).permute(2, 1, 0)
    close(n_m_linear(moved, values, index), F.linear(moved, want), 1e-5)
    one = randn(8 * 33 + 1)[1:].view(8, 33)[3]
    close(n_m_linear(one, values, index), F.linear(one, want), 1e-5)
    assert torch.equal(n_m_gather(weight.t().contiguous().t(), index), values)


def test_what_is_n_m_is_found():
    for n, m in PATTERNS[:-1]:
        assert n_m_steps(along_inputs(64, 128, n, m)) == n * 16 // m
    assert n_m_steps(torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) < 0.25) is None
    assert n_m_steps(torch.ones(16, 16, dtype=torch.bool)) is None
    assert n_m_steps(torch.zeros(16, 16, dtype=torch.bool)) is None


@pytest.mark.parametrize("isa", native.available_isas())
def test_native_layer(isa):
    best = native.isa()
    native.set_isa(isa)
    try:
        for n, m in PATTERNS[:-1]:
            weight, bias = randn(40, 96) * along_inputs(40, 96, n, m), randn(40)
            x = randn(3, 5, 96)
            layer = n_m_linear_layer(weight, bias, tokens=5, act="relu")
            y = torch.full((3, 5, 40), torch.nan)
            layer.run([x.numpy()], y.numpy(), 3, 1)
            close(y, F.linear(x, weight, bias).relu(), 2e-5)
            assert layer.bytes >= 4 * int((weight != 0).sum())
    finally:
        native.set_isa(best)


def test_errors():
    mask = circulant(16, 32, 2, 8)
    index = n_m_index(mask, 2, 8)
    weight, x = randn(16, 32), randn(4, 32)
    values = n_m_gather(weight, index)
    with pytest.raises(OptionError, match="M must be 2, 4, 8 or 16"):
        n_m_index(mask, 2, 32)
    with pytest.raises(OptionError, match="must be bool"):
        n_m_index(mask.float(), 2, 8)
    with pytest.raises(PatternError, match="keeps 2 of 8 inputs"):
        n_m_index(mask, 1, 8)
    columns = torch.zeros(16, 16, dtype=torch.bool)
    columns[:, ::8] = True
    assert n_m_index(columns, 1, 8).steps == 2
    with pytest.raises(PatternError, match="keeps 8 of 8 outputs"):
        n_m_index(columns, 1, 8, transposable=True)
    for wrong, message in (
        (lambda: n_m_gather(weight.t(), index), "the index is for"),
        (lambda: n_m_linear(x[:, :-1], values, index), "x is"),
        (lambda: n_m_linear(x.double(), values, index), "x is"),
        (lambda: n_m_linear(x, values[:, :-1], index), "values must be"),
        (lambda: n_m_linear(x, values, index, randn(17)), "the bias must be"),
        (lambda: n_m_linear(x, values, index, straight_through=weight[:, :-1]), "straight_through must be"),
        (lambda: n_m_linear_layer(torch.ones(16, 16), None), "does not keep N"),
        (lambda: n_m_linear(x.to("meta"), values, index), "x is"),
    ):
        with pytest.raises(OptionError, match=message):
            wrong()


def test_reference_places_lie_where_the_mask_is():
    mask = circulant(17, 30, 1, 4)
    index = n_m_index(mask, 1, 4)
    rows, cols = (place[:, :, : index.steps] for place in reference.n_m_places(index.index))
    kept = reference.n_m_used(index.used)
    assert torch.equal(torch.zeros_like(mask).index_put((rows[kept], cols[kept]), torch.tensor(True)), mask)
