"""SNIP, GraSP and SynFlow: their conservation laws, their derivatives, and their masks by other means."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy import data, models
from rarefy.engine.calibration import gradients, hessian_product, tempered
from rarefy.engine.synaptic_flow import SynapticFlow
from rarefy.errors import OptionError
from rarefy.scores import grasp, snip, synflow
from tests.engine.common import batch, mlp

CRITERIA = ("snip", "grasp", "synflow")


def chain(widths: list[int], bias: bool = False, seed: int = 0) -> nn.Sequential:
    """An MLP with ReLU between its layers, in float64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(a, b, bias=bias)]
    return nn.Sequential(*layers).double()


def doubles(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    x, y = batch(seed, size)
    return x.double(), y


def looked_at(
    model: nn.Module, calibration: list[Any], method: str | rarefy.methods.Method = "dense", **options: Any
) -> rarefy.Sparsifier:
    """A sparsifier whose calibration data can still be asked."""
    sparse = rarefy.sparsify(model, method, calibration=calibration, **options)
    sparse.calibration = calibration
    return sparse


def top(scores: dict[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Masks of the `keep` largest of all scores, ties to the lower index, by a sort."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:keep]] = True
    parts = chosen.split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


# --- SynFlow ------------------------------------------------------------------------------------------------------


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


# --- GraSP --------------------------------------------------------------------------------------------------------


def gradient_at(model: nn.Module, data: list[tuple[Tensor, Tensor]], temperature: float) -> dict[str, Tensor]:
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for x, y in data:
        loss = F.cross_entropy(model(x) / temperature, y)
        for name, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += g
    return total


def smooth(seed: int = 0) -> nn.Sequential:
    """Twice differentiable everywhere, so that finite differences mean something; batch norm on its running statistics."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 20), nn.Softplus(), nn.Linear(20, 5)
    )
    return net.double().eval()


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_the_hessian_product_is_the_slope_of_the_gradient(temperature: float) -> None:
    model, data = smooth(), [doubles(0), doubles(1)]
    sparse = looked_at(model, data)
    with tempered(model, temperature):
        gradient = gradients(sparse)
        product = hessian_product(sparse, gradient)
    by_hand = gradient_at(model, data, temperature)
    for name, g in gradient.items():
        torch.testing.assert_close(g, by_hand[name])
    size = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    step = 1e-4 / size
    ends = []
    for sign in (1, -1):
        moved = smooth()
        for name, p in moved.named_parameters():
            if name in gradient:
                p.data.add_(gradient[name], alpha=sign * step)
        ends.append(gradient_at(moved, data, temperature))
    for name, h in product.items():
        slope = (ends[0][name] - ends[1][name]) / (2 * step)
        torch.testing.assert_close(h, slope, rtol=1e-3, atol=1e-6 * float(h.abs().max()))


def test_grasp_is_its_formula_and_keeps_what_the_paper_does_not_remove() -> None:
    model, data = smooth(), [doubles(0), doubles(1)]
    sparse = rarefy.sparsify(model, "grasp", sparsity=0.7, calibration=data)
    twin = smooth()
    weights = {name: p for name, p in twin.named_parameters() if p.ndim > 1}
    loss = sum(F.cross_entropy(twin(x) / 200, y) for x, y in data)
    assert isinstance(loss, Tensor)
    first = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    dot = sum((g * g.detach()).sum() for g in first)
    assert isinstance(dot, Tensor)
    removal = {
        n: -(w * h).detach()
        for (n, w), h in zip(weights.items(), torch.autograd.grad(dot, list(weights.values())), strict=True)
    }
    drop = sparse.numel - sparse.nnz
    assert sparse.nnz == math.floor(0.3 * sparse.numel + 0.5)
    assert same(sparse.masks(), {name: ~mask for name, mask in top(removal, drop).items()})
    assert not same(sparse.masks(), top({n: s.abs() for n, s in removal.items()}, sparse.nnz))


def test_first_order_change_of_the_gradients_norm() -> None:
    """Without weight q, g^T g changes by -2 w_q (H g)_q for a small w_q."""
    model, data = smooth(), [doubles(0)]
    with torch.no_grad():
        model[3].weight[2, 5] = 1e-5
    sparse = looked_at(model, data)
    g = gradients(sparse)
    before = sum(float(v.square().sum()) for v in g.values())
    score = grasp(model[3].weight, hessian_product(sparse, g)["3.weight"])[2, 5]
    with torch.no_grad():
        model[3].weight[2, 5] = 0
    after = sum(float(v.square().sum()) for v in gradient_at(model, data, 1).values())
    assert after - before == pytest.approx(-2 * float(score), rel=1e-3)


def test_halves_given_as_batches_are_the_whole() -> None:
    x, y = doubles(3, 32)
    model = chain([12, 16, 20, 5], bias=True)
    whole = rarefy.sparsify(model, "grasp", sparsity=0.7, calibration=[(x, y)]).masks()
    halves = [(x[:16], y[:16]), (x[16:], y[16:])]
    model = chain([12, 16, 20, 5], bias=True)
    assert same(whole, rarefy.sparsify(model, "grasp", sparsity=0.7, calibration=halves).masks())


def test_grasp_reads_a_generator_once_and_draws_the_same_dropout_in_both_passes() -> None:
    def data() -> Iterator[tuple[Tensor, Tensor]]:
        yield from (doubles(0), doubles(1))

    net = lambda: nn.Sequential(smooth(), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 5)).double()  # noqa: E731
    torch.manual_seed(1)
    model = net()
    state = torch.get_rng_state()
    sparse = looked_at(model, [doubles(0)])
    g = gradients(sparse)
    h = hessian_product(sparse, g)
    assert torch.equal(state, torch.get_rng_state())
    with torch.random.fork_rng():  # the same product by hand, with the same dropped units
        weights = [layer.target.parameter for layer in sparse.layers.values()]
        first = torch.autograd.grad(F.cross_entropy(model(doubles(0)[0]), doubles(0)[1]), weights, create_graph=True)
    for mine, theirs in zip(g.values(), first, strict=True):
        torch.testing.assert_close(mine, theirs.detach())
    second = torch.autograd.grad(sum((a * b).sum() for a, b in zip(first, g.values(), strict=True)), weights)
    for mine, theirs in zip(h.values(), second, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert rarefy.sparsify(net(), "grasp", sparsity=0.5, calibration=data()).sparsity == pytest.approx(0.5, abs=1e-2)


def test_networks_whose_fast_paths_have_no_second_derivative() -> None:
    vit = models.build("vit", image_size=8, in_channels=1, patch=4, dim=24, depth=1, heads=3)
    data = [(torch.randn(4, 1, 8, 8), torch.randint(10, (4,)))]
    assert rarefy.sparsify(vit, "grasp", sparsity=0.5, calibration=data).sparsity == pytest.approx(0.5, abs=1e-3)
    compiled = torch.compile(mlp())
    plain = rarefy.sparsify(mlp(), "grasp", sparsity=0.8, calibration=[batch(0)]).masks()
    assert same(plain, rarefy.sparsify(compiled, "grasp", sparsity=0.8, calibration=[batch(0)]).masks())


def test_the_temperature_divides_tensors_only_and_leaves_no_hook() -> None:
    class Said(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x)}

    def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(pair[0])["logits"], pair[1])

    model = Said()
    with pytest.raises(OptionError, match="which is a dict and not a tensor: set temperature=1"):
        rarefy.sparsify(model, "grasp", calibration=[batch(0)], loss=loss)
    assert not model._forward_hooks
    with pytest.raises(OptionError, match=r"temperature=0 must be a number above 0"):
        rarefy.methods.GraSP(temperature=0)
    assert rarefy.sparsify(mlp(), "grasp", sparsity=0.5, temperature=1, calibration=[batch(0)]).sparsity > 0.49


# --- SNIP ---------------------------------------------------------------------------------------------------------


def test_snip_of_a_relu_unit_signed_goes_in_as_it_comes_out() -> None:
    model = chain([12, 16, 20, 5], bias=True)
    x, y = doubles(0)
    F.cross_entropy(model(x), y).backward()
    for below, above in ((model[0], model[2]), (model[2], model[4])):
        into = (below.weight * below.weight.grad).sum(1) + below.bias * below.bias.grad
        torch.testing.assert_close(into, (above.weight * above.weight.grad).sum(0))


# --- all of them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CRITERIA)
@pytest.mark.parametrize("storage", ["masked", "compressed"])
def test_exact_counts_no_op_and_local_scope(method: str, storage: str) -> None:
    make: Callable[..., rarefy.Sparsifier] = lambda **o: rarefy.sparsify(  # noqa: E731
        mlp(), method, calibration=[batch(0)], storage=storage, **o
    )
    for sparsity in (0.5, 0.77, 0.93):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lost layers are not the question here
            sparse = make(sparsity=sparsity)
        assert sparse.nnz == math.floor((1 - sparsity) * sparse.numel + 0.5)
        assert len(sparse.events) == len(sparse.layers)  # one a layer, however many rounds
        assert all(e.dropped == sparse.layers[e.layer].numel - e.kept and not e.grown for e in sparse.events)
    assert make(sparsity=0).sparsity == 0
    assert all(bool(mask.all()) for mask in make(sparsity=0, rounds=1).masks().values())
    for layer in make(sparsity=0.75, allocation="uniform").layers.values():
        assert layer.sparsity == 0.75


@pytest.mark.parametrize("method", CRITERIA)
def test_rounds_score_the_pruned_network_and_bring_nothing_back(method: str) -> None:
    """Three rounds are three times one round, each on the network that the last one left."""
    data, levels = [doubles(0)], [1 - 0.25 ** (k / 3) for k in (1, 2, 3)]
    sparse = rarefy.sparsify(smooth(), method, sparsity=0.75, rounds=3, calibration=data)
    masks: dict[str, Tensor] = {}
    for level in levels:
        model = smooth()
        stage = looked_at(model, data)
        for name, layer in stage.layers.items():
            layer.keep(masks.get(name, layer.mask()))
        if method == "synflow":
            weights, flow = SynapticFlow(stage).gradients()
            scores = {name: synflow(weights[name], flow[name]) for name in weights}
        else:
            with tempered(model, 200 if method == "grasp" else 1):
                g = gradients(stage)
                h = hessian_product(stage, g) if method == "grasp" else g
            score = grasp if method == "grasp" else snip
            scores = {name: score(layer.weight(), h[name]) for name, layer in stage.layers.items()}
        scores = {n: s.masked_fill(~masks[n], -math.inf) if masks else s for n, s in scores.items()}
        new = top(scores, math.floor((1 - level) * stage.numel + 0.5))
        assert not any((new[n] & ~masks[n]).any() for n in masks)
        masks = new
    assert same(sparse.masks(), masks)


@pytest.mark.parametrize("method", CRITERIA)
@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_as_it_was_but_for_its_zeros(method: str, fails: bool) -> None:
    model = mlp()
    model[3].requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[4].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng, calls = torch.get_rng_state(), []

    def loss(net: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        if fails and len(calls) == 3:  # with weights pruned by two rounds
            raise ValueError("in the third round")
        return F.cross_entropy(net(pair[0].to(next(net.parameters()))), pair[1])

    if fails:
        with pytest.raises(ValueError, match="third round"):
            rarefy.sparsify(model, method, sparsity=0.5, rounds=4, calibration=[batch(0)], loss=loss)
        masks = {}
    else:
        masks = rarefy.sparsify(model, method, sparsity=0.5, rounds=4, calibration=[batch(0)], loss=loss).masks()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name] * masks[name] if name in masks else state[name]), name
    assert torch.equal(rng, torch.get_rng_state())
    assert [m.training for m in model] == [True, True, True, True, False, True]
    assert [p.requires_grad for p in model[3].parameters()] == [False, False]
    assert torch.equal(model[0].weight.grad, masks.get("0.weight", torch.ones(16, 12)).float())
    assert model[5].weight.grad is None
    assert not model._forward_hooks


@pytest.mark.parametrize("method", CRITERIA)
def test_recurrent_weights_are_scored_where_they_are_used(method: str) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x.view(len(x), 3, 4))[0][:, -1])

    torch.manual_seed(0)
    sparse = rarefy.sparsify(Last(), method, sparsity=0.5, rounds=3, calibration=[batch(0)])
    assert all(0 < sparse.layers[f"rnn.weight_{end}_l0"].density < 1 for end in ("ih", "hh"))


@pytest.mark.parametrize("method", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(method: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).to(dtype)
    x, y = batch(0)
    sparse = rarefy.sparsify(model, method, sparsity=0.8, rounds=2, calibration=[(x.to(dtype), y)])
    assert sparse.nnz == math.floor(0.2 * sparse.numel + 0.5)
    assert all(p.dtype == dtype for p in model.parameters())


def test_bad_options_are_refused() -> None:
    for options, said in (
        (dict(rounds=0), "rounds=0 must be a whole number of at least 1"),
        (dict(rounds=1.5), "whole number"),
        (dict(curve="cubical"), "did you mean 'cubic'"),
    ):
        with pytest.raises(OptionError, match=said):
            rarefy.methods.SNIP(**options)
    with pytest.raises(rarefy.RarefyError, match="of both signs"):
        rarefy.sparsify(mlp(), "grasp", allocation="lamp", calibration=[batch(0)])
