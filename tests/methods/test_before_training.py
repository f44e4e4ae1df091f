"""SNIP and GraSP: their derivatives, their masks by other means, and what all criteria before training share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy import models
from rarefy.engine.calibration import gradients, hessian_product, tempered
from rarefy.engine.synaptic_flow import SynapticFlow
from rarefy.errors import OptionError
from rarefy.scores import grasp, snip, synflow
from tests.engine.common import batch, mlp
from tests.methods.before_training import chain, doubles, looked_at, same, top

CRITERIA = ("snip", "grasp", "synflow")


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
