"""The width of a small dense net: the largest within the budget, against brute force."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rarefy import models
from rarefy.errors import ModelError


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def builder(name: str) -> Callable[[float], nn.Module]:
    return lambda width: models.build(name, width=width)


def lenet_size(first: int, second: int) -> int:
    return 784 * first + first + first * second + second + second * 10 + 10


# every width at which one of the two hidden layers gains a unit lies next to (k + 1/2) / units
EDGES = sorted({(k + 0.5) / units for units in (300, 100) for k in range(units)})
STEPS = sorted(
    {lenet_size(max(1, round(300 * w)), max(1, round(100 * w))) for e in EDGES for w in (e - 1e-6, e + 1e-6)}
)


@settings(max_examples=60, deadline=None)
@given(st.integers(min_value=lenet_size(1, 1), max_value=300_000))
def test_largest_within_the_budget(budget: int) -> None:
    width = models.small_dense_width(builder("lenet-300-100"), budget)
    assert 0 < width <= 1
    assert count(models.build("lenet-300-100", width=width)) == max(size for size in STEPS if size <= budget)


@pytest.mark.parametrize("name", models.available())
def test_the_next_step_is_over_the_budget(name: str) -> None:
    with torch.device("meta"):
        budget = count(models.build(name)) // 10
        width = models.small_dense_width(builder(name), budget)
        assert count(models.build(name, width=width)) <= budget < count(models.build(name, width=width + 2e-7))


def test_a_net_that_fits_stays_as_it_is() -> None:
    assert models.small_dense_width(builder("lenet-5"), 431_080) == 1.0
    assert models.small_dense_width(builder("lenet-5"), 431_079) < 1.0


def test_budgets_below_the_narrowest() -> None:
    smallest = lenet_size(1, 1)
    assert (
        count(models.build("lenet-300-100", width=models.small_dense_width(builder("lenet-300-100"), smallest)))
        == smallest
    )
    with pytest.raises(ModelError, match=r"budget of 806 parameters is below the 807 .* \(at width 1: 266,610\)"):
        models.small_dense_width(builder("lenet-300-100"), smallest - 1)
    with pytest.raises(ModelError, match="budget is 0"):
        models.small_dense_width(builder("lenet-300-100"), 0)


def test_a_count_that_falls_is_refused() -> None:
    def build(width: float) -> nn.Module:
        return nn.Linear(10, 100 if 0.4 < width < 0.6 else 1 + int(50 * width))

    with pytest.raises(ModelError, match="must not shrink as the width grows"):
        models.small_dense_width(build, 300)


def test_the_callers_random_numbers_stay() -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    models.small_dense_width(builder("lenet-300-100"), 50_000)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_constructor_that_looks_at_values() -> None:
    built = []

    def build(width: float) -> nn.Module:
        rates = [rate.item() for rate in torch.linspace(0, 0.5, 3)]  # not possible on the meta device
        built.append(width)
        return nn.Sequential(nn.Linear(4, max(1, round(100 * width))), nn.Dropout(rates[1]))

    width = models.small_dense_width(build, 250)
    assert count(build(width)) == 250 and built
