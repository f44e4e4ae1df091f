"""Penalties beside the loss: the same run as with the penalty in the loss, whatever the loop; steps of the right size."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.engine import Layer, Method, Sparsifier
from rarefy.engine.step_size import RULES, step_size
from rarefy.errors import OptionError
from rarefy.methods import Static
from rarefy.penalties import L1
from tests.engine.common import assert_sparse, batch, mlp

ADAM = {"lr": 0.01}
MAKES: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, **ADAM),
    "fused": lambda p: torch.optim.AdamW(p, **ADAM, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


@dataclass(frozen=True, kw_only=True)
class Quartic(Static):
    """A random mask, and a smooth penalty on what is kept."""

    name: ClassVar[str] = "quartic"
    weight: float = 0.3

    def penalty(self, sparse: Sparsifier) -> Tensor:
        return self.weight * torch.stack([layer.live_weight().pow(4).sum() for layer in sparse.layers.values()]).sum()


@dataclass(frozen=True, kw_only=True)
class Lasso(Method):
    name: ClassVar[str] = "lasso"
    strength: float = 0.1

    def proximal(self, sparse: Sparsifier, layer: Layer) -> L1:
        return L1(self.strength)


@dataclass(frozen=True, kw_only=True)
class SparseLasso(Static):
    name: ClassVar[str] = "sparse-lasso"

    def proximal(self, sparse: Sparsifier, layer: Layer) -> L1:
        return L1(0.02)


def twins(make: Any, method: Method | None = None, **options: Any) -> tuple[Any, ...]:
    """Return a model under Quartic, and a static one whose loss will hold the same penalty."""
    found = []
    for chosen in (method or Quartic(sparsity=0.5), Static(sparsity=0.5)):
        model = mlp().double()
        optimizer = make(model.parameters())
        found += [model, optimizer, rarefy.sparsify(model, chosen, optimizer=optimizer, seed=1, **options)]
    return tuple(found)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x, y = batch(seed)
    return F.cross_entropy(model(x.double()), y)


def quartic(model: nn.Module, weight: float = 0.3) -> Tensor:
    return weight * torch.stack([p.pow(4).sum() for p in model.parameters() if p.ndim == 2]).sum()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b.state_dict()[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("passes", [1, 3])
def test_it_is_as_if_the_penalty_were_in_the_loss(make: str, passes: int) -> None:
    model, optimizer, sparse, twin, other, _ = twins(MAKES[make])
    for step in range(6):
        for _ in range(passes):  # accumulation: the penalty counts once
            (loss_of(model, step) / passes).backward()
        seen = {n: p.grad.clone() for n, p in model.named_parameters()}
        for i in range(passes):
            (loss_of(twin, step) / passes + (quartic(twin) if i == 0 else 0)).backward()
        assert any(not torch.equal(seen[n], p.grad) for n, p in twin.named_parameters())  # the loss's alone, until here
        optimizer.step(), other.step()
        assert sparse.penalty() == pytest.approx(float(quartic(model).detach()), rel=1e-5)
        assert_sparse(sparse)
        optimizer.zero_grad(), other.zero_grad()
    assert_same(model, twin)
    assert sparse.penalty() > 0


def test_closures_and_line_searches_see_loss_and_penalty() -> None:
    make = lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")  # noqa: E731
    model, optimizer, _, twin, other, _ = twins(make)

    def closure(of: nn.Module, opt: torch.optim.Optimizer, more: bool) -> Any:
        def run() -> Tensor:
            opt.zero_grad()
            loss = loss_of(of, 0) + (quartic(of) if more else 0)
            loss.backward()
            return loss

        return run

    for _ in range(3):
        got = optimizer.step(closure(model, optimizer, False))
        expected = other.step(closure(twin, other, True))
        assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert_same(model, twin)


@pytest.mark.parametrize("make", ["sgd", "fused"])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_does_not_scale_the_penalty(make: str, unscale: bool) -> None:
    model, optimizer, _, twin, other, _ = twins(MAKES[make])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        scaler.scale(loss_of(model, step)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        (loss_of(twin, step) + quartic(twin)).backward()
        other.step()
        optimizer.zero_grad(), other.zero_grad()
    assert_same(model, twin)


@pytest.mark.parametrize("make", ["sgd", "fused"])
def test_a_step_that_was_skipped_takes_no_proximal_step(make: str) -> None:
    model = nn.Linear(4, 3)
    optimizer = MAKES[make](model.parameters())
    sparse = rarefy.sparsify(model, Lasso(strength=1e4), optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = model.weight.detach().clone()
    scaler.scale(model(torch.full((2, 4), float("inf"))).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.weight, before) and sparse.step_count == 0
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    scaler.step(optimizer)
    assert not model.weight.any() and sparse.step_count == 1


def test_compressed_storage_gives_the_same_runs() -> None:
    for method in (Quartic(sparsity=0.5, weight=0.05), SparseLasso(sparsity=0.5)):
        for make in ("sgd", "adam"):
            weights = []
            for storage in ("masked", "compressed"):
                model = mlp().double()
                optimizer = MAKES[make](model.parameters())
                sparse = rarefy.sparsify(model, method, optimizer=optimizer, seed=1, storage=storage)
                for step in range(5):
                    x, y = batch(step)
                    F.cross_entropy(model(x.double()), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                weights.append(
                    {n: layer.weight() for n, layer in sparse.layers.items()} | {"penalty": sparse.penalty()}
                )
            for name, masked in weights[0].items():
                torch.testing.assert_close(masked, weights[1][name], rtol=1e-9, atol=1e-12)


def test_a_loop_without_an_optimizer_is_refused_and_steps_of_unknown_size_are_named() -> None:
    sparse = rarefy.sparsify(mlp(), Lasso())
    with pytest.raises(OptionError, match=r"lasso has a penalty.*pass optimizer"):
        sparse.step()
    model = mlp()
    with pytest.warns(UserWarning, match=r"step size of Adadelta is not known.*Exact: SGD"):
        rarefy.sparsify(model, Lasso(), optimizer=torch.optim.Adadelta(model.parameters()))
    assert rarefy.sparsify(mlp(), "static").penalty() == 0


def test_what_no_gradient_reached_takes_no_proximal_step() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rarefy.sparsify(model, Lasso(strength=10.0), optimizer=optimizer)
    before = model[1].weight.detach().clone()
    model[0](torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, before) and not model[0].weight.any()


GIVEN: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "dampening": 0.3},
    "RMSprop": {"momentum": 0.5, "centered": False},
    "Adam": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.0},
    "Adagrad": {"lr_decay": 0.1},
}


@pytest.mark.parametrize("kind", [kind for kind, _ in RULES])
def test_step_sizes_are_what_optimizers_do_with_a_constant_gradient(kind: type[torch.optim.Optimizer]) -> None:
    weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    gradient = torch.tensor([0.1, -2.0, 0.5, 3.0, -0.01], dtype=torch.float64)
    optimizer: Any = kind([weight], lr=0.01, **GIVEN.get(kind.__name__, {}))
    for _ in range(4000):
        weight.grad = gradient.clone()
        before = weight.detach().clone()
        optimizer.step()
    size = step_size(optimizer, optimizer.param_groups[0], optimizer.state[weight])
    torch.testing.assert_close(weight.detach() - before, -size * gradient, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
    ids=["sgd", "heavy ball", "nesterov", "adam", "rmsprop", "adagrad"],
)
def test_training_settles_at_a_stationary_point_of_loss_plus_penalty(make: Any) -> None:
    g = torch.Generator().manual_seed(0)
    design = torch.randn(50, 12, generator=g, dtype=torch.float64)
    target = design[:, :3].sum(1, keepdim=True) + 0.3 * torch.randn(50, 1, generator=g, dtype=torch.float64)
    model = nn.Linear(12, 1, bias=False).double()
    optimizer = make(model.parameters())
    penalty = L1(0.2)
    rarefy.sparsify(model, Lasso(strength=0.2), optimizer=optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    for _ in range(6000):
        optimizer.zero_grad()
        F.mse_loss(model(design), target).backward()
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad()
    F.mse_loss(model(design), target).backward()
    weight = model.weight.detach()
    assert penalty.residual(weight, model.weight.grad) < 1e-3
    reference = torch.zeros(1, 12, dtype=torch.float64)
    for _ in range(3000):
        reference = penalty.prox(reference - 0.1 * (2 / 50 * (reference @ design.T - target.T) @ design), 0.1)
    torch.testing.assert_close(weight, reference, rtol=0, atol=1e-3)
    assert torch.equal(weight == 0, reference == 0) and (weight == 0).any()


def test_a_bias_may_have_another_optimizer_than_its_weights() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    one = torch.optim.SGD([model[0].weight], lr=0.1)
    two = torch.optim.Adam([model[0].bias], lr=0.01)
    sparse = rarefy.sparsify(model, "wgsef", sparsity=0.5, strength=5.0, optimizer=[one, two])
    layer = sparse.layers["0.weight"]
    for step in range(3):
        model(torch.randn(5, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        two.step()
        one.step()
        size = layer.step_size()
        assert isinstance(size, Tensor) and tuple(size.shape) == (4, 7)
        torch.testing.assert_close(size[:, :6], torch.full((4, 6), 0.1))
        torch.testing.assert_close(size[:, 6], step_size(two, two.param_groups[0], two.state[model[0].bias]))
        one.zero_grad(), two.zero_grad()
    assert ((layer.weight() != 0).any(1) == (model[0].bias != 0)).all()


def test_compiled_models_and_no_warning() -> None:
    model = torch.compile(mlp(), backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse = rarefy.sparsify(model, Lasso(strength=0.5), optimizer=optimizer)
        for step in range(3):
            x, y = batch(step)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert sum(int((layer.weight() == 0).sum()) for layer in sparse.layers.values()) > 20


@dataclass(frozen=True, kw_only=True)
class Ridge(Method):
    """A penalty with a gradient that everyone knows, on plain masked weights."""

    name: ClassVar[str] = "ridge"
    weight: float = 0.3

    def choose(self, sparse: Sparsifier) -> None:
        for layer in sparse.layers.values():
            layer.rewire(layer.largest_magnitudes(torch.tensor([layer.numel // 2])))

    def penalty(self, sparse: Sparsifier) -> Tensor:
        shifted = [(layer.target.parameter - 1).square().sum() for layer in sparse.layers.values()]
        return 0.5 * self.weight * torch.stack(shifted).sum()


@pytest.mark.parametrize("how", ["plain", "closure", "accumulated", "maximized", "scaled", "scaled and fused"])
def test_a_penalty_adds_its_exact_gradient_once_a_step(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double() if "scaled" not in how else nn.Linear(6, 4)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, fused=how.endswith("fused"), maximize=how == "maximized"
    )
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    sparse = rarefy.sparsify(model, Ridge(), optimizer=optimizer)
    mask = sparse.layers["weight"].mask()
    with torch.no_grad():
        twin.weight.mul_(mask)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=twin.weight.dtype)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        if how == "closure":
            value = optimizer.step(closure)
        elif how == "accumulated":
            optimizer.zero_grad()
            for half in x.chunk(2):
                (model(half).square().mean() / 2).backward()
            optimizer.step()
        elif how == "plain":
            closure()
            optimizer.step()
        elif how == "maximized":
            optimizer.zero_grad()
            (-model(x).square().mean()).backward()
            optimizer.step()
        else:
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        other.zero_grad()
        total = twin(x).square().mean() + 0.15 * (twin.weight - 1).square().sum()
        total.backward()
        twin.weight.grad.mul_(mask)
        other.step()
        if how == "closure":
            torch.testing.assert_close(value, total)
        torch.testing.assert_close(
            model.weight, twin.weight, rtol=1e-5 if "scaled" in how else 1e-12, atol=1e-6 if "scaled" in how else 1e-12
        )
        assert not model.weight[~mask].any()
        assert not optimizer.state[model.weight]["momentum_buffer"][~mask].any()
