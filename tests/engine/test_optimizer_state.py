"""Optimizer state is honest: a dropped weight leaves nothing behind, a grown one starts as if it were new."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rarefy
from tests.engine.common import backward, mlp

CASES = {
    "SGD": dict(lr=0.1, momentum=0.9),
    "Adam": dict(lr=0.01, amsgrad=True),
    "Adagrad": dict(lr=0.01, initial_accumulator_value=0.25),
    "Rprop": dict(lr=0.03),
    "Adadelta": dict(lr=1.0),
    "ASGD": dict(lr=0.01),
    "RMSprop": dict(lr=0.01, momentum=0.5, centered=True),
}


def fresh_state(name: str, options: dict[str, float]) -> dict[str, float]:
    """What the state of a weight looks like that was zero and had no gradient for one step."""
    probe = nn.Parameter(torch.zeros(2, 2))
    probe.grad = torch.zeros(2, 2)
    optimizer = getattr(torch.optim, name)([probe], **options)
    optimizer.step()
    return {k: float(v[0, 0]) for k, v in optimizer.state[probe].items() if isinstance(v, Tensor) and v.shape == (2, 2)}


@pytest.mark.parametrize("name", CASES)
def test_outside_the_mask_state_is_that_of_a_weight_that_never_moved(name: str) -> None:
    model = mlp()
    optimizer = getattr(torch.optim, name)(model.parameters(), **CASES[name])
    for step in range(3):  # dense training first: the state is full when the masks come
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer, every=2)
    expected = fresh_state(name, CASES[name])
    for step in range(6):
        before = sparse.masks()
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        for layer in sparse.layers.values():
            weight, mask = layer.target.parameter, layer.mask()
            state = {
                k: v for k, v in optimizer.state[weight].items() if isinstance(v, Tensor) and v.shape == weight.shape
            }
            assert state.keys() == expected.keys()
            for key, value in state.items():
                fresh = ~mask | (mask & ~before[layer.name])  # dropped, never kept, or grown just now
                assert torch.allclose(value[fresh], torch.tensor(expected[key])), (key, layer.name)


def test_a_weight_dropped_and_grown_at_once_keeps_value_and_state() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparse = rarefy.sparsify(
        model, "rigl", sparsity=0.5, optimizer=optimizer, every=1, stop=100, drop_fraction=0.99, seed=1
    )
    layer = sparse.layers["0.weight"]
    mask = layer.mask()
    (model(torch.ones(1, 4)) * 0).sum().backward()  # no gradient anywhere: ties, so the lowest indices grow
    weight = model[0].weight.detach().clone()
    optimizer.step()
    both = mask & layer.mask()
    assert both.any()
    assert torch.equal(model[0].weight[both], weight[both])


def test_grown_weights_start_at_zero_and_leave_the_output_alone() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer, every=1, stop=100, drop_fraction=0.3)
    layer = sparse.layers["3.weight"]
    before = layer.mask()
    backward(model, 0)
    optimizer.step()
    grown = layer.mask() & ~before
    assert grown.any()
    assert not layer.weight()[grown].any()
