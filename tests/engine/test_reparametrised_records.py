"""Computed weights in the log, in costs and summaries, and what is refused: the model is then as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from rarefy.errors import OptionError, SelectionError, StateError
from tests.engine.common import batch, mlp
from tests.engine.reparametrised import METHODS, make, named, train


def test_a_mask_that_moves_at_every_step_is_logged_once_in_a_hundred() -> None:
    model, optimizer, sparse = make("movement")
    previous, dropped, grown = sparse.masks(), 0, 0
    for step in range(230):
        train(model, optimizer, range(step, step + 1))
        now = sparse.masks()
        dropped += sum(int((previous[n] & ~m).sum()) for n, m in now.items())
        grown += sum(int((m & ~previous[n]).sum()) for n, m in now.items())
        previous = now
    assert {event.step for event in sparse.events} == {100, 200}
    sparse.finalize()
    assert {event.step for event in sparse.events} == {100, 200, 230}
    assert sum(event.dropped for event in sparse.events) == dropped
    assert sum(event.grown for event in sparse.events) == grown > 0
    assert {e.layer: e.kept for e in sparse.events} == {n: layer.nnz for n, layer in sparse.layers.items()}


def test_cost_counts_sparse_forward_and_dense_gradients() -> None:
    model, optimizer, sparse = make("movement")
    kept = dict.fromkeys(sparse.layers, 0)
    for step in range(10):
        for name, layer in sparse.layers.items():
            kept[name] += layer.nnz  # what the coming step computes with
        train(model, optimizer, range(step, step + 1))
    for name, cost in sparse.training_cost().items():
        assert cost == (10, kept[name], 10, 0)


def test_what_is_computed_is_not_called_dense_in_the_summary() -> None:
    model, _, sparse = make("trainable-threshold")
    summary = sparse.summary(batch(0)[0])
    assert sorted(item.name for item in summary.left_out) == ["0.bias", "1.bias", "1.weight", "3.bias", "5.bias"]
    assert summary.flops is not None and summary.flops[1] > 0
    model.append(nn.Linear(5, 5))
    assert "added after" in str(sparse.summary())


def test_errors_leave_the_model_as_it_was() -> None:
    def fails(model: nn.Module, error: type[Exception], match: str, **options: Any) -> None:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        method = options.pop("method", "movement")
        with pytest.raises(error, match=match):
            rarefy.sparsify(model, method, total_steps=10, **options)
        assert list(before) == list(model.state_dict())
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())

    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    fails(model, OptionError, "movement trains parameters of its own.*optimizer=")
    fails(model, OptionError, 'storage="masked"', optimizer=sgd, storage="compressed")
    part = torch.optim.SGD(model[5].parameters(), lr=0.1)
    fails(model, OptionError, r"0\.parametrizations\.weight\.0\.scores \[16, 12\].*no optimizer holds", optimizer=part)
    assert len(part.param_groups[0]["params"]) == 2
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    fails(tied, SelectionError, r"tied \(1\.weight\)", optimizer=torch.optim.SGD(tied.parameters(), lr=0.1))

    sparse = rarefy.sparsify(model, "movement", optimizer=sgd, total_steps=10)
    fails(model, SelectionError, r"finalize\(\)", method="magnitude")
    fails(copy.deepcopy(model), SelectionError, "bake_", method="magnitude")
    for part, wrong in (("extras", {}), ("untold", [1]), ("untold", None), ("settings", [])):
        state = sparse.state_dict()
        state["layers"]["5.weight"][part] = wrong
        with pytest.raises(StateError, match="incomplete"):
            sparse.load_state_dict(state)


@pytest.mark.parametrize("method", ["ste", "sr-ste", "pgf mdgf", "pgf sdgf", "t-mask", "bdwp"])
def test_weights_that_are_not_numbers_are_refused_before_and_after(method: str) -> None:
    model = mlp()
    with torch.no_grad():
        model[3].weight[2, 1] = float("nan")
    with pytest.raises(OptionError, match=r"3\.weight \[20, 16\]: .*NaN"):
        rarefy.sparsify(model, named(method), total_steps=20, **METHODS[method])
    assert list(model.state_dict()) == list(mlp().state_dict())
    if method == "t-mask":  # its mask is not made anew
        return
    model, _, sparse = make(method)
    trained = sparse.layers["3.weight"].target.parameter
    with torch.no_grad():
        trained[2, 1] = float("nan")
    names = list(model.state_dict())
    for _ in range(2):
        with pytest.raises(OptionError, match=r"3\.weight \[20, 16\]: .*NaN"):
            sparse.finalize()
        assert list(model.state_dict()) == names, "half of the network is plain"
    with torch.no_grad():
        trained[2, 1] = 0
    sparse.finalize()
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in sparse.masks().items())


def test_steps_by_hand_cannot_train_extras() -> None:
    _, _, sparse = make("movement")
    again = rarefy.sparsify(mlp(), sparse.method, total_steps=20, state=sparse.state_dict())  # only to look at
    assert again.nnz == sparse.nnz
    with pytest.raises(OptionError, match="pass optimizer"):
        again.step()
