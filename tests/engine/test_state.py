"""Saving, exact resume, loading dense weights, finalize and detach."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rarefy
from rarefy.errors import StateError
from tests.engine.common import assert_sparse, backward, mlp


def make(
    method: str = "rigl", seed: int = 0, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, rarefy.Sparsifier]:
    model = mlp(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    options = {"every": 2, **options} if method in ("rigl", "set", "gradual") else options
    return (
        model,
        optimizer,
        rarefy.sparsify(model, method, sparsity=0.8, optimizer=optimizer, total_steps=20, seed=seed, **options),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", ["rigl", "set", "gradual", "static", "magnitude"])
@pytest.mark.parametrize("order", ["model first", "sparsifier first", "sparsify from the state"])
def test_resume_is_exact_in_any_order_of_loading(method: str, order: str, tmp_path: Path) -> None:
    whole = make(method)
    train(*whole[:2], range(14))

    model, optimizer, sparse = make(method)
    train(model, optimizer, range(7))
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sparse": sparse.state_dict()},
        tmp_path / "c.pt",
    )
    saved = torch.load(tmp_path / "c.pt", weights_only=True)

    if order == "sparsify from the state":
        model = mlp(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        before = {k: v.clone() for k, v in model.state_dict().items()}
        method_object = whole[2].method
        sparse = rarefy.sparsify(model, method_object, optimizer=optimizer, total_steps=20, state=saved["sparse"])
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    else:
        model, optimizer, sparse = make(method, seed=1)  # other weights, other masks, other generator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if order == "sparsify from the state":
            pass
        elif order == "model first":
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            sparse.load_state_dict(saved["sparse"])
        else:
            sparse.load_state_dict(saved["sparse"])
            optimizer.load_state_dict(saved["optimizer"])
            model.load_state_dict(saved["model"])
    train(model, optimizer, range(7, 14))

    assert sparse.events == whole[2].events
    assert sparse.training_cost() == whole[2].training_cost()
    assert sparse.explored() == whole[2].explored()
    for mine, theirs in ((model.state_dict(), whole[0].state_dict()), (sparse.masks(), whole[2].masks())):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for a, b in zip(optimizer.state.values(), whole[1].state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)


def test_masks_are_bit_packed_in_the_state() -> None:
    _, _, sparse = make()
    for name, layer in sparse.state_dict()["layers"].items():
        assert layer["mask"].numel() == -(-sparse.layers[name].numel // 8)


def test_loading_dense_weights_applies_the_masks_and_says_so() -> None:
    model, optimizer, sparse = make()
    with pytest.warns(UserWarning, match=r"non-zero weights where the masks are zero: 0\.weight"):
        model.load_state_dict(mlp(5).state_dict())
    assert_sparse(sparse, 0.8)
    mask = sparse.layers["3.weight"].mask()
    assert torch.equal(model[3].weight[mask], mlp(5)[3].weight[mask])
    train(model, optimizer, range(3))
    assert_sparse(sparse, 0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict())  # already sparse: nothing to say


def test_loading_by_assignment_or_into_a_part_is_noticed() -> None:
    model, optimizer, sparse = make()
    with pytest.warns(UserWarning, match="masks"):
        model.load_state_dict(mlp(5).state_dict(), assign=True)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, range(3))
    assert_sparse(sparse, 0.8)
    model[3].load_state_dict(mlp(6)[3].state_dict())
    assert_sparse(sparse)
    with pytest.warns(UserWarning, match=r"3\.weight"):
        train(model, optimizer, range(3, 4))


def test_names_and_dense_checkpoints_stay_interchangeable(tmp_path: Path) -> None:
    model, _, sparse = make()
    assert model.state_dict().keys() == mlp().state_dict().keys()
    mlp().load_state_dict(model.state_dict(), strict=True)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors")["0.weight"].count_nonzero() <= sparse.layers["0.weight"].nnz


def test_everything_python_does_to_a_model_works_at_every_moment(tmp_path: Path) -> None:
    model, optimizer, sparse = make()
    for step in range(3):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies.append(torch.load(buffer, weights_only=False))
        for twin in copies:
            assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
            assert not any(p._backward_hooks for p in twin.parameters())
        train(model, optimizer, range(step, step + 1))
    model.to(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert all(not layer.weight()[~layer.mask()].any() for layer in sparse.layers.values())


def test_finalize_leaves_a_plain_model_and_detach_lets_go() -> None:
    for leave in ("finalize", "detach"):
        model, optimizer, sparse = make()
        train(model, optimizer, range(4))
        result = getattr(sparse, leave)()
        assert result is (model if leave == "finalize" else None)
        masks = sparse.masks()
        assert all(not model.get_parameter(n).detach()[~m].any() for n, m in masks.items())
        assert "80" in str(sparse.summary())
        assert not any(m._load_state_dict_post_hooks for m in model.modules())
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        assert not optimizer._optimizer_step_post_hooks
        train(model, optimizer, range(4, 6))
        assert all(model.get_parameter(n).detach()[~m].any() for n, m in masks.items())
        sparse.finalize()  # a second time does nothing
        assert sparse.step_count == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update(format=99), "another version"),
        (lambda s: s.pop("events"), "lacks events"),
        (lambda s: s.update(method="set"), "method 'set'"),
        (lambda s: s["options"].update(every=3), "option every was 3"),
        (lambda s: s.update(total_steps=9), "total_steps was 9"),
        (lambda s: s["layers"].pop("0.weight"), "another model.*0.weight"),
        (lambda s: s["layers"]["0.weight"].update(shape=[3, 4]), "0.weight: the saved shape"),
        (lambda s: s["layers"]["0.weight"].update(mask=torch.zeros(3, dtype=torch.uint8)), "not a bit mask"),
        (lambda s: s["layers"]["3.weight"].pop("mask"), "3.weight: the saved state of this layer is incomplete"),
        (lambda s: s.update(layers=None), "its layers is a NoneType"),
        (lambda s: s.update(step="x"), "step"),
        (lambda s: s.update(generator=torch.zeros(3)), "generator"),
        (lambda s: s.update(events=torch.full((2, 5), 77)), "events"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(damage: Any, message: str) -> None:
    model, optimizer, sparse = make()
    train(model, optimizer, range(3))
    state = copy.deepcopy(sparse.state_dict())
    weights, masks, events = copy.deepcopy(model.state_dict()), sparse.masks(), list(sparse.events)
    damage(state)
    with pytest.raises(StateError, match=message):
        sparse.load_state_dict(state)
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())
    assert all(torch.equal(masks[n], m) for n, m in sparse.masks().items())
    assert sparse.events == events
    assert sparse.step_count == 3


def test_events_and_cost_add_up() -> None:
    model, optimizer, sparse = make("rigl", every=2)
    train(model, optimizer, range(16))
    for name, layer in sparse.layers.items():
        mine = [e for e in sparse.events if e.layer == name]
        kept = layer.numel
        for event in mine:
            kept += event.grown - event.dropped
            assert kept == event.kept
        assert kept == layer.nnz
        cost = sparse.training_cost()[name]
        assert cost.steps == 16
        assert cost.kept_steps == 16 * layer.nnz
        assert cost.dense_gradient_steps == 8  # every 2 steps up to step 15, and at 15 itself
    assert sparse.events == sorted(sparse.events, key=lambda e: e.step)
    assert {e.step for e in sparse.events} == {0, 2, 4, 6, 8, 10, 12, 14, 15}
    assert 0.2 < sparse.explored() < 1
