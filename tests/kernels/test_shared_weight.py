"""Weights read from a shared array: the mappings against their formulas, the operators against an explicit gather."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.kernels.shared_weight import (
    PRIME,
    SIGNS,
    Fold,
    Place,
    Tile,
    coefficients,
    hash_of,
    shared_weight,
    sign_table,
    use,
)

PLACES: list[Place] = [
    Fold(0, 1000, 123, 30, 70),
    Fold(3, 300, 57, 30, 70),
    Fold(3, 7, 57, 30, 70),
    Fold(3, 5000, 57, 30, 70),
    Tile(0, 1500, 10, 33, 70, 8, 16),
    Tile(0, 50, 10, 33, 70, 1, 1),
    Tile(1, 500, 0, 40, 20, 1, 8),
]


def everything(place: Place) -> torch.Tensor:
    return torch.arange(place.rows * place.cols)


def test_hashes_are_their_formulas_and_do_not_overflow() -> None:
    for x in (0, 1, 70_000, 2**31, 10**12):
        a, b, c = coefficients(5, "slot")
        assert int(hash_of(torch.tensor(x), 5, "slot")) == (a * x + b * x * x + c) % PRIME
    assert all(n % 2 == 1 and 0 < n < PRIME for n in coefficients(5, "slot"))
    # fixed for ever: a saved array is worthless under another hash
    assert coefficients(0, "slot") == COEFFICIENTS
    assert sign_table(0)[:12].tolist() == FIRST_SIGNS


COEFFICIENTS = (1783739927, 1762812073, 1305260425)
FIRST_SIGNS = [-1, -1, -1, -1, 1, -1, 1, 1, 1, 1, -1, -1]


def test_signs_are_balanced_and_shifts_of_the_table_are_uncorrelated() -> None:
    table = sign_table(3).double()
    assert table.shape == (SIGNS,) and set(table.tolist()) == {-1.0, 1.0}
    assert abs(float(table.mean())) < 5 / math.sqrt(SIGNS)
    assert all(abs(float((table * table.roll(k)).mean())) < 5 / math.sqrt(SIGNS) for k in range(1, 200))


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_the_operator_is_the_explicit_gather_and_its_gradient_the_scatter(place: Place) -> None:
    torch.manual_seed(0)
    values = torch.randn(place.size, dtype=torch.float64, requires_grad=True)
    scale, signs = torch.tensor(0.3, dtype=torch.float64), sign_table(place.seed)
    slot, enter = place.slots(everything(place))
    assert int(slot.min()) >= 0 and int(slot.max()) < place.size
    explicit = (values[slot] * signs[enter] * scale).view(place.rows, place.cols)
    weight = shared_weight(values, scale, signs, place)
    assert torch.equal(weight, explicit)
    grad = torch.randn_like(weight)
    (mine,) = torch.autograd.grad(weight, values, grad)
    (theirs,) = torch.autograd.grad(explicit, values, grad, retain_graph=True)
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(use(place, 2.0, place.size), 2.0 * slot.bincount(minlength=place.size).double())
    ids = torch.tensor([[3, 0], [3, 7]])
    rows = shared_weight(values, scale, signs, place, ids=ids)
    assert torch.equal(rows, explicit[ids])
    grad = torch.randn_like(rows)
    (mine,) = torch.autograd.grad(rows, values, grad)
    (theirs,) = torch.autograd.grad(explicit[ids], values, grad)
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("place", PLACES[:5], ids=str)
def test_the_gain_scales_the_gradient_of_each_slot_and_second_derivatives_exist(place: Place) -> None:
    torch.manual_seed(0)
    values = torch.randn(place.size, dtype=torch.float64, requires_grad=True)
    scale, signs = torch.tensor(0.3, dtype=torch.float64), sign_table(0)
    lengths = torch.tensor([place.size // 3, place.size - place.size // 3])
    gain = torch.tensor([2.0, 0.5], dtype=torch.float64)
    grad = torch.randn(place.rows, place.cols, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(shared_weight(values, scale, signs, place), values, grad)
    (gained,) = torch.autograd.grad(
        shared_weight(values, scale, signs, place, gain=gain, lengths=lengths), values, grad, create_graph=True
    )
    spread = gain.repeat_interleave(lengths)
    torch.testing.assert_close(gained, exact * spread)
    # gained is linear in grad: its derivative is the adjoint, a gather of (v * spread)
    v = torch.randn_like(gained)
    (again,) = torch.autograd.grad(gained, grad, v)
    torch.testing.assert_close(again, shared_weight(v * spread, scale, signs, place).detach())


@given(
    n=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=1, max_size=5),
    keep=st.floats(0.01, 1.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_fold_uses_every_slot_equally_often(n: list[tuple[int, int]], keep: float, seed: int) -> None:
    total = sum(r * c for r, c in n)
    size = max(1, int(keep * total))
    used, offset = torch.zeros(size, dtype=torch.int64), 0
    for rows, cols in n:
        place = Fold(seed, size, offset, rows, cols)
        used += place.slots(everything(place))[0].bincount(minlength=size)
        offset += rows * cols
    assert set(used.tolist()) <= {total // size, -(-total // size)}
    if size == total:
        assert used.tolist() == [1] * size  # a permutation


@pytest.mark.parametrize("shape", [(200, 200), (40_000, 1), (1, 40_000), (100, 400)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hashing_each_weight_for_itself_leaves_as_many_slots_empty_as_chance(shape: tuple[int, int], seed: int) -> None:
    total = 40_000
    place = Tile(seed, total + 1, 17, *shape, 1, 1)
    share = float((place.slots(everything(place))[0].bincount(minlength=total) > 0).double().mean())
    assert share == pytest.approx(1 - 1 / math.e, abs=0.03)


def test_tiles_are_contiguous() -> None:
    place = Tile(0, 3000, 5, 32, 48, 8, 16)
    slot = place.slots(everything(place))[0].view(4, 8, 3, 16).transpose(1, 2).reshape(12, 128)
    assert torch.equal(slot, slot[:, :1] + torch.arange(128))
    assert slot[:, 0].unique().numel() > 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    values = torch.randn(300).to(dtype).requires_grad_()
    weight = shared_weight(values, torch.tensor(0.5, dtype=dtype), sign_table(0), Fold(0, 300, 0, 30, 40))
    assert weight.dtype == dtype
    weight.sum().backward()
    assert values.grad is not None and values.grad.dtype == dtype
