"""Soft shrinkage: closed forms with the learning rate at 0, exact low sets, and what follows the freeze."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from rarefy.errors import OptionError
from tests.engine.common import assert_sparse, backward, mlp

ALL = {
    "issp": {"beta": 0.9},
    "iss-r": {"delta": 1e-3},
    "greg": {"growth": 1e-2, "every": 2},
}


def run(
    method: str, steps: int, lr: float = 0.0, adam: bool = False, **options: Any
) -> tuple[rarefy.Sparsifier, torch.optim.Optimizer, dict[str, torch.Tensor]]:
    model = mlp()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    make = torch.optim.Adam if adam else torch.optim.SGD
    optimizer = make(model.parameters(), lr=lr)
    sparse = rarefy.sparsify(model, method, optimizer=optimizer, total_steps=60, **{"sparsity": 0.7} | options)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return sparse, optimizer, before


def low_set(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    n = weight.numel()
    low = torch.zeros(n, dtype=torch.bool)
    low[weight.abs().flatten().argsort()[: min(math.ceil(sparsity * n), int(0.995 * n))]] = True
    return low.view_as(weight)


@pytest.mark.parametrize("beta", [0.95, 0.5, 0.0, 1.0])
def test_without_learning_low_weights_fade_geometrically(beta: float) -> None:
    sparse, _, before = run("issp", 7, beta=beta, stop=50)
    for name, layer in sparse.layers.items():
        low = low_set(before[name], 0.7)
        expected = before[name].clone()
        for _ in range(7):
            expected = torch.where(low, beta * expected, expected)
        assert torch.equal(layer.weight(), expected)
        assert layer.weight()[low].abs().max() <= layer.weight()[~low].abs().min()  # the order of the sets stays
        assert layer.nnz == layer.numel
        assert beta == 0 or torch.equal(layer.weight().sign(), before[name].sign())


def test_constant_shrinkage_is_soft_thresholding_of_the_low_set() -> None:
    sparse, _, before = run("iss-r", 1, delta=0.05, stop=50)
    for name, layer in sparse.layers.items():
        soft = before[name].sign() * (before[name].abs() - 0.05).clamp(min=0)
        torch.testing.assert_close(layer.weight(), torch.where(low_set(before[name], 0.7), soft, before[name]))


def test_growing_regularisation_is_the_gradient_of_its_penalty() -> None:
    sparse, _, _ = run("greg", 5, lr=0.1, growth=0.1, ceiling=0.15, every=2, stop=50)
    strength = sparse.memory["strength"]["0.weight"]
    assert float(strength.max()) == pytest.approx(0.15)  # 0.1 at step 2, the ceiling at step 4
    twin = mlp()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    strengths = {n: torch.zeros_like(p) for n, p in twin.named_parameters() if p.ndim == 2}
    for step in range(5):
        optimizer.zero_grad()
        backward(twin, step)
        for name, s in strengths.items():
            parameter = twin.get_parameter(name)
            parameter.grad += s * parameter.detach()
        optimizer.step()
        if step in (1, 3):
            for name, s in strengths.items():
                s[low_set(twin.get_parameter(name).detach(), 0.7)] += 0.1
                s.clamp_(max=0.15)
    for name, layer in sparse.layers.items():
        torch.testing.assert_close(layer.weight(), twin.get_parameter(name).detach(), rtol=1e-5, atol=1e-7)
    value = sum(float((strengths[n] * layer.weight().square()).sum()) for n, layer in sparse.layers.items()) / 2
    assert sparse.penalty() == pytest.approx(value, rel=1e-5) and value > 0


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("adam", [False, True])
def test_the_freeze_keeps_the_exact_number_and_zeros_stay(method: str, adam: bool) -> None:
    sparse, _, _ = run(method, 20, lr=0.01, adam=adam, **ALL[method])  # a third of 60
    expected = {n: layer.numel - math.ceil(0.7 * layer.numel - 1e-9) for n, layer in sparse.layers.items()}
    assert {n: layer.nnz for n, layer in sparse.layers.items()} == expected
    assert [event.step for event in sparse.events] == [20] * 3
    masks = sparse.masks()
    optimizer = sparse._optimizers.all[0]
    for step in range(10):
        backward(sparse.model, step)
        optimizer.step()
        optimizer.zero_grad()
        assert_sparse(sparse)
    assert all(torch.equal(m, masks[n]) for n, m in sparse.masks().items())
    assert sparse.penalty() == 0
    model = sparse.finalize()
    assert {n: int(model.get_parameter(n).count_nonzero()) for n in expected} == expected


def test_the_structure_still_moves_and_hard_thresholding_is_the_limit() -> None:
    fresh, _, before = run("issp", 15, lr=0.02, adam=True, beta=0.9, stop=16)
    moved = sum(
        int((low_set(layer.weight(), 0.7) ^ low_set(before[n], 0.7)).sum()) for n, layer in fresh.layers.items()
    )
    assert moved > 20
    hard, _, _ = run("issp", 15, lr=0.1, beta=0.0, stop=50)
    for layer in hard.layers.values():
        assert int(layer.weight().count_nonzero()) == layer.numel - math.ceil(0.7 * layer.numel - 1e-9)
    dense, _, _ = run("issp", 15, lr=0.1, beta=1.0, stop=50)
    twin, _, _ = run("dense", 15, lr=0.1, sparsity=None)
    for (name, a), (_, b) in zip(dense.model.state_dict().items(), twin.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_tiny_layers_keep_one_and_patterns_hold() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 200))
    sparse = rarefy.sparsify(model, "issp", sparsity=0.999, stop=1)
    sparse.step()
    assert [layer.nnz for layer in sparse.layers.values()] == [1, 2]  # 99.5 % at most
    grouped = rarefy.sparsify(nn.Linear(16, 8), "issp", pattern="2:4", beta=0.5, stop=2)
    sparse_weight = grouped.layers["weight"].weight().clone()
    grouped.step()
    halved = (grouped.layers["weight"].weight() - 0.5 * sparse_weight).abs() < 1e-9
    assert (halved.view(8, 4, 4).sum(-1) == 2).all()
    grouped.step()
    assert (grouped.layers["weight"].mask().view(8, 4, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("method", ALL)
def test_a_resumed_run_is_the_run_that_was_not_stopped(method: str) -> None:
    whole, _, _ = run(method, 30, lr=0.02, adam=True, **ALL[method])
    half, optimizer, _ = run(method, 13, lr=0.02, adam=True, **ALL[method])
    buffer = io.BytesIO()
    torch.save([half.model.state_dict(), optimizer.state_dict(), half.state_dict()], buffer)
    buffer.seek(0)
    weights, opt_state, state = torch.load(buffer, weights_only=True)
    model = mlp(seed=5)
    model.load_state_dict(weights)
    again = torch.optim.Adam(model.parameters(), lr=0.02)
    again.load_state_dict(opt_state)
    rarefy.sparsify(model, method, sparsity=0.7, total_steps=60, optimizer=again, state=state, **ALL[method])
    for step in range(13, 30):
        backward(model, step)
        again.step()
        again.zero_grad()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_bad_options_are_named() -> None:
    for method, options in (
        ("issp", {"beta": 1.2}),
        ("iss-r", {"delta": 0.0}),
        ("greg", {"growth": 1.0}),
        ("greg", {"every": 0}),
        ("issp", {"sparsity": 1.0}),
    ):
        with pytest.raises(OptionError, match=next(iter(options))):
            rarefy.methods.make(method, **options)
    assert rarefy.methods.ISSP().clock(None).last == 100_000
