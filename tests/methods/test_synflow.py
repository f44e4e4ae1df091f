"""SynFlow: its paper's loop, its conservation laws, and what it cannot follow."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy import data
from rarefy.engine.synaptic_flow import SynapticFlow
from rarefy.errors import OptionError
from rarefy.scores import synflow
from tests.engine.common import batch, mlp
from tests.methods.before_training import chain, looked_at, same, top


def flows(model: nn.Module, x: Tensor, masks: str = "dense", **options: Any) -> dict[str, Tensor]:
    weights, gradient = SynapticFlow(looked_at(model, [x], masks, **options)).gradients()
    return {name: synflow(weights[name], gradient[name]) for name in weights}


@pytest.mark.parametrize("masks", [{}, {"masks": "static", "sparsity": 0.6, "allocation": "uniform"}])
@pytest.mark.parametrize("bias", [False, True])
def test_synaptic_flow_is_conserved_by_layers_and_by_units(masks: dict[str, Any], bias: bool) -> None:
    model = chain([12, 30, 8, 8, 20, 5], bias)
    scores = list(flows(model, torch.randn(3, 12), **masks).values())
    absolute = torch.ones(1, 12, dtype=torch.float64)
    for layer in model[::2]:
        absolute = absolute @ layer.weight.detach().abs().t()
    for s in scores:
        assert float(s.sum()) == pytest.approx(float(absolute.sum()), rel=1e-11)
        assert (s >= 0).all()
    for below, above in itertools.pairwise(scores):
        torch.testing.assert_close(below.sum(1), above.sum(0), rtol=1e-10, atol=0)


def test_a_weights_synaptic_flow_is_the_sum_over_its_paths() -> None:
    model = chain([2, 3, 2])
    first, second = (layer.weight.detach().abs() for layer in model[::2])
    scores = flows(model, torch.randn(1, 2))
    for j in range(3):
        for i in range(2):
            paths = [float(first[j, i] * second[k, j]) for k in range(2)]
            assert float(scores["0.weight"][j, i]) == pytest.approx(math.fsum(paths))


def test_synflow_needs_no_data_and_gives_every_sign_back() -> None:
    def pruned(seed: int, labels: bool) -> tuple[dict[str, Tensor], nn.Module, dict[str, Tensor]]:
        model = mlp()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        x, y = batch(seed)
        sparse = rarefy.sparsify(model, "synflow", sparsity=0.8, calibration=[(x * 50, y) if labels else x])
        return sparse.masks(), model, before

    masks, model, before = pruned(0, True)
    assert same(masks, pruned(1, False)[0])
    for name, value in model.state_dict().items():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(value, expected), name  # batch-norm statistics and their count, too
    assert all(
        torch.equal(value.signbit(), before[name].signbit())
        for name, value in model.state_dict().items()
        if name not in masks
    )


def test_synflow_is_the_loop_of_its_paper() -> None:
    model = chain([12, 20, 6, 6, 5], bias=True)
    twin = chain([12, 20, 6, 6, 5], bias=True)
    rounds, density = 20, 0.15
    sparse = rarefy.sparsify(model, "synflow", sparsity=1 - density, rounds=rounds, calibration=[torch.randn(1, 12)])
    for parameter in twin.parameters():
        parameter.data.abs_()
    weights = {name: p for name, p in twin.named_parameters() if p.ndim == 2}
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in weights.items()}
    total = sum(p.numel() for p in weights.values())
    for k in range(1, rounds + 1):
        flow = twin(torch.ones(1, 12, dtype=torch.float64)).sum() - twin(torch.zeros(1, 12, dtype=torch.float64)).sum()
        found = torch.autograd.grad(flow, list(weights.values()))
        scores = {n: (w * g).detach() for (n, w), g in zip(weights.items(), found, strict=True)}
        scores = {n: s.masked_fill(~masks[n], -math.inf) for n, s in scores.items()}
        masks = top(scores, math.floor(density ** (k / rounds) * total + 0.5))
        for name, weight in weights.items():
            weight.data.mul_(masks[name])
    assert same(sparse.masks(), masks)
    assert sparse.nnz == math.floor(density * total + 0.5)


def test_synflow_loses_no_layer_where_one_round_or_a_flow_from_the_biases_does() -> None:
    """An MLP 64-50x8-10 in PyTorch's initialisation, whose biases are not zero: kept weights of the thinnest layer."""

    def thinnest(density: float, **options: Any) -> int:
        model = chain([64, *[50] * 8, 10], bias=True).float()
        ones = torch.ones(1, 64, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a layer is lost is what the others are here for
            sparse = rarefy.sparsify(model, "synflow", sparsity=1 - density, calibration=[ones], **options)
        assert sparse.nnz == math.floor(density * sparse.numel + 0.5)
        return min(layer.nnz for layer in sparse.layers.values())

    assert [thinnest(d) > n for d, n in ((0.03, 30), (0.01, 10), (0.005, 4))] == [True] * 3
    assert thinnest(0.005, rounds=1) == 0
    assert thinnest(0.01, loss=lambda model, x: model(x).sum()) == 0  # f(1) without f(0), as the paper's code


def test_the_order_of_collapse_on_digits() -> None:
    """At 1 % of a deep MLP: kept weights of the thinnest layer, and kept weights that lie on a path, as a share of all."""
    digits = data.load("digits")
    batches = data.train_batches(digits, 100, 0, augment=None)
    kept, reached = {}, {}
    for name, method in {
        "synflow": rarefy.methods.SynFlow(sparsity=0.99),
        "one round": rarefy.methods.SynFlow(sparsity=0.99, rounds=1),
        "snip": rarefy.methods.SNIP(sparsity=0.99),
        "magnitude": rarefy.methods.Magnitude(sparsity=0.99),
    }.items():
        net = nn.Sequential(nn.Flatten(), *chain([64, *[50] * 8, 10], bias=True).float())
        for layer in net[1::2]:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        batches.set_epoch(0)
        batch = next(iter(batches))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sparse = looked_at(net, [batch], method)
        weights, flow = SynapticFlow(sparse).gradients()
        reached[name] = sum(int((synflow(weights[n], flow[n]) > 0).sum()) for n in weights) / sparse.nnz
        kept[name] = min(layer.nnz for layer in sparse.layers.values())
    assert kept["synflow"] > kept["snip"] > 0 and kept["synflow"] > kept["magnitude"]
    assert kept["one round"] == 0 == reached["one round"]
    assert reached["synflow"] > 0.98 > 0.8 > reached["snip"]  # the last round may strand a few


def test_deep_networks_do_not_leave_the_range_of_numbers() -> None:
    deep = chain([64, *[300] * 40, 10]).float()
    with torch.no_grad():
        for layer in deep[::2]:
            layer.weight.mul_(4)
    scores = flows(deep, torch.ones(1, 64))
    totals = [float(s.sum()) for s in scores.values()]
    assert totals[0] > 3.5e38  # float32's largest number
    assert totals == pytest.approx([totals[0]] * len(totals), rel=1e-9)


def test_what_synflow_cannot_follow() -> None:
    tokens = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(18, 4))
    ids = torch.randint(20, (2, 3))
    with pytest.raises(OptionError, match=r"float x \[samples, ...\], not torch.int64 \[2, 3\]"):
        rarefy.sparsify(tokens, "synflow", calibration=[ids])
    sparse = rarefy.sparsify(tokens, "synflow", sparsity=0.5, calibration=[ids], loss=lambda model, x: model(x).sum())
    assert sparse.sparsity == 0.5
    with pytest.raises(OptionError, match="not NoneType"):
        rarefy.sparsify(mlp(), "synflow", calibration=[])
    with pytest.raises(OptionError, match="which is a tuple"):
        rarefy.sparsify(nn.LSTM(12, 3), "synflow", calibration=[torch.ones(4, 2, 12)])
    huge = chain([12, 30, 30, 5])
    huge[0].weight.data.fill_(1e200)
    huge[2].weight.data.fill_(1e200)
    with pytest.raises(OptionError, match="R = inf"):
        rarefy.sparsify(huge, "synflow", calibration=[torch.ones(1, 12)])
