"""Sensitivity curves: each point against pruning by hand, and a model that is bit for bit what it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.analysis import sensitivity
from rarefy.coupling import Group, couple
from rarefy.coupling import Member as Place
from rarefy.errors import OptionError, PatternError, SelectionError
from rarefy.patterns import Unstructured
from tests.engine.common import batch, mlp


def loss_of(model: nn.Module) -> float:
    x, y = batch(5, 64)
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(tensor.reshape(-1).view(torch.uint8), before[name].reshape(-1).view(torch.uint8))
        for name, tensor in model.state_dict().items()
    )


def test_each_point_is_that_layer_pruned_and_no_other() -> None:
    model = mlp().eval()
    found = sensitivity(model, loss_of, sparsities=[0.9, 0.5], higher_is_better=False)
    assert found.baseline == loss_of(model)
    assert list(found.curves) == ["0.weight", "3.weight", "5.weight"]
    for name, curve in found.curves.items():
        for point, asked in zip(curve.points, (0.5, 0.9), strict=True):
            pruned = copy.deepcopy(model)
            weight = pruned.get_parameter(name)
            keep = Unstructured().keep(weight.shape, 1 - asked)
            with torch.no_grad():
                weight.mul_(Unstructured().project(weight.abs(), keep))
            assert point.value == loss_of(pruned)
            assert point.zeroed == weight.numel() - int(keep)
            assert point.sparsity == 1 - int(keep) / weight.numel()
    mean = {name: sum(p.value - found.baseline for p in curve.points) for name, curve in found.curves.items()}
    assert found.order() == sorted(mean, key=lambda name: -mean[name])
    assert found.order()[0] in str(found).splitlines()[2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_evaluation_that_breaks_things_leaves_no_trace(error: type[BaseException]) -> None:
    model = mlp().train()
    model[3].weight.data[0, 0] = -0.0
    model[0].bias.requires_grad_(False)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    before, grads = snapshot(model), [p.grad for p in model.parameters()]
    random = torch.get_rng_state()
    calls = 0

    def wild(net: nn.Module) -> float:
        nonlocal calls
        calls += 1
        assert not net.training
        net.train()  # batch norm counts, weights are trained, random numbers are drawn, and then it fails
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
        F.cross_entropy(net(torch.randn(8, 12)), torch.randint(5, (8,))).backward()
        optimizer.step()
        net[1].running_mean = torch.full((16,), math.nan)
        for p in net.parameters():
            p.requires_grad_(False)
        if calls == 4:
            raise error("in the middle")
        return 0.0

    with pytest.raises(error, match="in the middle"):
        sensitivity(model, wild, sparsities=[0.5])
    assert calls == 4 and unchanged(model, before)
    assert model.training and all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [n != "0.bias" for n, _ in model.named_parameters()]
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(random, torch.get_rng_state())


def test_every_evaluation_starts_alike() -> None:
    model = mlp()
    values = sensitivity(model, lambda net: float(torch.rand(())), sparsities=[0.0, 0.5])
    assert {point.value for curve in values.curves.values() for point in curve.points} == {values.baseline}


def test_a_layer_that_was_sparse_before_says_that_nothing_was_pruned() -> None:
    model = mlp()
    sparse = rarefy.sparsify(model, "static", sparsity=0.9, allocation="uniform", init="dense")
    found = sensitivity(model, loss_of, sparsities=[0.5], higher_is_better=False)
    assert found.untouched() == list(sparse.layers)
    assert all(point.zeroed == 0 and point.value == found.baseline for c in found.curves.values() for point in c.points)
    assert "nothing was pruned in" in str(found)
    assert sparse.sparsity == pytest.approx(0.9, abs=0.01)


class Stage(nn.Module):
    """Two convolutions whose outputs are added, a norm, and what reads the sum through a flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.norm(x + self.conv(x)))
        return self.head(x.flatten(1))


def test_a_coupled_group_loses_the_same_channels() -> None:
    torch.manual_seed(1)
    net = Stage().eval()
    x = torch.randn(5, 2, 2, 2)
    seen: list[dict[str, Tensor]] = []

    def watch(model: nn.Module) -> float:
        seen.append(snapshot(model))
        return float(model(x).detach().sum())

    group = ["stem", "conv", ("conv", 1), ("head.weight", 1)]
    found = sensitivity(net, watch, sparsities=[0.5], groups={"stage": group}, pattern="row")
    pruned = seen[1]
    gone = [c for c in range(6) if not pruned["stem.weight"][c].any()]
    assert len(gone) == 3
    for c in range(6):
        parts = pruned["conv.weight"][c], pruned["conv.weight"][:, c], pruned["head.weight"].view(3, 6, 4)[:, c]
        assert all(bool(part.any()) != (c in gone) for part in parts)
    total = sum(
        part.double().abs().sum(1)
        for part in (
            net.stem.weight.detach().flatten(1),
            net.conv.weight.detach().flatten(1),
            net.conv.weight.detach().transpose(0, 1).flatten(1),
            net.head.weight.detach().view(3, 6, 4).transpose(0, 1).flatten(1),
        )
    )
    assert gone == sorted(total.argsort()[:3].tolist())  # type: ignore[union-attr]
    # the value is that of the network with these channels cut out
    small = copy.deepcopy(net)
    with torch.no_grad():
        left = [c for c in range(6) if c not in gone]
        y = F.conv2d(x, net.stem.weight[left], net.stem.bias[left])
        y = y + F.conv2d(y, net.conv.weight[left][:, left], net.conv.bias[left], padding=1)
        norm = small.norm
        y = F.relu(F.batch_norm(y, norm.running_mean[left], norm.running_var[left], norm.weight[left], norm.bias[left]))
        cut = F.linear(y.flatten(1), net.head.weight.view(3, 6, 4)[:, left].flatten(1), net.head.bias)
    assert found.curves["stage"].points[0].value == pytest.approx(float(cut.sum()), rel=1e-5)
    assert found.curves["stage"].layers == ("stem.weight", "conv.weight", "head.weight")


def test_a_group_of_a_graph_is_zero_in_every_member() -> None:
    """Members as a graph of coupled channels gives them: biases and norms, blocks, one range of rows, any order."""
    torch.manual_seed(2)
    net = Stage().eval()
    one = torch.arange(6)[:, None]
    order = torch.tensor([5, 4, 3, 2, 1, 0])[:, None]
    group = Group(6, (
        Place("stem.weight", 0, one), Place("stem.bias", 0, one), Place("norm.running_mean", 0, one),
        Place("norm.bias", 0, one),
        Place("conv.weight", 1, order, (0, 3)), Place("head.weight", 1, torch.arange(24).view(6, 4)),
    ))  # fmt: skip
    seen: list[dict[str, Tensor]] = []
    found = sensitivity(
        net, lambda m: float(len(seen) + bool(seen.append(snapshot(m)))), sparsities=[0.5], groups=[group, group],
        pattern="row",
    )  # fmt: skip
    assert list(found.curves) == ["stem.weight", "stem.weight (2)"]
    w = {name: p.detach().double().abs() for name, p in net.named_parameters()}
    total = w["stem.weight"].flatten(1).sum(1) + w["conv.weight"][:3].sum((0, 2, 3)).flip(0)
    total = total + w["head.weight"].view(3, 6, 4).sum((0, 2))
    gone = sorted(total.argsort()[:3].tolist())
    for name, before in net.state_dict().items():
        after, expected = seen[1][name], before.clone()
        for c in gone:
            if name in ("stem.weight", "stem.bias", "norm.bias"):
                expected[c] = 0
            elif name == "conv.weight":
                expected[:3, 5 - c] = 0
            elif name == "head.weight":
                expected[:, 4 * c : 4 * c + 4] = 0
        assert torch.equal(after, expected), name
    assert found.curves["stem.weight"].layers == ("stem.weight", "conv.weight", "head.weight")
    with pytest.raises(PatternError, match="die whole"):
        sensitivity(net, lambda m: 0.0, groups=[group])
    with pytest.raises(SelectionError, match=r"no parameter 'stm\.weight'"):
        sensitivity(net, lambda m: 0.0, groups=[Group(6, (Place("stm.weight", 0, one),))], pattern="row")
    with pytest.raises(SelectionError, match="no weight that can be sparse"):
        sensitivity(net, lambda m: 0.0, groups={"b": Group(6, (Place("stem.bias", 0, one),))}, pattern="row")


def test_the_groups_of_a_model_are_taken_as_they_are_found() -> None:
    """A unit dropped by its group is gone: the network computes the same without what the places hold."""
    torch.manual_seed(3)
    net, x = Stage().eval(), torch.randn(5, 2, 2, 2)
    found = couple(net, x)
    curves = sensitivity(
        net, lambda m: float(m(x).detach().sum()), sparsities=[0.5], groups=found, pattern="row"
    ).curves
    by_hand = sensitivity(
        net, lambda m: float(m(x).detach().sum()), sparsities=[0.5], pattern="row",
        groups={"all": ["stem", "conv", ("conv", 1), ("head.weight", 1)]},
    )  # fmt: skip
    assert len(curves) == 1
    (curve,) = curves.values()
    assert curve.points[0].value == pytest.approx(by_hand.curves["all"].points[0].value, rel=1e-5)
    assert curve.points[0].zeroed == by_hand.curves["all"].points[0].zeroed


def test_groups_as_plain_lists_are_pruned_together() -> None:
    model = mlp().eval()
    found = sensitivity(model, loss_of, sparsities=[0.6], groups=[["0", "3.weight"], ["5"]])
    assert list(found.curves) == ["0 + 3.weight", "5"]
    both = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("0.weight", "3.weight"):
            weight = both.get_parameter(name)
            weight.mul_(Unstructured().project(weight.abs(), Unstructured().keep(weight.shape, 0.4)))
    assert found.curves["0 + 3.weight"].points[0].value == loss_of(both)


def test_scores_and_patterns() -> None:
    model = nn.Linear(8, 4, bias=False)
    scores = {"weight": torch.arange(32.0).view(4, 8)}
    found = sensitivity(model, lambda m: float(m.weight.count_nonzero()), scores=scores, pattern="2:4")
    (point,) = found.curves["weight"].points
    assert (point.asked, point.sparsity, point.value, point.zeroed) == (0.5, 0.5, 16.0, 16)
    row = sensitivity(
        model, lambda m: float(m.weight.detach()[:2].abs().sum()), scores=scores, pattern="row", sparsities=[0.5]
    )
    assert row.curves["weight"].points[0].value == 0.0


def test_a_loss_that_is_nan_is_the_worst() -> None:
    model = mlp()
    found = sensitivity(
        model,
        lambda m: (
            math.nan if float((m[3].weight == 0).float().mean()) > 0.4 else float(m[0].weight.detach().abs().sum())
        ),
        sparsities=[0.5],
    )
    assert found.order()[:2] == ["3.weight", "0.weight"]


def test_what_is_asked_wrongly_is_refused_before_anything_runs() -> None:
    model, before = mlp(), snapshot(mlp())

    def never(_: nn.Module) -> float:
        raise AssertionError("evaluated")

    for error, match, options in (
        (OptionError, r"\[0, 1\)", dict(sparsities=[1.0])),
        (OptionError, "empty", dict(sparsities=[])),
        (SelectionError, "did you mean '3.weight'", dict(groups=[["3.weigth"]])),
        (SelectionError, "list of layer names", dict(groups={"a": "0"})),
        (SelectionError, "twice", dict(groups=[["0", "0.weight"]])),
        (SelectionError, "empty", dict(groups=[])),
        (OptionError, "not both", dict(groups=[["0"]], exclude="3")),
        (PatternError, "one number of units", dict(groups=[["0", "3"]], pattern="row")),
        (PatternError, "no dimension 2", dict(groups=[[("0", 2)]], pattern="row")),
        (PatternError, "for the patterns", dict(groups=[[("0", 1)]])),
        (PatternError, "multiple of 4", dict(pattern="4x4")),
        (SelectionError, "scores holds nothing", dict(scores={"0.weight": torch.ones(16, 12)})),
        (OptionError, "shape", dict(scores={"0.weight": torch.ones(2, 2)})),
    ):
        with pytest.raises(error, match=match):
            sensitivity(model, never, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="one number, not str"):
        sensitivity(model, lambda m: "high")  # type: ignore[arg-type, return-value]
    assert unchanged(model, before)
