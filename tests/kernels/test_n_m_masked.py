"""The product under a transposable mask against the masked dense layer in float64, and masks that change in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.test_n_m import circulant, close, randn
from torch import Tensor, nn

import rarefy
from rarefy.errors import OptionError
from rarefy.kernels import n_m_masked
from rarefy.kernels.n_m_masked import n_m_masked_linear
from rarefy.nn import TransposableMask
from rarefy.nn.straight_through import straight


def both(
    x: Tensor, w: Tensor, mask: Tensor, n: int, m: int, bias: Tensor | None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return output and gradients of the operator, and of the dense layer in float64, straight through the mask."""
    found: list[list[Tensor | None]] = []
    for double in (False, True):
        given = [None if t is None else (t.double() if double else t.clone()).requires_grad_() for t in (x, w, bias)]
        if double:
            y = F.linear(given[0], straight(given[1], mask), given[2])
        else:
            y = n_m_masked_linear(given[0], given[1], mask, n, m, given[2])
        y.backward(randn(*y.shape, seed=9).to(y.dtype))
        found.append([y.detach(), *(None if t is None else t.grad for t in given)])
    return found[0], found[1]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(1, 2), (2, 4), (2, 8), (5, 8), (1, 16)]),
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 20), st.booleans(),
)  # fmt: skip
def test_it_is_the_masked_layer_straight_through(
    pattern: tuple[int, int], out: int, inside: int, batch: int, biased: bool
) -> None:
    n, m = pattern
    mask, bias = circulant(out, inside, n, m), randn(out, seed=3) if biased else None
    got, want = both(randn(batch, inside, seed=1), randn(out, inside, seed=2), mask, n, m, bias)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            close(a, b, 1e-5)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The masks that an index was made for."""
    masks: list[Tensor] = []
    real = n_m_masked.index_of_tiles

    def counted(mask: Tensor, *args: int, **options: bool) -> object:
        masks.append(mask.clone())
        return real(mask, *args, **options)

    monkeypatch.setattr(n_m_masked, "index_of_tiles", counted)
    return masks


def test_it_runs_on_the_kernels_and_a_mask_changed_in_place_is_another(made: list[Tensor]) -> None:
    mask, x, w = circulant(32, 48, 2, 8), randn(5, 48), randn(32, 48, seed=1)
    for _ in range(3):
        both(x, w, mask, 2, 8, None)
    assert len(made) == 1
    other = circulant(32, 48, 2, 8, seed=7)
    assert not torch.equal(mask, other)
    mask.copy_(other)
    got, want = both(x, w, mask, 2, 8, None)
    assert len(made) == 2 and torch.equal(made[1], other)
    close(got[0], want[0], 1e-5)
    mask.fill_(True)  # no N:M mask at all
    got, want = both(x, w, mask, 2, 8, None)
    for a, b in zip(got[:3], want[:3], strict=True):
        close(a, b, 1e-5)


def test_the_same_memory_may_hold_another_mask() -> None:
    """A transposed mask shares memory, size and version with the mask."""
    x, w = randn(5, 32), randn(32, 32, seed=1)
    mask = circulant(32, 32, 2, 8)
    assert not torch.equal(mask, mask.t())
    for seen in (mask, mask.t(), mask[:16].view(32, 16), mask[:16]):
        weight, inputs = w[: seen.shape[0], : seen.shape[1]], x[:, : seen.shape[1]]
        close(n_m_masked_linear(inputs, weight, seen, 2, 8), F.linear(inputs, weight * seen), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_dropped_may_be_anything(dtype: torch.dtype) -> None:
    mask = circulant(16, 32, 2, 8)
    x, w = randn(4, 32, dtype=dtype).requires_grad_(), randn(16, 32, seed=1, dtype=dtype).masked_fill(~mask, torch.nan)
    y = n_m_masked_linear(x, w, mask, 2, 8)
    y.sum().backward()
    assert x.grad is not None and bool(y.isfinite().all()) and bool(x.grad.isfinite().all())


def test_second_derivatives_other_dtypes_and_bad_arguments() -> None:
    mask = circulant(8, 16, 2, 4)
    x, w, b = (randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 16), (8, 16), (8,)))

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return n_m_masked_linear(x, w, mask, 2, 4, b)

    torch.testing.assert_close(run(x, w, b), F.linear(x, w * mask, b), rtol=1e-12, atol=1e-12)
    # straight through is no derivative in w, but in x and b it is one, and twice
    assert torch.autograd.gradcheck(lambda x, b: run(x, w.detach(), b), (x, b))
    assert torch.autograd.gradgradcheck(lambda x, b: run(x, w.detach(), b).square(), (x, b))
    assert n_m_masked_linear(x[0], w, mask, 2, 4, b).shape == (8,)
    bad = [(x.float(), w, mask, 2, 4), (x[:, :8], w, mask, 2, 4), (x, w, mask.float(), 2, 4), (x, w, mask[:4], 2, 4),
           (x, w, mask, 3, 5), (x, w, mask, 5, 4), (x, w, mask, 2, 4, b[:4]), (x, w, mask, 2, 4, b.float())]  # fmt: skip
    for args in bad:
        with pytest.raises(OptionError, match="n_m_masked_linear"):
            n_m_masked_linear(*args)


def test_as_pytorch_sees_it() -> None:
    mask, x, w = circulant(16, 32, 2, 8), randn(4, 32).requires_grad_(), randn(16, 32, seed=1).requires_grad_()
    bias = randn(16, seed=2).requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.rarefy.n_m_masked, (x, w, mask, bias, 2, 8), test_utils=checks)
    values = torch.ops.rarefy.n_m_masked(x, w, mask, bias, 2, 8)[1].detach()
    args = (randn(4, 16, seed=3).requires_grad_(), w, values, mask, 2, 8)
    torch.library.opcheck(torch.ops.rarefy.n_m_masked_input_gradient, args, test_utils=checks)


@pytest.mark.parametrize("compiled", [False, True])
def test_training_with_t_mask_is_the_same_natively(
    compiled: bool, made: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The method's steps on the kernels are those with the mask multiplied in, over several masks."""

    def train(worth: int) -> tuple[nn.Module, dict[str, Tensor], int]:
        monkeypatch.setattr(TransposableMask, "WORTH", worth)
        monkeypatch.setattr(TransposableMask, "SAMPLES", 1)

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        sparse = rarefy.sparsify(
            model, "t-mask", pattern="2:8t", sparsity=0.75, every=3, optimizer=optimizer, total_steps=8
        )
        made.clear()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for step in range(8):
            x = randn(12, 32, seed=step)
            optimizer.zero_grad()
            run(x).square().sum().div(100).backward()
            optimizer.step()
        masks = sparse.masks()
        return sparse.finalize(), masks, len(made)

    native, masks, used = train(0)
    plain, others, none = train(1 << 60)
    assert used == 6 and none == 0  # two layers, three masks: at the start and twice after three steps
    for name, mask in masks.items():
        assert torch.equal(mask, others[name])
    for name, weight in native.state_dict().items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=1e-4, atol=1e-5)
