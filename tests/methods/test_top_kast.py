"""Top-KAST: what is used, what is trained, what waits; against a plain autograd implementation with one dense theta."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.engine.reserve import reserving
from rarefy.errors import OptionError, SelectionError
from tests.engine.common import batch
from tests.engine.compressed import Make, adamw, sgd, step

STORAGES = ("masked", "compressed")


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))


def start(storage: str, make: Make, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, rarefy.Sparsifier]:
    model = net()
    optimizer = make(model)
    options = {"init": "dense", "strength": 0.0, "every": 3, "explore": 4, "sparsity": 0.8} | options
    return (
        model,
        optimizer,
        rarefy.sparsify(model, "top-kast", optimizer=optimizer, storage=storage, total_steps=30, **options),
    )


def trained(layer: Any) -> Tensor:
    """B as a bool mask."""
    flat = torch.zeros(layer.numel, dtype=torch.bool)
    if hasattr(layer, "_trained"):
        return layer._trained.clone()
    flat[layer._held()] = True
    return flat.view(layer.shape)


class Reference:
    """The paper in plain PyTorch: dense theta, masks by topk, gradients and optimizer restricted to B by hand."""

    def __init__(self, make: Make, kept: dict[str, int]) -> None:
        self.model = net()
        self.optimizer = make(self.model)
        self.kept = kept
        self.weights = {name: p for name, p in self.model.named_parameters() if name in kept}
        self.used: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}
        self.select()

    def select(self) -> None:
        for name, weight in self.weights.items():
            order = weight.detach().abs().flatten().argsort(descending=True, stable=True)
            for masks, count in ((self.used, self.kept[name]), (self.trained, 2 * self.kept[name])):
                flat = torch.zeros(weight.numel(), dtype=torch.bool)
                flat[order[:count]] = True
                masks[name] = flat.view_as(weight)
            self.forget(name, weight)

    def forget(self, name: str, weight: Tensor) -> None:
        for value in self.optimizer.state[weight].values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value[~self.trained[name]] = 0

    def step(self, data: tuple[Tensor, Tensor]) -> float:
        self.optimizer.zero_grad()
        theta = {name: w.detach().clone() for name, w in self.weights.items()}
        with torch.no_grad():
            for name, w in self.weights.items():
                w.mul_(self.used[name])
        loss = F.cross_entropy(self.model(data[0]), data[1])
        loss.backward()
        with torch.no_grad():
            for name, w in self.weights.items():
                w.copy_(theta[name])
                w.grad.mul_(self.trained[name])
        self.optimizer.step()
        with torch.no_grad():
            for name, w in self.weights.items():  # an optimizer's weight decay reaches everything
                w.copy_(torch.where(self.trained[name], w, theta[name]))
                self.forget(name, w)
        return float(loss.detach())


@pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_run_is_that_of_the_paper_in_plain_pytorch(storage: str, make: Make) -> None:
    """Weight decay too: the optimizer moves the resting weights as they are, not as zeros."""
    model, optimizer, sparse = start(storage, make)
    truth = Reference(make, {name: layer.nnz for name, layer in sparse.layers.items()})
    for i in range(24):
        assert step(model, optimizer, batch(i)) == pytest.approx(truth.step(batch(i)), abs=1e-9)
        if i + 1 <= 4 or (i + 1) % 3 == 0:
            truth.select()
        for name, layer in reserving(sparse.layers).items():
            assert torch.equal(layer.mask(), truth.used[name]) and torch.equal(trained(layer), truth.trained[name])
            torch.testing.assert_close(layer.theta(), truth.weights[name].detach(), rtol=0, atol=1e-9)
            torch.testing.assert_close(layer.weight(), layer.theta() * layer.mask(), rtol=0, atol=0)
    assert sparse.explored() > 1.1 * (1 - sparse.sparsity)


@pytest.mark.parametrize("storage", STORAGES)
def test_theta_outside_b_is_frozen_bit_for_bit_and_remembers_nothing(storage: str) -> None:
    model, optimizer, sparse = start(storage, adamw, strength=0.05)
    for i in range(20):
        layers = reserving(sparse.layers)
        before = {name: (layer.theta().clone(), trained(layer)) for name, layer in layers.items()}
        step(model, optimizer, batch(i))
        for name, layer in layers.items():
            theta, b = before[name]
            assert not bool((layer.mask() & ~trained(layer)).any()), "A is not in B"
            assert torch.equal(layer.theta()[~b], theta[~b])
            assert not torch.equal(layer.theta()[b], theta[b])
            weight, now = layer.target.parameter, trained(layer)
            assert int(now.sum()) == layer.nnz + layer.resting == 2 * layer.nnz
            for value in optimizer.state[weight].values():
                if isinstance(value, Tensor) and value.numel() > 1:
                    assert value.numel() == (int(now.sum()) if storage == "compressed" else layer.numel)
                    if storage == "masked":
                        assert not value[~now].any()
        dense = sparse.model.state_dict() if storage == "masked" else {}
        assert all(not value[~layers[name].mask()].any() for name, value in dense.items() if name in layers)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, max_iter=3)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("make", [momentum, lbfgs])
def test_a_closure_sees_what_is_used_only(storage: str, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Lightning and L-BFGS call the forward pass from within the optimizer's step."""
    results = []
    for inside in (False, True):
        if inside or make is momentum:
            model, optimizer, sparse = start(storage, lambda m: make(m.parameters()))
            for i in range(8):
                closure = partial(used_only, model, optimizer, sparse, batch(i))
                if inside:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
            results.append({name: layer.theta() for name, layer in reserving(sparse.layers).items()})
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def used_only(
    model: nn.Module, optimizer: torch.optim.Optimizer, sparse: rarefy.Sparsifier, data: tuple[Tensor, Tensor]
) -> Tensor:
    for layer in sparse.layers.values():
        parameter = layer.target.parameter.detach()
        assert int(parameter.count_nonzero()) <= layer.nnz, "the reserve is in the forward pass"
    optimizer.zero_grad()
    loss = F.cross_entropy(model(data[0]), data[1])
    loss.backward()
    return loss


@pytest.mark.parametrize("storage", STORAGES)
def test_a_loop_without_a_torch_optimizer_moves_what_rests(storage: str) -> None:
    runs = []
    for own in (True, False):
        model, optimizer, sparse = start(storage, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
        if own:
            model = net()
            sparse = rarefy.sparsify(
                model,
                "top-kast",
                storage=storage,
                total_steps=30,
                every=3,
                explore=4,
                sparsity=0.8,
                init="dense",
                strength=0.0,
            )
        for i in range(12):
            if own:
                for parameter in model.parameters():
                    parameter.grad = None
                F.cross_entropy(model(batch(i)[0]), batch(i)[1]).backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= 0.1 * parameter.grad
                sparse.step()
            else:
                step(model, optimizer, batch(i))
        runs.append({name: layer.theta() for name, layer in reserving(sparse.layers).items()})
    for name, theta in runs[0].items():
        torch.testing.assert_close(theta, runs[1][name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_penalty_is_the_gradient_of_both_norms(storage: str) -> None:
    _, optimizer, sparse = start(storage, lambda m: torch.optim.SGD(m.parameters(), lr=0.5), strength=0.01, every=9)
    before = {name: layer.theta().clone() for name, layer in reserving(sparse.layers).items()}
    sparse._optimizers.all[0].zero_grad()
    optimizer.step()  # no gradient: the penalty alone
    for name, layer in reserving(sparse.layers).items():
        theta = before[name].requires_grad_()
        order = theta.detach().abs().flatten().argsort(descending=True)
        used, rest = order[: layer.nnz], order[layer.nnz : 2 * layer.nnz]
        norms = theta.flatten()[used].norm() + theta.flatten()[rest].norm() / layer.density
        expected = theta - 0.5 * 0.01 * torch.autograd.grad(norms, theta)[0]
        torch.testing.assert_close(layer.theta(), expected.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("storage", STORAGES)
def test_at_the_end_there_is_a_plain_sparse_network(storage: str) -> None:
    model, optimizer, sparse = start(storage, adamw)
    for i in range(7):
        step(model, optimizer, batch(i))
    masks, output = sparse.masks(), model(batch(9)[0]).detach()
    plain = sparse.finalize(compressed=storage == "compressed")
    torch.testing.assert_close(plain(batch(9)[0]), output)
    for name, mask in masks.items():
        module = plain.get_submodule(name.rpartition(".")[0])
        found = module.mask() if storage == "compressed" else module.weight.detach() != 0
        assert torch.equal(found, mask)
    step(plain, optimizer, batch(3))  # the optimizer's state fits what is left


def test_training_costs_what_is_used_twice_and_what_is_trained_once() -> None:
    model, optimizer, sparse = start("masked", sgd, exploration=0.5, sparsity=0.9)
    for i in range(10):
        step(model, optimizer, batch(i))
    for name, cost in sparse.training_cost().items():
        layer = sparse.layers[name]
        assert cost == (10, 10 * layer.nnz, 0, 10 * layer.resting)
        assert layer.resting == min(layer.numel, int(1.5 * layer.nnz + 0.5)) - layer.nnz


def test_the_scale_of_signals_is_kept() -> None:
    _, _, sparse = start("masked", sgd, init="fan-in")
    for layer in sparse.layers.values():
        dense = dict(net().named_parameters())[layer.name]
        assert float(layer.weight().norm()) == pytest.approx(float(dense.detach().norm()))


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"exploration": 0.0}, {"strength": -1.0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            rarefy.methods.make("top-kast", **wrong)
    model = nn.Sequential(rarefy.nn.SparseLinear(12, 8, sparsity=0.5), nn.Linear(8, 5))
    with pytest.raises(SelectionError, match=r"0\.weight \[8, 12\].*Begin with dense layers"):
        rarefy.sparsify(model, "top-kast", storage="compressed")
