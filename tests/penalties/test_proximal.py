"""Soft thresholding and the group lasso, by brute force; the search for a strength on problems with closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import OptionError
from rarefy.patterns import Slice
from rarefy.penalties import L1, GroupLasso, Search, separable_strength

NUMBERS = st.floats(-5, 5)


@given(NUMBERS, st.floats(0.01, 3), st.floats(0.01, 3))
@settings(max_examples=100, deadline=None)
def test_soft_thresholding_by_brute_force(w: float, strength: float, step: float) -> None:
    grid = torch.linspace(-6, 6, 12001, dtype=torch.float64)
    best = grid[((grid - w).square() / (2 * step) + strength * grid.abs()).argmin()]
    got = L1(strength).prox(torch.tensor([w], dtype=torch.float64), step)
    assert abs(float(got) - float(best)) <= 6e-4
    assert float(got) == 0 or abs(w) > step * strength


def test_step_sizes_may_differ_between_weights() -> None:
    weight, step = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0.1, 2.0, 0.5])
    torch.testing.assert_close(L1(1.0).prox(weight, step), torch.tensor([0.9, 0.0, -0.5]))
    assert L1(2.0).value(weight) == 6.0


def test_residual_is_zero_at_a_stationary_point_only() -> None:
    weight, gradient = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-0.5, 0.5, 0.3])
    assert L1(0.5).residual(weight, gradient) == 0
    assert L1(0.5).residual(weight, torch.tensor([-0.5, 0.5, 0.7])) == pytest.approx(0.4)
    assert L1(0.5).residual(weight, torch.tensor([0.5, 0.5, 0.0])) == pytest.approx(2.0)  # the sign counts


@given(st.lists(NUMBERS, min_size=2, max_size=4), st.floats(0.05, 3))
@settings(max_examples=60, deadline=None)
def test_group_lasso_is_better_than_its_neighbours(row: list[float], strength: float) -> None:
    weight = torch.tensor([row], dtype=torch.float64)
    penalty = GroupLasso(Slice(0), strength)
    got = penalty.prox(weight, 0.7)
    g = torch.Generator().manual_seed(0)

    def objective(v: torch.Tensor) -> float:
        return float((v - weight).square().sum()) / 1.4 + penalty.value(v)

    for scale in (1e-3, 0.1, 1.0):
        other = got + scale * torch.randn(got.shape, generator=g, dtype=torch.float64)
        assert objective(other) >= objective(got) - 1e-9
    assert bool((got == 0).all()) == (float(weight.norm()) <= 0.7 * strength)


@pytest.mark.parametrize("count", range(13))
def test_separable_problems_get_exactly_what_was_asked(count: int) -> None:
    basis = torch.linalg.qr(torch.randn(20, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    y = torch.randn(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    strength = separable_strength(basis.T @ y, count)
    solution = L1(strength).prox(basis.T @ y, 1.0)  # orthonormal columns: the lasso's closed form
    assert int(solution.count_nonzero()) == count
    gradient = basis.T @ (basis @ solution - y)
    assert L1(strength).residual(solution, gradient) < 1e-12
    with pytest.raises(OptionError):
        separable_strength(basis.T @ y, 13)


@pytest.mark.parametrize("strength", [0.02, 0.1, 0.3])
def test_a_lasso_has_the_non_zeros_that_others_find(strength: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    g = torch.Generator().manual_seed(5)
    design = torch.randn(60, 20, generator=g, dtype=torch.float64)
    y = design[:, :4].sum(1) + torch.randn(60, generator=g, dtype=torch.float64)
    weight, step = torch.zeros(20, dtype=torch.float64), 60 / float(torch.linalg.matrix_norm(design, 2) ** 2)
    for _ in range(3000):
        weight = L1(strength).prox(weight - step * design.T @ (design @ weight - y) / 60, step)
    gradient = design.T @ (design @ weight - y) / 60
    assert L1(strength).residual(weight, gradient) < 1e-6
    other = linear_model.Lasso(
        alpha=strength, fit_intercept=False, tol=1e-12, max_iter=100_000
    )  # its loss is the mean too
    other.fit(design.numpy(), y.numpy())
    torch.testing.assert_close(weight, torch.from_numpy(other.coef_), rtol=0, atol=1e-6)
    assert int(weight.count_nonzero()) == int((abs(other.coef_) > 1e-12).sum()) < 20


@pytest.mark.parametrize("targets", [1, 2, 5])
def test_the_search_reaches_prescribed_counts_of_correlated_lassos(targets: int) -> None:
    g = torch.Generator().manual_seed(3)
    design = torch.randn(40, 30, generator=g, dtype=torch.float64) + torch.randn(
        40, 1, generator=g, dtype=torch.float64
    )
    y = design[:, :6].sum(1) + 0.5 * torch.randn(40, generator=g, dtype=torch.float64)
    search, step = (
        Search(float((design.T @ y).abs().max()) / 40 * 1.1),
        1 / float(torch.linalg.matrix_norm(design, 2) ** 2 / 40),
    )
    weight = torch.zeros(30, dtype=torch.float64)
    for solves in range(120):  # from above the rule is careful: it never falls below the strength that is sought
        for _ in range(1500 if solves else 10):
            weight = L1(search.strength).prox(weight - step * design.T @ (design @ weight - y) / 40, step)
        gradient = design.T @ (design @ weight - y) / 40
        found = int(weight.count_nonzero())
        if solves == 0:
            assert found == 0  # strength above max|g(0)|: nothing is left
        if found == targets:
            break
        search = search.next(gradient, found, targets)
    assert found == targets, f"{found} after {solves} solves"
    assert L1(search.strength).residual(weight, gradient) < 1e-6


def test_the_guard_of_the_search() -> None:
    dead = torch.zeros(50)  # no gradient at all: the published rule would go to 0, and the next network is dense
    assert Search(0.4).next(dead, 0, 10) == Search(0.1, 0.0, 0.4)
    assert Search(0.4).next(dead, 30, 10) == Search(0.8, 0.4, math.inf)
    inside = Search(0.4, low=0.1).next(dead, 0, 10)
    assert inside.strength == pytest.approx(0.2) and (inside.low, inside.high) == (0.1, 0.4)
    crossed = Search(0.5, low=0.6).next(dead, 0, 10)
    assert crossed.low < crossed.strength < crossed.high
    gradient = torch.linspace(0, 1, 101)
    assert Search(1.0).next(gradient, 1, 11).strength == pytest.approx(0.9)  # the eleventh largest
