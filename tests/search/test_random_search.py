"""Random search: exact counts, masks that are smaller networks, objectives against closed forms, honest arms."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy import models
from rarefy.errors import ModelError, OptionError
from rarefy.search import (
    Edges,
    GradientNorm,
    InitialLoss,
    LayerRatios,
    LossAfter,
    Nodes,
    RandomSearch,
    SynFlow,
    Workers,
    compare_arms,
    hold,
    shrink,
)
from rarefy.search.nodes import draw_nodes, hidden_layers, weight_masks
from tests.search.trainings import data, equal, parent, train_arm

BATCHES = [data(500 + i, size) for i, size in enumerate((20, 7))]


class Conv(nn.Module):
    """Convolutions, norms, pooling, a flatten, and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.outer = nn.Conv2d(8, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 5, 3)
        self.fc1 = nn.Linear(20, 9)
        self.fc2 = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.outer(F.relu(self.norm(self.inner(x))))
        x = F.max_pool2d(F.relu(self.last(x)), 2).flatten(1)
        return self.fc2(torch.tanh(self.fc1(x)))


def make(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    if kind == "mlp":
        return parent(1), torch.randn(10, 12)
    if kind == "lenet-5":
        return models.build("lenet-5", width=0.3), torch.randn(4, 1, 28, 28)
    return Conv(), torch.randn(6, 2, 6, 6)


def train(model: nn.Module, x: Tensor, sparse: Any = None) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    if sparse is not None:
        sparse.follow(optimizer)
    for _ in range(5):
        F.cross_entropy(model(x), torch.arange(len(x)) % 4).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["mlp", "lenet-5", "conv"])
@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_a_masked_network_is_the_smaller_one_before_and_after_training(kind: str, keep: float) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model, x = make(kind)
        with torch.no_grad():
            for module in model.modules():  # a removed node must not leak relu(bias)
                if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                    module.bias.add_(0.5)
        nodes = draw_nodes(model, keep, torch.Generator().manual_seed(0))
        for layer in hidden_layers(model):
            assert int(nodes[layer.name].sum()) == max(1, math.floor(keep * layer.nodes + 0.5))
        small = shrink(model, nodes)
        sparse = hold(model, weight_masks(model, nodes))
        for net in (model, small):
            net.eval()
        torch.testing.assert_close(model(x), small(x), rtol=1e-9, atol=1e-9)
        train(model, x, sparse)
        train(small, x)
        for net in (model, small):
            net.eval()
        torch.testing.assert_close(model(x), small(x), rtol=1e-7, atol=1e-8)
        kept = sum(int(m.sum()) for m in sparse.masks().values())
        names = [n for n, _ in small.named_parameters() if n in sparse.layers]
        assert kept == sum(small.get_parameter(n).numel() for n in names)
    finally:
        torch.set_default_dtype(torch.float32)


def test_hidden_layers_are_those_whose_nodes_go_alone() -> None:
    assert [(h.name, h.nodes, h.norms, h.readers) for h in hidden_layers(Conv())] == [
        ("inner", 8, ("norm",), (("outer", 1),)),
        ("last", 5, (), (("fc1", 4),)),
        ("fc1", 9, (), (("fc2", 1),)),
    ]
    found = hidden_layers(models.build("resnet-20"))
    assert len(found) == 9 and all(h.name.endswith("conv1") and h.name != "conv1" for h in found)
    for model in (nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))):
        with pytest.raises(ModelError, match="no hidden layer"):
            hidden_layers(model)


def test_every_node_is_drawn_equally_often() -> None:
    model, generator, n = parent(0), torch.Generator().manual_seed(1), 1500
    seen = torch.zeros(16)
    for _ in range(n):
        seen += draw_nodes(model, 0.25, generator)["0"]
    deviation = (seen / n - 0.25).abs().max() / math.sqrt(0.25 * 0.75 / n)
    assert deviation < 4.5


@pytest.mark.parametrize(
    ("sampler", "sparsity"),
    [(Nodes(0.25), None), (Edges(0.8), 0.8), (Edges(0.8, "uniform"), 0.8), (LayerRatios(0.8, 3.0), 0.8),
     (Edges(pattern="2:4"), 0.5)],
)  # fmt: skip
def test_samplers_keep_what_they_promise_and_leave_the_model_alone(sampler: Any, sparsity: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 8))
    before = copy.deepcopy(model.state_dict())
    search = RandomSearch(sampler, InitialLoss(BATCHES), budget=8)
    first, again = [list(search.draw(model, 5)) for _ in range(2)]
    assert len(first) == 4 and all(torch.equal(m[n], w[n]) for m, w in zip(first, again, strict=True) for n in m)
    assert not torch.equal(first[0]["2.weight"], first[1]["2.weight"])
    for masks in first:
        kept, numel = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
        if sparsity is not None:
            assert 1 - kept / numel == pytest.approx(sparsity, abs=0.01)
        else:  # whole rows and columns
            assert kept == 12 * 4 + 4 * 5 + 5 * 8
            assert sampler.count(model) == {"0": 4, "2": 5}
            middle = masks["2.weight"]
            assert torch.equal(middle, middle.any(1)[:, None] & middle.any(0)[None])
    if isinstance(sampler, LayerRatios):
        assert len({int(masks["0.weight"].sum()) for masks in first}) > 1
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())


def test_objectives_are_what_they_are_called() -> None:
    model = parent(2)
    before = copy.deepcopy(model.state_dict())
    model.eval()
    masks = Nodes(0.5).draw(model, torch.Generator().manual_seed(0))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            twin.get_parameter(name).mul_(mask)
    twin.train()
    losses = [F.cross_entropy(twin(x), y) for x, y in BATCHES]
    loss = (losses[0] * 20 + losses[1] * 7) / 27
    assert InitialLoss(BATCHES)(model, masks) == pytest.approx(float(loss.detach()), rel=1e-6)
    loss.backward()
    norm = math.sqrt(
        sum(float((p.grad * masks.get(n, 1.0)).double().square().sum()) for n, p in twin.named_parameters())  # type: ignore[operator]
    )
    assert GradientNorm(BATCHES)(model, masks) == pytest.approx(norm, rel=1e-5)
    with torch.no_grad():
        twin = copy.deepcopy(model)
        for name, mask in masks.items():
            twin.get_parameter(name).mul_(mask)
    sparse = hold(twin, masks)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.2)
    sparse.follow(optimizer)
    twin.train()
    for x, y in [*BATCHES, BATCHES[0]]:
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = sum(float(F.cross_entropy(twin(x), y)) * len(x) for x, y in BATCHES) / 27
    objective = LossAfter(BATCHES, steps=3, lr=0.2)
    assert objective(model, masks) == pytest.approx(after, rel=1e-5)
    assert (objective.passes, objective.optimizer_steps) == (5, 3)
    plain = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    w1, w2 = (plain[i].weight.detach().abs().double() for i in (0, 2))
    only = {"0.weight": torch.rand(4, 3) < 0.6, "2.weight": torch.rand(2, 4) < 0.6}
    expected = ((w2 * only["2.weight"]) @ (w1 * only["0.weight"])).sum()
    assert SynFlow((3,))(plain, only) == pytest.approx(float(expected), rel=1e-12)
    assert SynFlow((3,))(plain, {**only, "0.weight": torch.zeros(4, 3, dtype=torch.bool)}) == 0.0
    biased = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)
    )  # what biases feed in is no path from the inputs
    biased[0].weight.data, biased[2].weight.data = plain[0].weight.data, plain[2].weight.data
    assert SynFlow((3,))(biased, only) == pytest.approx(float(expected), rel=1e-9)
    assert SynFlow((3,))(biased, {**only, "0.weight": torch.zeros(4, 3, dtype=torch.bool)}) == 0.0
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items()) and not model[1].training
    with pytest.raises(OptionError, match="search set is empty"):
        _ = InitialLoss([]).passes


@pytest.mark.parametrize(
    "objective", [InitialLoss(BATCHES), GradientNorm(BATCHES), SynFlow((12,)), LossAfter(BATCHES, 2)]
)
def test_the_best_is_the_best_and_the_control_is_the_first(objective: Any) -> None:
    model = parent(4)
    search = RandomSearch(Nodes(0.3), objective, budget=7 * objective.passes + 1 if objective.passes > 1 else 7)
    found = search.run(model, seed=3)
    assert len(found.values) == 7 and found.passes == 7 * objective.passes
    assert found.optimizer_steps == 7 * (2 if isinstance(objective, LossAfter) else 0)
    best = (max if objective.maximise else min)(found.values)
    assert objective(model, found.best) == pytest.approx(best, rel=1e-6) and found.values[found.best_index] == best
    first = next(search.draw(model, 3))
    assert all(torch.equal(mask, first[name]) for name, mask in found.control.items())
    one = RandomSearch(Nodes(0.3), objective, budget=objective.passes).run(model, 3)
    assert all(torch.equal(mask, one.control[name]) for name, mask in one.best.items())
    with pytest.raises(OptionError, match="give more"):
        _ = RandomSearch(Nodes(0.3), InitialLoss(BATCHES), budget=1).candidates


def test_no_optimizer_steps_while_searching(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was trained")

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", never)
    assert RandomSearch(Edges(0.7), InitialLoss(BATCHES), budget=10).run(parent(0)).optimizer_steps == 0


def test_arms_are_paired_and_the_same_elsewhere(elsewhere: Workers) -> None:
    search = RandomSearch(Nodes(0.3), InitialLoss(BATCHES), budget=10)
    here = compare_arms(search, parent, train_arm, seeds=[0, 1, 2], workers=Workers("here"))
    assert equal(here.runs, compare_arms(search, parent, train_arm, seeds=[0, 1, 2], workers=elsewhere).runs)
    assert all(len(here.scores(arm)) == 3 for arm in ("found", "random", "dense"))
    test = here.difference()
    assert test is not None and test.n == 3 and here.helps == (test.low > 0)
    for run in here.runs:
        seen = run["objectives"]
        assert seen["best"] <= seen["random"] and seen["best"] <= seen["mean"] <= seen["worst"]
        assert run["optimizer_steps"] == 0 and run["passes"] == 10
        for arm in ("found", "random"):
            weights = run["arms"][arm]["weights"]
            zeros = sum(int((weights[n] == 0).sum()) for n in ("0.weight", "3.weight", "5.weight"))
            assert zeros / (12 * 16 + 16 * 20 + 20 * 5) == pytest.approx(run["sparsity"], abs=1e-9)
        goal = 0.95 * run["arms"]["dense"]["score"]
        for result in run["arms"].values():
            expected = next((i for i, s in enumerate(result["curve"], 1) if s >= goal), None)
            assert result["reached"] == expected


def test_one_candidate_makes_the_two_arms_identical() -> None:
    search = RandomSearch(Nodes(0.3), InitialLoss(BATCHES), budget=2)
    done = compare_arms(search, parent, train_arm, seeds=[0, 1], workers=Workers("here"))
    for run in done.runs:
        a, b = (run["arms"][arm]["weights"] for arm in ("found", "random"))
        assert all(torch.equal(a[n], b[n]) for n in a)
    test = done.difference()
    assert test is not None and test.difference == 0 and not done.helps
    with pytest.raises(OptionError, match="must be different"):
        compare_arms(search, parent, train_arm, seeds=[1, 1])
