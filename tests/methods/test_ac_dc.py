"""AC/DC: phases at exactly their steps, fixed masks, dense phases that are dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rarefy
from rarefy.errors import OptionError
from tests.engine.common import assert_sparse, backward, mlp
from tests.engine.compressed import assert_same_run, sgd
from tests.engine.compressed import train as run


def phases(total: int, **options: object) -> list[tuple[int, int]]:
    """Compressed stretches, as pairs of steps [first, last)."""
    model = nn.Linear(10, 10, bias=False)
    sparse = rarefy.sparsify(model, "ac-dc", sparsity=0.9, total_steps=total, **options)
    state, found, began = sparse.sparsity > 0, [], 0
    for step in range(1, total + 1):
        sparse.step()
        if (sparse.sparsity > 0) != state:
            state = not state
            if state:
                began = step
            else:
                found.append((began, step))
    return [*found, (began, total)] if state else found


def test_phases_are_those_of_the_papers_runs() -> None:
    imagenet = [(10, 15), (20, 25), (30, 35), (40, 45), (50, 55), (60, 65), (70, 75), (85, 100)]
    assert phases(100) == imagenet
    assert phases(100, every=5, start=10, stop=85) == imagenet
    cifar = [(10, 30), (50, 70), (90, 110), (130, 150), (170, 200)]
    assert phases(200, every=0.1, start=0.05) == cifar


def test_phases_at_the_ends() -> None:
    assert phases(20, every=5, start=0, stop=0) == [(0, 20)]
    assert phases(20, every=5, start=0, stop=10) == [(0, 5), (10, 20)]
    assert phases(20, every=5, start=0, stop=9) == [(9, 20)], "no whole dense phase fits before the last"
    assert phases(20, every=1, start=16, stop=19) == [(16, 17), (19, 20)]
    with pytest.raises(OptionError, match="less than one step"):
        phases(20, every=0.01)
    with pytest.raises(OptionError, match="total_steps"):
        rarefy.sparsify(mlp(), "ac-dc")


def test_dense_phases_are_dense_and_masks_stand_still_in_sparse_ones() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    sparse = rarefy.sparsify(
        model, "ac-dc", sparsity=0.8, optimizer=optimizer, total_steps=20, every=3, start=2, stop=17
    )
    compressed = [*range(2, 5), *range(8, 11), *range(17, 21)]
    previous = sparse.masks()
    for step in range(1, 21):
        weights = {name: layer.weight().abs().clone() for name, layer in sparse.layers.items()}
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        assert_sparse(sparse, 0.8 if step in compressed else 0.0)
        masks = sparse.masks()
        if step not in (2, 5, 8, 11, 17):
            assert all(torch.equal(mask, previous[name]) for name, mask in masks.items())
        if step in (5, 11):
            assert not any(optimizer.state.values()), "momentum begins anew with a dense phase"
            for name, layer in sparse.layers.items():
                assert not layer.weight()[~previous[name]].any(), "what was dropped begins at 0"
                assert weights[name].count_nonzero() == previous[name].sum()
        elif step not in (1,):
            assert any(optimizer.state.values())
        if step in (7, 13):
            alive = sum(int(layer.weight().count_nonzero()) for layer in sparse.layers.values())
            assert alive > 0.8 * sparse.numel, "all are trained (but behind a unit that is dead)"
        previous = masks
    assert [e.step for e in sparse.events if e.layer == "0.weight"] == [2, 5, 8, 11, 17]


def test_the_mask_is_the_global_top_of_the_dense_weights() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(
        model, "ac-dc", sparsity=0.75, optimizer=optimizer, total_steps=10, every=2, start=3, stop=9
    )
    for step in range(3):
        backward(model, step)
        if step == 2:
            dense = {n: p.detach() - 0.1 * p.grad for n, p in model.named_parameters() if n in sparse.layers}
        optimizer.step()
        optimizer.zero_grad()
    everything = torch.cat([w.abs().flatten() for w in dense.values()])
    threshold = everything.topk(sparse.nnz).values[-1]
    for name, weight in dense.items():
        assert torch.equal(sparse.layers[name].mask(), weight.abs() >= threshold)


def test_resume_in_either_phase_is_exact() -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, rarefy.Sparsifier]:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, rarefy.sparsify(model, "ac-dc", optimizer=optimizer, total_steps=20, every=3)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()

    whole = make()
    train(*whole[:2], range(20))
    for stop in (3, 5, 7, 18):
        first, second = make(), make()
        train(*first[:2], range(stop))
        for mine, saved in zip(second, first, strict=True):
            mine.load_state_dict(saved.state_dict())
        train(*second[:2], range(stop, 20))
        assert all(
            torch.equal(a, b)
            for a, b in zip(second[0].state_dict().values(), whole[0].state_dict().values(), strict=True)
        )
        assert second[2].events == whole[2].events


def test_on_compressed_storage_it_is_the_same_run() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        runs = [run("mlp", s, sgd, "ac-dc", 60, every=10, start=5, stop=50) for s in ("masked", "compressed")]
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_run(*runs)
