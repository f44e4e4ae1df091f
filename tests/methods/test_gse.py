"""Guided stochastic exploration: bounds and means of the guides, what is sampled, what grows and falls; on both storages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.engine.factors import Factors, draw, margins
from rarefy.errors import OptionError, SelectionError
from tests.engine.common import batch, mlp
from tests.engine.compressed import images, sgd, step

both = pytest.mark.parametrize("storage", ["masked", "compressed"])


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def linear() -> nn.Module:
    return nn.Linear(7, 6)


def conv() -> nn.Module:
    return nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2)


def grouped() -> nn.Module:
    return nn.Conv2d(4, 6, 3, padding="same", groups=2)


def reflecting() -> nn.Module:
    return nn.Conv2d(4, 6, (3, 2), padding=1, padding_mode="reflect")


LAYERS = [linear, conv, grouped, reflecting]


def collect(make: Callable[[], nn.Module], storage: str) -> tuple[rarefy.Sparsifier, Any, Tensor]:
    """A layer with the factors of one pass, and its dense gradient by autograd."""
    torch.manual_seed(0)
    module = make()
    x = torch.randn(5, 7) if isinstance(module, nn.Linear) else torch.randn(3, 4, 9, 8)
    target = torch.randn(module(x).shape)
    twin = make()
    sparse = rarefy.sparsify(module, "gse", sparsity=0.6, storage=storage, every=1, stop=9, allocation="uniform")
    layer: Any = sparse.layers["weight"]
    twin.load_state_dict({"weight": layer.weight(), "bias": module.bias.detach()})
    for net in (module, twin):
        F.mse_loss(net(x), target).backward()
    assert layer.has_factors
    return sparse, layer, twin.weight.grad


@both
@pytest.mark.parametrize("make", LAYERS)
def test_gradients_at_connections_are_those_of_autograd(make: Callable[[], nn.Module], storage: str) -> None:
    _, layer, gradient = collect(make, storage)
    places = layer.absent_connections()
    assert torch.equal(places, (~layer.mask()).flatten().nonzero().squeeze(1))
    torch.testing.assert_close(layer.gradients_at(places), gradient.flatten()[places], rtol=0, atol=1e-12)
    some = places[::3]
    torch.testing.assert_close(layer.gradients_at(some), gradient.flatten()[some], rtol=0, atol=1e-12)
    assert layer.further_gradients == len(places) + len(some)


@both
@pytest.mark.parametrize("make", LAYERS)
def test_grabo_bounds_and_graest_means_the_gradient(make: Callable[[], nn.Module], storage: str) -> None:
    _, layer, gradient = collect(make, storage)
    rows, groups = layer.shape[0], int(getattr(layer.module, "groups", 1))
    inputs = (groups, layer.numel // rows)

    def product(signs: torch.Generator | None) -> Tensor:
        f, g = margins(layer._factors.parts, signs, *(rows, inputs))
        return (f[:, None] * g.repeat_interleave(rows // groups, 0)).view(layer.shape)

    assert bool((gradient.abs() <= product(None) + 1e-12).all())
    generator, draws = torch.Generator().manual_seed(1), 3000
    products = torch.stack([product(generator) for _ in range(draws)])
    error = (products.mean(0) - gradient).abs() / (products.std(0) / draws**0.5)
    assert float(error.max()) < 5.5  # standard errors, over some hundred entries


@pytest.mark.parametrize("by", ["uniform", "grabo"])
def test_draws_follow_their_probabilities(by: str) -> None:
    torch.manual_seed(0)
    part = Factors(torch.randn(4, 5), torch.randn(4, 3))
    part.x[:, 2] = 0
    generator, hits = torch.Generator().manual_seed(0), torch.zeros(15)
    for _ in range(6000):
        hits[draw([part], [3, 5], 1, 1, by, generator)] += 1
    f, g = margins([part], None, 3, (1, 5))
    expected = torch.ones(15) / 15 if by == "uniform" else ((f[:, None] * g) / (f.sum() * g.sum())).flatten()
    assert bool(((hits / 6000 - expected).abs() < 5 * (expected * (1 - expected) / 6000).sqrt() + 1e-9).all())


def test_draws_of_a_grouped_convolution_stay_in_their_group_and_follow_the_product() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(3, 4, 3, 3), torch.randn(3, 2, 3, 3)
    part = Factors(x, dy, ([2, 2, 1, 1], [1, 1], [0, 0], [1, 1], 2))
    generator, hits = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(6000):
        hits[draw([part], [2, 2, 1, 1], 2, 1, "grabo", generator)] += 1
    f, g = margins([part], None, 2, (2, 2))
    expected = (f[:, None] * g).flatten() / (f[:, None] * g).sum()
    assert bool(((hits / 6000 - expected).abs() < 5 * (expected * (1 - expected) / 6000).sqrt()).all())


@both
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("by", ["uniform", "grabo", "graest"])
def test_an_update_grows_the_best_samples_and_then_drops_the_smallest(storage: str, scope: str, by: str) -> None:
    model = mlp().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse = rarefy.sparsify(
        model,
        "gse",
        sparsity=0.7,
        optimizer=optimizer,
        storage=storage,
        every=1,
        stop=1000,
        scope=scope,
        by=by,
        gamma=2.0,
        drop_fraction=0.4,
        init="dense",
    )
    layers: dict[str, Any] = dict(sparse.layers)
    sampled: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():  # what the update looks at

        def note(places: Tensor, name: str = name, look: Any = layer.gradients_at) -> Tensor:
            sampled[name] = (places, look(places).abs())
            return sampled[name][1]

        layer.gradients_at = note
    for i in range(3):
        before = {name: (layer.mask().flatten(), layer.weight().abs().flatten()) for name, layer in layers.items()}
        step(model, optimizer, batch(i))
        together = [list(layers)] if scope == "global" else [[name] for name in layers]
        for names in together:
            grown, left, kept, dropped = [], [], [], []
            for name in names:
                mask, weight = before[name]
                after, (places, scores) = layers[name].mask().flatten(), sampled[name]
                assert not bool(mask[places].any()) and places.unique().numel() == places.numel()
                assert len(places) <= max(2 * int(mask.sum()), int((~mask).sum()) if mask.double().mean() > 0.5 else 0)
                grown.append(scores[after[places]])
                left.append(scores[~after[places]])
                kept.append(weight[mask & after])
                dropped.append(weight[mask & ~after])
                assert int((after & ~mask).sum()) == len(grown[-1]), "something grew that was not sampled"
            g, lo, k, d = map(torch.cat, (grown, left, kept, dropped))
            assert 0 < len(g) == len(d) <= 0.4 * (len(k) + len(d))
            assert not len(lo) or float(g.min()) >= float(lo.max())
            assert float(k.min()) >= float(d.max())
    assert sparse.nnz == int(0.3 * sparse.numel + 0.5)


@both
def test_only_sampled_gradients_are_paid_for(storage: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    sparse = rarefy.sparsify(
        model, "gse", sparsity=0.9, optimizer=optimizer, storage=storage, every=4, total_steps=20, allocation="uniform"
    )
    for i in range(20):
        step(model, optimizer, batch(i))
    for name, cost in sparse.training_cost().items():
        assert cost.dense_gradient_steps == 0
        assert 0 < cost.further_gradients <= 3 * max(layer.nnz * 2 for layer in sparse.layers.values()), name


@both
def test_accumulated_passes_count_and_probes_do_not(storage: str) -> None:
    model = nn.Sequential(nn.Linear(12, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse = rarefy.sparsify(model, "gse", sparsity=0.5, optimizer=optimizer, storage=storage, every=9, stop=90)
    for _ in range(8):
        model(batch(0)[0]).sum().backward()
        optimizer.step()
    layer: Any = sparse.layers["0.weight"]
    optimizer.zero_grad()
    for i in (1, 2):
        torch.autograd.grad(model(batch(50 + i)[0]).square().sum(), list(model.parameters()))
        model(batch(i)[0]).square().sum().backward()
    assert len(layer._factors.parts) == 2
    kept = layer.mask().flatten().nonzero().squeeze(1)
    gradient = layer.target.parameter.grad
    torch.testing.assert_close(
        layer.gradients_at(kept), gradient if storage == "compressed" else gradient.flatten()[kept], rtol=0, atol=1e-10
    )


@both
def test_a_step_in_bfloat16_autocast(storage: str) -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    optimizer = sgd(model)
    sparse = rarefy.sparsify(model, "gse", sparsity=0.8, optimizer=optimizer, storage=storage, every=1, stop=20)
    for i in range(3):
        x, y = images(i)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {event.step for event in sparse.events} >= {1, 2, 3} and sparse.explored() > 1 - sparse.sparsity


def test_a_compiled_network_is_seen_on_compressed_storage_and_named_on_masked() -> None:
    torch.set_default_dtype(torch.float32)
    for storage, seen in (("compressed", True), ("masked", False)):
        torch._dynamo.reset()
        model = mlp()
        optimizer = sgd(model)
        sparse = rarefy.sparsify(model, "gse", sparsity=0.8, optimizer=optimizer, storage=storage, every=2, stop=20)
        run = torch.compile(model, backend="aot_eager")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for i in range(4):
                step(run, optimizer, (batch(i)[0].float(), batch(i)[1]))
        named = any("No finite gradient reached 0.weight" in str(w.message) for w in said)
        moved = sparse.explored() > 1 - sparse.sparsity + 1e-9
        assert moved or named, "neither an update nor a word"
        assert moved or not seen
    torch._dynamo.reset()


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"by": "magic"}, {"scope": "nowhere"}, {"gamma": 0.0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            rarefy.methods.make("gse", **wrong)
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    with pytest.raises(SelectionError, match=r"0\.weight \[10, 8\].*exclude=\['0'\]"):
        rarefy.sparsify(model, "gse", sparsity=0.5)
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    with pytest.raises(SelectionError, match=r"0\.weight"):
        rarefy.sparsify(tied, "gse", sparsity=0.5)
