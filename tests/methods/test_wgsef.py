"""WGSEF in training: whole groups at zero, exactly k of them left, lambda that rises until the proximal steps leave no more."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from rarefy.errors import AllocationError, OptionError
from rarefy.methods.wgsef import groups_left
from rarefy.patterns import parse_pattern
from rarefy.penalties import GroupEnvelope
from tests.engine.common import assert_sparse, backward, mlp

MAKES: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003),
}


def run(
    make: str = "sgd", steps: int = 40, model: nn.Module | None = None, **options: Any
) -> tuple[rarefy.Sparsifier, torch.optim.Optimizer]:
    model = mlp() if model is None else model
    optimizer = MAKES[make](model.parameters())
    given = {"sparsity": 0.75, "exclude": "5", "total_steps": 40, "every": 5, "strength": 1.0} | options
    sparse = rarefy.sparsify(model, "wgsef", optimizer=optimizer, **given)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return sparse, optimizer


@pytest.mark.parametrize("make", MAKES)
def test_exactly_k_whole_groups_are_left_and_the_rest_trains_on(make: str) -> None:
    sparse, _ = run(make, growth=2.0)
    assert [int(layer.counts()) for layer in sparse.layers.values()] == [4, 5]  # a quarter of 16 and of 20
    assert_sparse(sparse)
    assert set(sparse.memory["groups"]) == set(sparse.layers)
    assert sparse.penalty() == 0  # the last quarter trains without it
    assert [event.step for event in sparse.events] == [30, 30]
    model = sparse.finalize()
    for name in ("0.weight", "3.weight"):
        weight = model.get_parameter(name)
        assert type(weight) is nn.Parameter
        rows = (weight != 0).any(1)
        bias = model.get_parameter(name.replace("weight", "bias"))
        assert not bias[~rows].any() and bias[rows].any()  # a unit that is gone is no constant
        assert int(rows.sum()) <= {"0.weight": 4, "3.weight": 5}[name]
        assert not weight[~rows].any()


def test_the_step_is_the_prox_with_the_step_size_and_not_with_lambda_alone() -> None:
    model, twin = mlp(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparse = rarefy.sparsify(model, "wgsef", optimizer=optimizer, sparsity=0.5, strength=0.7, stop=9)
    other = torch.optim.SGD(twin.parameters(), lr=0.05)
    for step in range(3):
        for net, opt in ((model, optimizer), (twin, other)):
            opt.zero_grad()
            backward(net, step)
            opt.step()
        for layer in sparse.layers.values():
            envelope = GroupEnvelope(layer.pattern, layer.shape[0] // 2 + layer.shape[0] % 2, 0.7)
            module = twin.get_submodule(layer.target.module_name)
            rows = torch.cat([module.weight, module.bias[:, None]], dim=1).detach()  # the bias is in its unit's group
            rows = envelope.prox(rows, 0.05)
            with torch.no_grad():
                module.weight.copy_(rows[:, :-1])
                module.bias.copy_(rows[:, -1])
            torch.testing.assert_close(layer.grouped(), rows, rtol=1e-5, atol=1e-7)
            assert torch.equal(layer.weight(), layer.grouped()[:, :-1]) and layer.bias is layer.module.bias
    total = sum(
        GroupEnvelope(layer.pattern, -(-layer.shape[0] // 2), 0.7).value(layer.grouped())
        for layer in sparse.layers.values()
    )
    assert sparse.penalty() == pytest.approx(total)


def test_lambda_rises_only_where_more_than_k_groups_are_left() -> None:
    sparse, _ = run(steps=29, strength=1e-3, growth=2.0, stop=30)
    assert all(int(groups_left(layer)) > 5 for layer in sparse.layers.values())
    assert set(sparse.memory["strength"].values()) == {1e-3 * 2**5}  # at 5, 10, ... 25
    strong, _ = run(steps=14, strength=40.0, growth=2.0, stop=30)
    assert set(strong.memory["strength"].values()) == {40.0}
    assert [int(groups_left(layer)) for layer in strong.layers.values()] == [4, 5]
    sparse.finalize()  # before the projection: the zeros of the proximal steps, nothing else
    assert all(int(layer.nnz) == layer.numel for layer in sparse.layers.values())


def test_counts_follow_k_and_a_small_lambda_leaves_more() -> None:
    counts = [
        int(groups_left(run(steps=15, strength=30.0, growth=1.0, sparsity=s, stop=30)[0].layers["3.weight"]))
        for s in (0.9, 0.75, 0.5)
    ]
    assert all(abs(count - k) <= 1 for count, k in zip(counts, (2, 5, 10), strict=True)), counts
    weak = run(steps=29, strength=1e-4, growth=1.0, sparsity=0.9, stop=30)[0]
    assert int(groups_left(weak.layers["3.weight"])) == 20


@pytest.mark.parametrize("pattern", ["column", "2x2", "unstructured", "fan-in", "1:4"])
def test_other_patterns_obey(pattern: str) -> None:
    given: dict[str, Any] = {} if ":" in pattern else {"sparsity": 0.5}
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 5))
    sparse, _ = run("momentum", model=model, pattern=pattern, exclude="4", sparsity=given.get("sparsity"))
    for layer in sparse.layers.values():
        assert parse_pattern(pattern).obeys(layer.mask())
        assert layer.sparsity == pytest.approx(0.75 if ":" in pattern else 0.5, abs=0.02)


def test_filters_of_a_convolution_vanish_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparse = rarefy.sparsify(
        model, "wgsef", sparsity=0.5, exclude="4", optimizer=optimizer, total_steps=12, strength=100.0, size_cost=True
    )
    for step in range(12):
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(x), torch.arange(8) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in sparse.layers.values():
        assert int((layer.weight() != 0).flatten(1).any(1).sum()) == 4


def test_a_resumed_run_is_the_run_that_was_not_stopped() -> None:
    for stop in (13, 33):
        whole, _ = run("momentum", growth=2.0, strength=0.1)
        half, optimizer = run("momentum", steps=stop, growth=2.0, strength=0.1)
        buffer = io.BytesIO()
        torch.save([half.model.state_dict(), optimizer.state_dict(), half.state_dict()], buffer)
        buffer.seek(0)
        weights, opt_state, state = torch.load(buffer, weights_only=True)
        model = mlp(seed=9)
        model.load_state_dict(weights)
        again = MAKES["momentum"](model.parameters())
        again.load_state_dict(opt_state)
        resumed = rarefy.sparsify(
            model,
            "wgsef",
            sparsity=0.75,
            exclude="5",
            total_steps=40,
            every=5,
            strength=0.1,
            growth=2.0,
            optimizer=again,
            state=state,
        )
        for step in range(stop, 40):
            backward(model, step)
            again.step()
            again.zero_grad()
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name
        assert whole.memory["groups"] == resumed.memory["groups"]


def test_two_runs_of_one_seed_are_the_same_bit_for_bit() -> None:
    for make in MAKES:
        first, second = run(make, strength=0.3)[0], run(make, strength=0.3)[0]
        for a, b in ((first.model.state_dict(), second.model.state_dict()), (first.masks(), second.masks())):
            assert all(torch.equal(a[name], tensor) for name, tensor in b.items())


def test_bad_options_leave_the_model_alone() -> None:
    for options in ({"strength": 0}, {"growth": 0.5}, {"sparsity": 1.0}, {"every": 0}, {"pattern": "rows"}):
        with pytest.raises(ValueError):
            rarefy.methods.make("wgsef", **options)
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AllocationError, match="less than one unit"):
        rarefy.sparsify(model, "wgsef", sparsity=0.99)
    with pytest.raises(OptionError, match="pass total_steps"):
        rarefy.sparsify(model, "wgsef", stop=0.5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_defaults_do_not_bring_a_deeper_network_to_zero() -> None:
    """lambda decays what stays, too; 0.1 at first, in two layers in a row, left networks that answered the same to all."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 24, generator=g)
    y = (x @ torch.randn(24, 4, generator=g)).argmax(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparse = rarefy.sparsify(model, "wgsef", sparsity=0.8, exclude="4", optimizer=optimizer, total_steps=400, every=20)
    for _ in range(400):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert [int(groups_left(layer)) for layer in sparse.layers.values()] == [12, 8]
    assert float((model(x).argmax(1) == y).double().mean()) > 0.8
