"""The capped simplex: against sorting, against its own conditions, at every instruction set and thread count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy import kernels
from rarefy.errors import OptionError
from rarefy.kernels import reference
from rarefy.kernels.native import native

NUMBERS = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0]), st.floats(1e-6, 1e6))


@pytest.fixture(params=native.available_isas())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def problem(n: int, seed: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, n, generator=g, dtype=torch.float64).mul(3).exp()
    return a.masked_fill_(torch.rand(rows, n, generator=g) < 0.1, 0), torch.rand(rows, n, generator=g).double() * 3


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12), st.integers(0, 13))
@settings(max_examples=300, deadline=None)
def test_it_is_the_one_level_that_adds_up(pairs: list[tuple[float, float]], k: int) -> None:
    a, c = torch.tensor(pairs, dtype=torch.float64).T
    u = kernels.capped_simplex(a, c, k)
    positive = int((a > 0).sum())
    assert bool(((u >= 0) & (u <= 1)).all())
    assert float(u.sum()) == pytest.approx(min(k, positive), abs=1e-9)
    if positive > k:  # one mu explains all of them
        inner = (u > 0) & (u < 1)
        levels = ((u + c) / a)[inner]
        if levels.numel():
            mu = float(levels[0])
            assert levels.tolist() == pytest.approx([mu] * levels.numel(), rel=1e-6)
            assert bool((mu * a[u == 0] - c[u == 0] <= 1e-6 * (1 + c[u == 0])).all())
            assert bool((mu * a[u == 1] - c[u == 1] >= 1 - 1e-6 * (2 + c[u == 1])).all())
        elif k > 0:
            full, empty = u == 1, u == 0
            top, bottom = ((1 + c) / a)[full].max(), (c / a)[empty & (a > 0)].min()
            assert top <= bottom * (1 + 1e-9)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 255, 4096, 16385, 70001])
def test_it_equals_sorting(n: int, level: str) -> None:
    for seed, share in enumerate((0.0, 0.01, 0.3, 0.9, 1.0)):
        a, c = problem(n, seed, rows=3)
        k = torch.full((3,), int(share * n))
        expected = reference.capped_simplex(a, c, k)
        torch.testing.assert_close(kernels.capped_simplex(a, c, k), expected, rtol=0, atol=1e-8)
        one = kernels.capped_simplex(a[0].float(), 0.25, int(k[0])).double()
        torch.testing.assert_close(
            one[None],
            reference.capped_simplex(a[:1].float(), torch.full((1, n), 0.25), k[:1]),
            rtol=0,
            atol=1e-6,
        )


def test_threads_and_instruction_sets_change_no_bit() -> None:
    a, c = problem(300_000, 0)
    before, found = native.isa(), []
    for isa in native.available_isas():
        native.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(kernels.capped_simplex(a, c, 20_000))
    native.set_isa(before)
    assert all(torch.equal(found[0], other) for other in found)


def test_soft_top_k_is_the_projection_onto_the_simplex() -> None:
    x = torch.tensor([0.9, 0.1, 2.0, -1.0, 0.8], dtype=torch.float64)
    u = kernels.capped_simplex(torch.ones_like(x), x.max() - x, 2)
    others = [kernels.capped_simplex(torch.ones(5), torch.rand(5), 2).double() for _ in range(200)]
    assert float(u.sum()) == pytest.approx(2)
    assert all(float((u - x) @ (v - u)) >= -1e-6 for v in others)  # obtuse angle to every other point


def test_types_and_refusals() -> None:
    assert kernels.capped_simplex(torch.tensor([2.0, 1.0], dtype=torch.bfloat16), 0.0, 1).dtype == torch.bfloat16
    assert kernels.capped_simplex(torch.zeros(0), 0.5, 1).numel() == 0
    assert kernels.capped_simplex(torch.rand(4, 6)[:, ::2], 0.5, torch.tensor([0, 1, 2, 3])).sum(1).tolist() == (
        pytest.approx([0, 1, 2, 3])
    )
    for wrong in (
        lambda: kernels.capped_simplex(torch.tensor([1.0, float("nan")]), 0.0, 1),
        lambda: kernels.capped_simplex(torch.tensor([1.0, -1.0]), 0.0, 1),
        lambda: kernels.capped_simplex(torch.tensor([1.0, float("inf")]), 0.0, 1),
        lambda: kernels.capped_simplex(torch.tensor([1.0, 1.0]), -0.5, 1),
        lambda: kernels.capped_simplex(torch.tensor([1, 2]), 0.0, 1),
        lambda: kernels.capped_simplex(torch.rand(2, 3), torch.rand(3), 1),
        lambda: kernels.capped_simplex(torch.rand(3), 0.0, -1),
        lambda: kernels.capped_simplex(torch.rand(2, 3), 0.0, torch.tensor([1, 2, 3])),
    ):
        with pytest.raises(OptionError):
            wrong()
