"""What all sparse-to-sparse methods promise, on both storages: the same masks, exact counts, clean state, exact resume."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from rarefy import Sparsifier
from tests.engine.common import assert_sparse, batch, mlp
from tests.engine.compressed import NETS, Make, adamw, assert_same_run, sgd, step, train
from tests.methods.sparse_to_sparse import EXACT_IN_ALL, EXACT_PER_LAYER, FROM_ZERO, METHODS

STORAGES = ("masked", "compressed")


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Rounding then decides nothing: in float32 a near tie between two weights may fall the other way."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", NETS)
def test_both_storages_run_the_same(net: str, method: str, make: Make) -> None:
    runs = [train(net, storage, make, method, 120, **METHODS[method]) for storage in STORAGES]
    assert_same_run(runs[0], runs[1])
    sparse = runs[0][0]
    assert len({event.step for event in sparse.events}) > 5
    assert sparse.explored() > 1.1 * (1 - sparse.sparsity), "the masks hardly move"


@pytest.mark.parametrize("method", FROM_ZERO)
@pytest.mark.parametrize("net", NETS)
def test_counts_hold_and_nothing_dropped_is_remembered(net: str, method: str) -> None:
    model, data = NETS[net][0](), NETS[net][1]
    optimizer = adamw(model)
    sparse = rarefy.sparsify(
        model, method, sparsity=0.8, optimizer=optimizer, total_steps=60, **{**METHODS[method], "every": 3}
    )
    start = {name: layer.nnz for name, layer in sparse.layers.items()}
    explored = [sparse.explored()]
    for i in range(40):
        before = sparse.masks()
        seen = len(sparse.events)
        step(model, optimizer, data(i))
        assert_sparse(sparse)
        now = {name: layer.nnz for name, layer in sparse.layers.items()}
        if method in EXACT_PER_LAYER:
            assert now == start
        if method in EXACT_IN_ALL:
            assert sum(now.values()) == sum(start.values())
        for event in sparse.events[seen:]:
            mask = sparse.layers[event.layer].mask()
            assert event == (
                i + 1,
                event.layer,
                int((before[event.layer] & ~mask).sum()),
                int((~before[event.layer] & mask).sum()),
                now[event.layer],
            )
        explored.append(sparse.explored())
    assert explored == sorted(explored) and explored[-1] > explored[0]


@pytest.mark.parametrize("method", METHODS)
def test_no_update_after_the_stop_and_none_after_the_last_step(method: str) -> None:
    exact = {"explore": 0} if method == "top-kast" else {}  # not at every step first

    def steps(**options: Any) -> set[int]:
        model = mlp()
        optimizer = sgd(model)
        sparse = rarefy.sparsify(
            model,
            method,
            sparsity=0.7,
            optimizer=optimizer,
            total_steps=20,
            **{**METHODS[method], "every": 2} | exact | options,
        )
        for i in range(20):
            step(model, optimizer, batch(i))
        return {event.step for event in sparse.events if event.step and event.dropped + event.grown}

    assert max(steps(stop=9)) <= 9
    whole = steps()
    assert whole <= set(range(2, 20, 2)) and len(whole) > 2


@pytest.mark.parametrize("method", FROM_ZERO)
def test_growth_alone_leaves_the_output_as_it_is(method: str) -> None:
    """Grown weights are 0: with what was dropped put back, the network computes what it did."""
    model = mlp().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse = rarefy.sparsify(
        model, method, sparsity=0.7, optimizer=optimizer, total_steps=9, **{**METHODS[method], "every": 1}
    )
    if method == "deep-r":  # nothing crosses at a learning rate of 0
        sparse.memory |= {name: -signs for name, signs in sparse.memory.items()}
    before = {name: layer.weight().clone() for name, layer in sparse.layers.items()}
    masks = sparse.masks()
    step(model, optimizer, batch(0))
    moved = 0
    for name, layer in sparse.layers.items():
        grown, weight = layer.mask() & ~masks[name], layer.weight()
        moved += int(grown.sum())
        assert not weight[grown].any()
        assert torch.equal(weight[layer.mask() & masks[name]], before[name][layer.mask() & masks[name]])
    assert moved


def make(method: str, storage: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    model = mlp(seed)
    optimizer = adamw(model)
    options = {**METHODS[method], "every": 5}
    return (
        model,
        optimizer,
        rarefy.sparsify(
            model, method, sparsity=0.8, optimizer=optimizer, total_steps=40, seed=seed, storage=storage, **options
        ),
    )


@pytest.mark.parametrize("cut", [7, 10])  # between two updates, and at one
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact(method: str, storage: str, cut: int) -> None:
    whole = make(method, storage)
    for i in range(24):
        step(*whole[:2], batch(i))
    model, optimizer, sparse = make(method, storage)
    for i in range(cut):
        step(model, optimizer, batch(i))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), sparse.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer, sparse = make(method, storage, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the weights are not yet those of these masks
        model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    sparse.load_state_dict(saved[2])
    for i in range(cut, 24):
        step(model, optimizer, batch(i))
    assert sparse.events == whole[2].events and sparse.training_cost() == whole[2].training_cost()
    assert sparse.explored() == whole[2].explored()
    for name, mask in whole[2].masks().items():
        assert torch.equal(mask, sparse.layers[name].mask())
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    for a, b in zip(optimizer.state.values(), whole[1].state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_everything(method: str) -> None:
    runs = [make(method, "masked", seed) for seed in (3, 3, 4)]
    for model, optimizer, _ in runs:
        for i in range(12):
            step(model, optimizer, batch(i))
    masks = [sparse.masks() for _, _, sparse in runs]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert any(not torch.equal(masks[0][name], masks[2][name]) for name in masks[0])
    assert runs[0][2].events == runs[1][2].events
