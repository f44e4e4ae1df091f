"""One-shot and gradual magnitude pruning against the paper's closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import rarefy
from rarefy.scores import lamp
from tests.engine.common import assert_sparse, backward, mlp


def test_one_shot_keeps_the_globally_largest_and_not_one_weight_more() -> None:
    model = mlp()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim == 2}
    sparse = rarefy.sparsify(model, "magnitude", sparsity=0.75)
    everything = torch.cat([w.abs().flatten() for w in weights.values()])
    keep = int(0.25 * everything.numel() + 0.5)
    threshold = everything.topk(keep).values[-1]
    assert sparse.nnz == keep
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), torch.where(weight.abs() >= threshold, weight, 0.0))


def test_ties_are_broken_by_index_and_the_count_is_exact() -> None:
    model = nn.Linear(10, 10, bias=False)
    nn.init.ones_(model.weight)
    sparse = rarefy.sparsify(model, "magnitude", sparsity=0.75)
    assert sparse.layers["weight"].mask().flatten().tolist() == [True] * 25 + [False] * 75


def test_lamp_keeps_the_top_of_the_lamp_scores() -> None:
    model = mlp()
    scores = {n: lamp(p.detach().abs()) for n, p in model.named_parameters() if p.ndim == 2}
    sparse = rarefy.sparsify(model, "magnitude", sparsity=0.75, allocation="lamp")
    threshold = torch.cat([s.flatten() for s in scores.values()]).topk(sparse.nnz).values[-1]
    for name, mask in sparse.masks().items():
        assert torch.equal(mask, scores[name] >= threshold)


def test_one_shot_in_mid_training_prunes_once_and_stays() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    sparse = rarefy.sparsify(model, "magnitude", sparsity=0.8, optimizer=optimizer, start=0.5, total_steps=10)
    for step in range(10):
        assert sparse.sparsity == pytest.approx(0.8 if step >= 5 else 0.0, abs=1e-3)
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        assert_sparse(sparse)
    assert [event.step for event in sparse.events] == [5, 5, 5]


@pytest.mark.parametrize("curve", ["cubic", "linear", "cosine", "exponential"])
@pytest.mark.parametrize("allocation", ["uniform", "erk", "global", {"0": 0.5, "*": 0.9}])
def test_gradual_follows_its_curve_exactly(curve: str, allocation: object) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    sparse = rarefy.sparsify(
        model,
        "gradual",
        sparsity=0.9,
        optimizer=optimizer,
        start=4,
        stop=25,
        every=5,
        curve=curve,
        allocation=allocation,
    )
    shape = dict(
        cubic=lambda p: 1 - (1 - p) ** 3,
        linear=lambda p: p,
        cosine=lambda p: (1 - math.cos(math.pi * p)) / 2,
        exponential=None,
    )[curve]

    def expected(step: int, final: float) -> float:
        due = max((t for t in (4, 9, 14, 19, 24, 25) if t <= step), default=4)
        progress = (due - 4) / 21
        return 1 - (1 - final) ** progress if shape is None else final * shape(progress)

    for step in range(1, 31):
        before = {n: (layer.mask(), layer.weight().abs().clone()) for n, layer in sparse.layers.items()}
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        assert_sparse(sparse)
        for i, (name, layer) in enumerate(sparse.layers.items()):
            mask = layer.mask()
            assert (before[name][0] | ~mask).all(), "a pruned weight came back"
            if allocation == "uniform" or isinstance(allocation, dict):
                final = 0.5 if isinstance(allocation, dict) and i == 0 else 0.9
                assert layer.nnz == int((1 - expected(step, final)) * layer.numel + 0.5)
        if not isinstance(allocation, dict):
            assert sparse.nnz == pytest.approx((1 - expected(step, 0.9)) * sparse.numel, abs=2)
    assert {event.step for event in sparse.events} <= {9, 14, 19, 24, 25}


def test_gradual_drops_the_smallest_of_what_is_left() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse = rarefy.sparsify(model, "gradual", sparsity=0.9, optimizer=optimizer, start=0, stop=10, every=2)
    weights = {n: p.detach().abs().clone() for n, p in model.named_parameters() if n in sparse.layers}
    for step in range(10):
        backward(model, step)
        optimizer.step()
        for name, mask in sparse.masks().items():
            assert weights[name][mask].min() >= weights[name][~mask].max() if not mask.all() else True


def test_the_first_update_of_the_cubic_prunes_what_the_paper_says() -> None:
    model = nn.Linear(1000, 100, bias=False)
    sparse = rarefy.sparsify(model, "gradual", sparsity=0.8, start=0, stop=100, every=10)
    for _ in range(10):
        sparse.step()
    assert sparse.sparsity == pytest.approx(0.8 * (1 - (1 - 1 / 10) ** 3), abs=1e-5)
    for _ in range(40):
        sparse.step()
    assert sparse.sparsity == pytest.approx(0.8 - 0.8 / 8, abs=1e-5)


def test_a_kept_weight_that_is_zero_is_not_confused_with_a_pruned_one() -> None:
    model = nn.Linear(10, 10, bias=False)
    nn.init.zeros_(model.weight)
    sparse = rarefy.sparsify(model, "gradual", sparsity=0.9, start=0, stop=10, every=1)
    masks = [torch.ones(10, 10, dtype=torch.bool)]
    for _ in range(10):
        sparse.step()
        masks.append(sparse.layers["weight"].mask())
        assert (masks[-2] | ~masks[-1]).all()
    assert sparse.nnz == 10


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("allocation", ["erk", "er", "global", "lamp"])
def test_gradual_ends_at_exactly_the_number_asked_for(allocation: str, seed: int) -> None:
    torch.manual_seed(seed)
    widths = torch.randint(4, 40, (9,)).tolist()
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)])
    sparse = rarefy.sparsify(model, "gradual", sparsity=0.8, start=0, stop=20, every=1, allocation=allocation)
    for step in range(20):
        sparse.step()
        if step == 10:  # kept weights that are zero rank above dropped ones
            with torch.no_grad():
                model[0].weight.zero_()
    assert sparse.nnz == int(0.2 * sparse.numel + 0.5)


def test_gradual_at_one_instant_prunes_there() -> None:
    assert rarefy.sparsify(mlp(), "gradual", sparsity=0.8, start=0, stop=0).sparsity == pytest.approx(0.8, abs=1e-2)


def test_a_layer_that_is_not_a_number_is_named() -> None:
    model = mlp()
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    with pytest.raises(rarefy.RarefyError, match=r"3\.weight \[20, 16\].*NaN"):
        rarefy.sparsify(model, "magnitude", sparsity=0.5, allocation="uniform")
