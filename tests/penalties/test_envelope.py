"""The group envelope: by Fenchel's equality, by other people's formulas, and by brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from rarefy.patterns import NM, Block, FanIn, Pattern, Slice, Unstructured
from rarefy.penalties import GroupEnvelope

SEEDS = st.integers(0, 10**6)


def draw(seed: int) -> tuple[Tensor, int, float, float]:
    """Return a weight of some rows, k, strength and d of a random problem."""
    g = torch.Generator().manual_seed(seed)
    m, size = int(torch.randint(1, 12, (), generator=g)), int(torch.randint(1, 5, (), generator=g))
    weight = torch.randn(m, size, generator=g, dtype=torch.float64)
    weight[torch.rand(m, generator=g) < 0.2] = 0
    k = int(torch.randint(1, m + 1, (), generator=g))
    strength, cost = (10 ** float(x) for x in torch.rand(2, generator=g) * 4 - 2)
    return weight, k, strength, cost


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_the_prox_meets_fenchels_equality(seed: int) -> None:
    weight, k, strength, cost = draw(seed)
    step = 0.3
    envelope = GroupEnvelope(Slice(0), k, strength, cost)
    v = envelope.prox(weight, step)
    dual = (weight - v) / (step * strength)
    gap = envelope.value(v) / strength + envelope.conjugate(dual) - float((v * dual).sum())
    assert abs(gap) < 1e-9 * (1 + float(dual.square().sum()))


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_nothing_near_or_far_is_better_than_the_prox(seed: int) -> None:
    weight, k, strength, cost = draw(seed)
    g = torch.Generator().manual_seed(seed)
    steps = torch.rand(weight.shape[0], 1, generator=g, dtype=torch.float64).expand(weight.shape) + 0.1
    envelope = GroupEnvelope(Slice(0), k, strength, cost)

    def objective(v: Tensor) -> float:
        return float(((v - weight).square() / steps).sum()) / 2 + envelope.value(v)

    v = envelope.prox(weight, steps)
    best = objective(v)
    for scale in (1e-4, 1e-2, 1.0):
        for _ in range(10):
            assert objective(v + scale * torch.randn(v.shape, generator=g, dtype=torch.float64)) >= best - 1e-9 * (
                1 + best
            )
    assert objective(torch.zeros_like(v)) >= best - 1e-12 and objective(weight) >= best - 1e-12


@pytest.mark.parametrize("seed", range(12))
def test_the_shares_minimise_what_is_left_by_brute_force(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    m = 2 + seed % 5
    norms, c = torch.rand(m, generator=g).double() + 0.1, 0.05 + torch.rand(1, generator=g).item()
    k = 1 + seed % (m - 1)
    found = minimize(
        lambda u: float((c * norms.square() / (c + torch.from_numpy(u))).sum()),
        [k / m] * m,
        method="SLSQP",
        bounds=[(0, 1)] * m,
        constraints={"type": "ineq", "fun": lambda u: k - u.sum()},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    shrunk = GroupEnvelope(Slice(0), k, c).prox(norms[:, None], 1.0)[:, 0]
    torch.testing.assert_close(shrunk, torch.from_numpy(found.x / (found.x + c)) * norms, rtol=0, atol=2e-4)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_value_is_the_variational_one_and_singletons_give_the_k_support_norm(seed: int) -> None:
    weight, k, _, cost = draw(seed)
    norms = weight.norm(dim=1) * math.sqrt(cost)
    b = norms.sort(descending=True).values.tolist()
    if sum(x > 0 for x in b) <= k:
        expected = sum(x * x for x in b) / 2
    else:  # the closed form: the smallest r whose next one is below the mean of the rest
        r = next(r for r in range(k) if b[r] <= sum(b[r:]) / (k - r) * (1 + 1e-12))
        expected = (sum(x * x for x in b[:r]) + sum(b[r:]) ** 2 / (k - r)) / 2
    assert GroupEnvelope(Slice(0), k, 1.0, cost).value(weight) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    flat = weight.reshape(-1)
    many = min(k, flat.numel())
    single = GroupEnvelope(Unstructured(), many, 1.0)
    assert 2 * single.value(weight) == pytest.approx(squared_k_support_norm(flat, many), rel=1e-9, abs=1e-12)


def squared_k_support_norm(x: Tensor, k: int) -> float:
    """Argyriou, Foygel & Srebro 2012, proposition 2.1."""
    z = [math.inf, *x.abs().sort(descending=True).values.tolist()]
    for r in range(k):
        tail = sum(z[k - r :])
        if z[k - r - 1] > tail / (r + 1) >= z[k - r] - 1e-12:
            return sum(v * v for v in z[1 : k - r]) + tail * tail / (r + 1)
    raise AssertionError("no r fits")


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_it_lies_below_the_sparse_norm_and_between_group_lasso_and_ridge(seed: int) -> None:
    weight, k, _, cost = draw(seed)
    m = weight.shape[0]
    squares = cost * weight.square().sum(1)
    values = [GroupEnvelope(Slice(0), i, 1.0, cost).value(weight) for i in range(1, m + 1)]
    assert values[0] == pytest.approx(float(squares.sqrt().sum()) ** 2 / 2)
    assert values[-1] == pytest.approx(float(squares.sum()) / 2)
    assert all(a >= b - 1e-9 * a for a, b in itertools.pairwise(values))
    sparse = weight.clone()
    sparse[squares.argsort(descending=True)[k:]] = 0
    assert GroupEnvelope(Slice(0), k, 1.0, cost).value(sparse) == pytest.approx(float(cost * sparse.square().sum()) / 2)


@given(SEEDS, SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_prox_is_firmly_non_expansive_keeps_order_and_vanishes_with_the_strength(seed: int, other: int) -> None:
    weight, k, strength, cost = draw(seed)
    second = torch.randn(weight.shape, generator=torch.Generator().manual_seed(other), dtype=torch.float64)
    envelope = GroupEnvelope(Slice(0), k, strength, cost)
    a, b = envelope.prox(weight, 1.0), envelope.prox(second, 1.0)
    assert float(((a - b) * (weight - second)).sum()) >= float((a - b).square().sum()) - 1e-9
    order = weight.norm(dim=1).argsort(descending=True)
    assert (a.norm(dim=1)[order].diff() <= 1e-12).all()
    torch.testing.assert_close(GroupEnvelope(Slice(0), k, 1e-12).prox(weight, 1.0), weight, rtol=1e-9, atol=1e-9)
    large = GroupEnvelope(Slice(0), k, 1e9).prox(weight, 1.0)
    live = weight.norm(dim=1) > 0
    assert int((large != 0).any(1).sum()) == min(k, int(live.sum()))
    assert int((large != 0).any(1).sum()) == k or torch.equal(large != 0, weight != 0)


@pytest.mark.parametrize(
    ("pattern", "shape", "k"),
    [
        (Slice(0), (8, 6), 3),
        (Slice(1), (6, 5, 3, 3), 2),
        (Block(2, 2), (6, 4), 2),
        (NM(2, 4), (6, 8), 2),
        (FanIn(), (5, 12), 3),
        (Unstructured(), (4, 9), 7),
    ],
)
def test_every_pattern_has_its_own_units_and_counts(pattern: Pattern, shape: tuple[int, ...], k: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shrunk = GroupEnvelope(pattern, k, 1e6).prox(weight, 1.0)
    assert pattern.obeys(shrunk != 0)
    assert ((pattern.pool(shrunk != 0) > 0).sum(1) == k).all()
    kept = shrunk != 0
    torch.testing.assert_close(
        shrunk[kept] / weight[kept], torch.full_like(shrunk[kept], 1 / (1 + 1e6)), rtol=1e-3, atol=0
    )
    mild = GroupEnvelope(pattern, k, 0.01).prox(weight, 1.0)
    assert int(mild.count_nonzero()) > int(shrunk.count_nonzero())  # k alone decides nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_follows_and_zeros_are_positive(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    envelope = GroupEnvelope(Slice(0), 10, 1.0)
    shrunk, exact = envelope.prox(weight, 0.5), envelope.prox(weight.double(), 0.5)
    assert shrunk.dtype == dtype
    torch.testing.assert_close(shrunk.double(), exact, rtol=1e-2, atol=1e-3)
    assert not torch.signbit(shrunk[shrunk == 0]).any() and (shrunk == 0).any()
