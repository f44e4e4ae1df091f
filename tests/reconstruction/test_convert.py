"""`rarefy.convert`: exact N:M, outputs brought back, everything else as it was, and nothing touched on failure."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy import models
from rarefy.errors import ModelError, OptionError, PatternError, RarefyError, SelectionError
from rarefy.patterns import parse_pattern
from rarefy.reconstruction import AdaPrune, LeastSquares
from rarefy.search.held import hold

PATTERNS = ["2:4", "1:4", "2:4@0", "2:4t", "1:2t", "4:8"]


class Net(nn.Module):
    """A stem, a block with a residual, a depthwise layer, a layer in groups and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 1, groups=2)
        self.twice = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu_(self.bn2(self.conv(x)))
        x = x + torch.relu_(self.grouped(self.depthwise(x)))
        x = x.mean((2, 3))
        x = torch.relu_(self.twice(torch.relu_(self.twice(x))))
        return self.fc(self.drop(x))


def build(seed: int = 0) -> tuple[Net, list[Tensor]]:
    torch.manual_seed(seed)
    net = Net()
    batches = [torch.randn(24, 3, 8, 8) for _ in range(3)]
    with torch.no_grad():
        net.train()
        for x in batches * 10:
            net(x)
    return net.eval(), batches


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("solver", [None, "least-squares", AdaPrune(steps=200)])
def test_weights_are_exactly_n_of_m_and_errors_fall(pattern: str, solver: Any) -> None:
    net, batches = build()
    before = state(net)
    report = rarefy.convert(net, pattern, batches, solver=solver)
    assert [layer.name for layer in report.layers] == ["conv.weight", "grouped.weight", "twice.weight"]
    parsed = parse_pattern(pattern)
    for layer in report.layers:
        weight = net.get_parameter(layer.name).detach()
        assert not weight[~layer.mask].any() and bool(weight[layer.mask].all())
        assert torch.equal(layer.mask, parsed.project(before[layer.name].abs(), parsed.keep(layer.shape)))
        assert int(layer.mask.sum()) == round((1 - (parsed.fixed_sparsity or 0)) * layer.mask.numel())
        magnitude = before[layer.name].abs()
        assert layer.kept == pytest.approx(float(magnitude[layer.mask].sum() / magnitude.sum()))
        if solver is None:
            assert layer.solved == layer.masked and torch.equal(weight, before[layer.name] * layer.mask)
        else:
            assert layer.solved < layer.masked < layer.power
    assert report.masks.keys() == {layer.name for layer in report.layers}
    left = {item.name: item.reason for item in report.dense}
    assert "first layer" in left["stem.weight"] and "last layer" in left["fc.weight"]
    assert "depthwise" in left["depthwise.weight"]
    for name in ("stem.weight", "fc.weight", "depthwise.weight", "fc.bias"):
        assert torch.equal(net.state_dict()[name], before[name])
    assert "kept |w|" in str(report) and "depthwise.weight [16, 1, 3, 3]" in str(report)


def test_reported_errors_are_those_of_the_layers() -> None:
    """Against hooks on the original network, for a layer with a stride and one that is used twice."""
    net, batches = build()
    old = copy.deepcopy(net)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {"conv": [], "twice": []}
    for name, calls in seen.items():

        def watch(module: nn.Module, args: Any, output: Tensor, calls: Any = calls) -> None:
            calls.append((args[0].clone(), output.clone()))

        old.get_submodule(name).register_forward_hook(watch)
    for x in batches:
        old(x)
    report = rarefy.convert(net, "2:4", batches)
    for layer in report.layers:
        calls = seen.get(layer.name.removesuffix(".weight"))
        if calls is None:
            continue
        module = net.get_submodule(layer.name.removesuffix(".weight"))
        with torch.no_grad():
            error = torch.cat([(module(x) - y).flatten() for x, y in calls]).square().mean()
        assert float(error) == pytest.approx(layer.solved, rel=1e-3)
        assert len(calls) == (6 if layer.name == "twice.weight" else 3)


def test_reconstruction_brings_the_network_back() -> None:
    net, batches = build()
    fresh = torch.randn(200, 3, 8, 8)
    wanted = net(fresh)
    errors = {}
    for solver in (None, AdaPrune(steps=300), "least-squares"):
        other = copy.deepcopy(net)
        rarefy.convert(other, "1:4", batches, solver=solver)
        errors[str(solver)] = float((other(fresh) - wanted).square().mean())
    masks, adaprune, exact = errors.values()
    assert exact < masks / 2 and adaprune < masks / 2


def test_a_network_that_is_sparse_so_already_stays_as_it_is() -> None:
    net, batches = build()
    rarefy.convert(net, "2:4", batches)
    wanted = state(net)
    again = rarefy.convert(net, "2:4", batches)
    assert all(layer.kept == 1.0 and layer.solved <= 1e-6 * layer.power for layer in again.layers)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)


def test_a_sparse_network_fills_its_pattern() -> None:
    """From 90 % zeros without structure to 2:4: the zeros that the pattern keeps are used."""
    net, batches = build()
    sparse = rarefy.sparsify(net, "magnitude", sparsity=0.9, allocation="uniform", exclude=["stem", "fc"])
    sparse.finalize()
    report = rarefy.convert(net, "2:4", batches)
    for layer in report.layers:
        assert layer.kept > 0.9
        assert net.get_parameter(layer.name).count_nonzero() == layer.mask.sum() == layer.mask.numel() // 2


@pytest.mark.parametrize("pattern", ["2:4", "2:4t", "2:4@0"])
def test_permutation_alone_changes_no_output_and_keeps_more(pattern: str) -> None:
    net, batches = build(1)
    old, plain = copy.deepcopy(net), copy.deepcopy(net)
    report = rarefy.convert(net, pattern, batches, permute=True, solver=LeastSquares(damping=1e9))
    assert report.rearrangement is not None and report.rearrangement.after >= report.rearrangement.before
    # the old network with its channels moved computes the same, and it is what has been converted
    moved = copy.deepcopy(old)
    moved.load_state_dict(report.rearrangement.apply(old.state_dict()))
    torch.testing.assert_close(moved(batches[0]), old(batches[0]), rtol=1e-4, atol=1e-5)
    for layer in report.layers:
        torch.testing.assert_close(
            net.get_parameter(layer.name), moved.get_parameter(layer.name) * layer.mask, rtol=1e-4, atol=1e-6
        )
    kept = sum(float(moved.get_parameter(layer.name).detach().abs()[layer.mask].sum()) for layer in report.layers)
    assert kept == pytest.approx(report.rearrangement.after, rel=1e-5)
    without = rarefy.convert(plain, pattern, batches)
    names = [layer.name for layer in without.layers]
    before = sum(float(old.get_parameter(n).detach().abs()[without.masks[n]].sum()) for n in names)
    assert kept >= before == pytest.approx(report.rearrangement.before, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_modes_gradients_random_state_and_identity(training: bool) -> None:
    net, batches = build()
    net.train(training)
    net.bn.eval()
    net(batches[0]).sum().backward()
    modes = [m.training for m in net.modules()]
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    ids = {n: id(p) for n, p in net.named_parameters()}
    net.conv.weight.requires_grad_(False)
    torch.manual_seed(3)
    random = torch.get_rng_state()
    rarefy.convert(net, "2:4", batches, permute=False)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [m.training for m in net.modules()]
    assert {n: id(p) for n, p in net.named_parameters()} == ids and not net.conv.weight.requires_grad
    assert all(torch.equal(p.grad, grads[n]) for n, p in net.named_parameters() if p.grad is not None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_same_every_time_and_in_any_mode() -> None:
    net, batches = build()
    other = copy.deepcopy(net).train()
    assert str(rarefy.convert(net, "2:4t", batches, permute=True)) == str(
        rarefy.convert(other, "2:4t", iter([(x, None) for x in batches]), permute=True)
    )
    assert same(state(net), state(other))


def test_statistics_follow_and_stay_where_nothing_changes() -> None:
    net, batches = build()
    before = state(net)
    rarefy.convert(net, "2:4", batches, include="twice")  # behind every batch norm
    for name in before:
        if "running" in name:
            torch.testing.assert_close(net.state_dict()[name], before[name], rtol=1e-5, atol=1e-6)
    rarefy.convert(net, "1:4", batches, include="conv", solver=None)
    torch.testing.assert_close(net.bn.running_var, before["bn.running_var"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(net.bn2.running_var, before["bn2.running_var"], rtol=1e-2)


def test_the_result_is_a_plain_model() -> None:
    net, batches = build()
    report = rarefy.convert(net, "2:4", batches)
    held = hold(net, report.masks)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    held.follow(optimizer)
    net.train()(batches[0]).square().sum().backward()
    optimizer.step()
    for name, mask in report.masks.items():
        assert not net.get_parameter(name)[~mask].any()
    held.finalize()
    net.eval()
    fast = rarefy.accelerate(net, batches[0][:1])
    torch.testing.assert_close(fast(batches[0][:1]), net(batches[0][:1]), rtol=1e-4, atol=1e-5)


def test_include_brings_the_ends_in_and_selectors_choose() -> None:
    net, batches = build()
    report = rarefy.convert(net, "2:4", batches, include=["fc", "twice"])
    assert [layer.name for layer in report.layers] == ["twice.weight", "fc.weight"]
    net, batches = build()
    report = rarefy.convert(net, "2:4", batches, exclude="twice")
    assert [layer.name for layer in report.layers] == ["conv.weight", "grouped.weight"]
    assert {i.name: i.reason for i in report.dense}["twice.weight"].startswith("excluded")


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.c.weight
        self.head = nn.Linear(8, 10)

    def forward(self, tokens: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.tied(self.c(self.b(input=torch.relu(self.a(self.embed(tokens)))))) * scale)


def test_mappings_tied_weights_and_other_kinds() -> None:
    torch.manual_seed(0)
    net = Keywords()
    batches = [{"tokens": torch.randint(10, (4, 6)), "scale": 2.0} for _ in range(3)]
    report = rarefy.convert(net, "2:4", batches, permute=True)
    assert [layer.name for layer in report.layers] == ["b.weight"]
    left = {item.name: item.reason for item in report.dense}
    assert "share" in left["c.weight"] and "Embedding" in left["embed.weight"]
    with pytest.raises(SelectionError, match="Embedding"):
        rarefy.convert(net, "2:4", batches, include="embed")


def test_half_precision_is_solved_in_full() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2)).bfloat16()
    report = rarefy.convert(net, "2:4", [torch.randn(64, 8, dtype=torch.bfloat16)])
    assert net[2].weight.dtype == torch.bfloat16 and net[2].weight.count_nonzero() <= 128
    assert report.layers[0].solved < report.layers[0].masked


class Unused(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(torch.relu(self.stem(x)))).mean((2, 3)))


def _poisoned(net: nn.Module) -> None:
    with torch.no_grad():
        net.get_parameter("conv.weight")[0, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"pattern": "3:5"}, PatternError, r"conv.weight \[16, 8, 3, 3\].*multiple of 5"),
        ({"pattern": "4:4"}, PatternError, "keeps every weight"),
        ({"pattern": "4:4t"}, PatternError, "keeps every weight"),
        ({"pattern": "6:4"}, PatternError, "N <= M"),
        ({"pattern": "fan-in"}, PatternError, "not N:M"),
        ({"batches": []}, OptionError, "at least one batch"),
        ({"batches": None}, OptionError, "at least one batch"),
        ({"batches": [torch.randn(0, 3, 8, 8)]}, RarefyError, "no sample|does not run"),
        ({"batches": [torch.full((4, 3, 8, 8), torch.nan)]}, OptionError, "not finite"),
        ({"batches": [torch.randn(4, 2, 8, 8)]}, ModelError, "does not run on calibration batch 0"),
        ({"batches": [torch.randn(4, 3, 8, 8), "text"]}, ModelError, "does not run on calibration batch 1"),
        ({"solver": "adam"}, OptionError, "solver='adam' is not known"),
        ({"include": "nothing"}, SelectionError, "matches no layer"),
        ({"include": "depthwise"}, SelectionError, "depthwise"),
        ({"exclude": ["conv", "grouped", "twice"]}, SelectionError, "No layer is left to convert"),
        ({"poison": True}, OptionError, r"conv.weight \[16, 8, 3, 3\].*NaN"),
        ({"net": Unused}, SelectionError, "grouped.weight, twice.weight: never called"),
    ],
)
def test_errors_leave_the_model_untouched(options: dict[str, Any], error: type[Exception], text: str) -> None:
    net, batches = build()
    if kind := options.get("net"):
        other = kind()
        other.load_state_dict(net.state_dict())
        net = other
    if options.get("poison"):
        _poisoned(net)
    net.train()
    before, random = state(net), torch.get_rng_state()
    given = {k: v for k, v in options.items() if k not in ("pattern", "batches", "poison", "net")}
    with pytest.raises(error, match=text):
        rarefy.convert(net, options.get("pattern", "2:4"), options.get("batches", batches), **given)
    assert all(
        torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before.values(), state(net).values(), strict=True)
    )
    assert all(m.training for m in net.modules()) and torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_empty_weights_and_managed_models() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0), nn.Linear(0, 4), nn.Linear(4, 4))
    with pytest.raises(PatternError, match=r"1.weight \[0, 4\]: the weight is empty"):
        rarefy.convert(net, "2:4", [torch.randn(3, 4)])
    net, batches = build()
    rarefy.sparsify(net, "magnitude", sparsity=0.5)
    before = state(net)
    with pytest.raises(SelectionError, match=r"finalize\(\)"):
        rarefy.convert(net, "2:4", batches)
    assert same(before, state(net))


def test_a_reference_network() -> None:
    torch.manual_seed(0)
    net = models.build("mobilenet-v2", num_classes=7, width=0.5).train()
    batches = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    with torch.no_grad():
        net(batches[0])
    report = rarefy.convert(net, "2:4", batches, solver="least-squares")
    assert all(layer.solved < layer.masked for layer in report.layers)
    assert sum("depthwise" in item.reason for item in report.dense) == 17
