"""Scores against their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rarefy.errors import OptionError
from rarefy.scores import SCORES, gradient, grasp, lamp, magnitude, random, snip, synflow

FLOATS = st.lists(st.floats(-8, 8, width=32).map(lambda x: x if abs(x) > 1e-6 else 0.0), min_size=1, max_size=30)


def lamp_by_definition(values: list[float]) -> list[float]:
    """w_u^2 over the sum of w_v^2 for all v at least as large; among equals, those with a lower index are larger."""
    found = []
    for u, w in enumerate(values):
        others = [x for v, x in enumerate(values) if abs(x) > abs(w) or (abs(x) == abs(w) and v <= u)]
        total = math.fsum(x * x for x in others)
        found.append(w * w / total if total else 0.0)
    return found


@settings(max_examples=100, deadline=None)
@given(FLOATS)
def test_lamp_by_definition(values: list[float]) -> None:
    found = lamp(torch.tensor(values, dtype=torch.float64))
    assert found.tolist() == pytest.approx(lamp_by_definition(values), rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(FLOATS)
def test_lamp_orders_a_layer_by_magnitude(values: list[float]) -> None:
    w = torch.tensor(values, dtype=torch.float32)
    order = magnitude(w).argsort(descending=True, stable=True)
    ranked, sizes = lamp(w)[order], magnitude(w)[order]
    assert (ranked.diff() <= 0).all()
    assert (ranked.diff()[sizes.diff() != 0] < 0).all()  # larger weights score strictly more, in float32 too
    assert ranked[0] == (1.0 if sizes[0] > 0 else 0.0)


def test_lamp_of_neighbouring_floats_keeps_their_order() -> None:
    w = torch.tensor([1.0])
    steps = [w]
    for _ in range(1000):
        steps.append(torch.nextafter(steps[-1], torch.tensor([2.0])))
    assert (lamp(torch.cat(steps)).diff() > 0).all()


def test_lamp_does_not_see_scale_or_strides() -> None:
    w = torch.randn(6, 5, 3, 3)
    assert torch.equal(lamp(w), lamp(w * 16))
    channels_last = w.contiguous(memory_format=torch.channels_last)
    assert torch.equal(lamp(channels_last), lamp(w))
    assert lamp(w).shape == w.shape


def test_lamp_of_zeros_and_nan() -> None:
    assert lamp(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]
    assert lamp(torch.tensor([1.0, math.nan])).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    w = torch.randn(3, 4).to(dtype)
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    assert magnitude(w).dtype == gradient(w).dtype == dtype
    assert snip(w, w).dtype == lamp(w).dtype == wide
    for score in (snip, grasp, synflow):
        torch.testing.assert_close(score(w, w), w.to(wide) ** 2)


def test_simple_scores() -> None:
    w, g = torch.tensor([[-2.0, 0.0], [1.0, 3.0]]), torch.tensor([[1.0, -4.0], [0.5, -1.0]])
    assert torch.equal(magnitude(w), torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
    assert torch.equal(gradient(g), torch.tensor([[1.0, 4.0], [0.5, 1.0]]))
    assert torch.equal(snip(w, g), torch.tensor([[2.0, 0.0], [0.5, 3.0]]))
    assert torch.equal(grasp(w, g), torch.tensor([[-2.0, 0.0], [0.5, -3.0]]))  # signed
    assert torch.equal(synflow(w, g), torch.tensor([[2.0, 0.0], [0.5, 3.0]]))


def test_snip_is_the_gradient_of_the_mask() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    w = torch.randn(3, 5, requires_grad=True)
    mask = torch.ones(3, 5, requires_grad=True)
    loss = nn.functional.cross_entropy(x @ (w * mask).t(), y)
    of_weight, of_mask = torch.autograd.grad(loss, (w, mask))
    torch.testing.assert_close(snip(w, of_weight), of_mask.abs())
    assert torch.equal(snip(w, 4 * of_weight), 4 * snip(w, of_weight))


def test_half_precision_snip_does_not_underflow() -> None:
    tiny = torch.full((2,), 1e-5, dtype=torch.float16)
    assert (snip(tiny, tiny) > 0).all()


def test_scores_carry_no_gradient_and_change_nothing() -> None:
    w = torch.randn(4, 4, requires_grad=True)
    before = w.detach().clone()
    for scores in (magnitude(w), snip(w, w), grasp(w, w), synflow(w, w), lamp(w), gradient(w)):
        assert not scores.requires_grad
    assert torch.equal(w.detach(), before)


def test_random_is_repeatable_and_blind_to_weights() -> None:
    first, again = (random([50, 40], torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.dtype == torch.float32 and first.min() >= 0 and first.max() < 1
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(random([50, 40], generator), first)
    assert not torch.equal(random([50, 40], generator), first)
    weights = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    corr = torch.corrcoef(torch.stack([weights.flatten().abs(), first.flatten()]))[0, 1]
    assert abs(corr) < 0.1


@pytest.mark.parametrize("score", [snip, grasp, synflow])
def test_wrong_shapes_are_refused(score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(OptionError, match=score.__name__ + r": the weight is \[2, 3\], its gradient \[3, 2\]"):
        score(torch.ones(2, 3), torch.ones(3, 2))


def test_every_score_is_listed() -> None:
    assert set(SCORES) == {"magnitude", "random", "gradient", "snip", "grasp", "synflow", "lamp"}
