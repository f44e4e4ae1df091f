"""SET and RigL: exact invariants of an update, and tests that a toy version fails."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from tests.engine.common import assert_sparse, backward, mlp


def one_update(method: str, **options: object) -> tuple[rarefy.Sparsifier, dict[str, dict[str, torch.Tensor]]]:
    """Make one update in float64 with lr 0 and return, per layer, mask before, weight, dense gradient and mask after."""
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse = rarefy.sparsify(
        model, method, sparsity=0.7, optimizer=optimizer, every=1, drop_fraction=0.4, stop=100, **options
    )
    before = {n: dict(mask=layer.mask(), weight=layer.weight().clone()) for n, layer in sparse.layers.items()}
    twin = mlp().double()  # the dense gradient by autograd, from a model that rarefy never saw
    twin.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(16, 12, generator=generator).double(), torch.randint(5, (16,), generator=generator)
    F.cross_entropy(twin(x), y).backward()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for name, layer in sparse.layers.items():
        before[name] |= dict(gradient=twin.get_parameter(name).grad.abs(), after=layer.mask())
    return sparse, before


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_an_update_drops_the_smallest_and_keeps_the_number(method: str) -> None:
    sparse, layers = one_update(method)
    fraction = 0.2 * (1 + math.cos(math.pi / 100))
    for name, now in layers.items():
        mask, weight, after = now["mask"], now["weight"].abs(), now["after"]
        n = int(mask.sum())
        assert int(after.sum()) == n
        k = int(fraction * n)
        survivors = torch.zeros_like(mask).flatten()
        survivors[torch.topk(weight.masked_fill(~mask, -1).flatten(), n - k).indices] = True
        assert (after.flatten() | ~survivors).all(), "a large weight was dropped"
        event = sparse.events[-len(layers) + list(layers).index(name)]
        assert event.dropped == event.grown <= k


def test_rigl_grows_the_largest_dense_gradients() -> None:
    _, layers = one_update("rigl")
    fraction = 0.2 * (1 + math.cos(math.pi / 100))
    for now in layers.values():
        n = int(now["mask"].sum())
        k = int(fraction * n)
        survivors = torch.zeros(now["mask"].numel(), dtype=torch.bool)
        survivors[torch.topk(now["weight"].abs().masked_fill(~now["mask"], -1).flatten(), n - k).indices] = True
        expected = survivors.clone()
        expected[torch.topk(now["gradient"].flatten().masked_fill(survivors, -1), k).indices] = True
        assert torch.equal(now["after"].flatten(), expected)


def test_rigl_finds_the_one_edge_that_explains_the_data_and_a_masked_gradient_would_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.9, optimizer=optimizer, every=5, stop=100, seed=3)
    absent = int((~sparse.layers["0.weight"].mask()).nonzero()[-1, 1])  # the last one: lowest-index ties never reach it
    for _ in range(5):
        x = torch.randn(256, 100)
        F.mse_loss(model(x)[:, 0], 3 * x[:, absent]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparse.layers["0.weight"].mask()[0, absent]


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_updates_follow_the_clock_and_the_cosine(method: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(
        model,
        method,
        sparsity=0.5,
        optimizer=optimizer,
        every=4,
        drop_fraction=0.5,
        total_steps=40,
        allocation="uniform",
    )
    counts = []
    for step in range(40):
        masks = sparse.masks()
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        assert_sparse(sparse)
        changed = any(not torch.equal(masks[n], m) for n, m in sparse.masks().items())
        if changed:
            counts.append(sparse.step_count)
    assert set(counts) <= set(range(4, 31, 4))
    assert counts[0] == 4
    for event in sparse.events:
        if event.step:
            assert event.dropped <= int(0.25 * (1 + math.cos(math.pi * event.step / 30)) * event.kept)


def test_set_grows_uniformly_over_absent_positions() -> None:
    hits = torch.zeros(100)
    for seed in range(400):
        torch.manual_seed(0)
        model = nn.Linear(100, 1, bias=False)
        sparse = rarefy.sparsify(model, "set", sparsity=0.5, every=1, stop=50, drop_fraction=0.5, seed=seed)
        before = sparse.layers["weight"].mask()[0]
        sparse.step()
        hits += sparse.layers["weight"].mask()[0] & ~before
    assert hits.min() > 0.4 * hits.mean()
    assert hits.max() < 1.8 * hits.mean()


def test_without_updates_rigl_is_static_bit_for_bit() -> None:
    results = []
    for method, options in (("static", {}), ("rigl", dict(every=1000)), ("set", dict(every=1000))):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        rarefy.sparsify(model, method, sparsity=0.8, optimizer=optimizer, **options)
        for step in range(5):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][n], other[n]) for other in results[1:] for n in other)


def test_a_branch_without_gradient_keeps_its_mask() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 5), nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x)

    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.5, optimizer=optimizer, every=1, stop=9)
    masks = sparse.masks()
    model(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    assert torch.equal(masks["b.weight"], sparse.layers["b.weight"].mask())
    assert not torch.equal(masks["a.weight"], sparse.layers["a.weight"].mask())


def test_an_overflow_does_not_decide_and_layers_without_gradient_are_named() -> None:
    model = mlp()
    masks: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():  # an overflow where GradScaler cannot see it
        p.register_hook(lambda g, name=name: g.masked_fill(~masks[name], float("inf")) if name in masks else g)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.5, optimizer=optimizer, every=1, stop=9)
    masks |= sparse.masks()
    backward(model, 0)
    with pytest.warns(UserWarning, match=r"No finite gradient reached 0\.weight, 3\.weight, 5\.weight"):
        optimizer.step()
    assert all(torch.equal(masks[n], m) for n, m in sparse.masks().items())
    assert_sparse(sparse)
    masks.clear()
    model.zero_grad()
    x, y = torch.randn(4, 20), torch.randint(5, (4,))
    F.cross_entropy(model[5](x), y).backward()
    with pytest.warns(UserWarning, match=r"reached 0\.weight"):
        optimizer.step()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "fan-in"])
@pytest.mark.parametrize("method", ["set", "rigl"])
def test_small_groups_move_too(method: str, pattern: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {} if ":" in pattern else {"sparsity": 0.8, "allocation": "uniform"}
    sparse = rarefy.sparsify(model, method, pattern=pattern, optimizer=optimizer, every=1, stop=1000, **options)
    for _ in range(8):
        before = {name: (layer.mask(), layer.counts()) for name, layer in sparse.layers.items()}
        F.cross_entropy(model(torch.randn(32, 16)), torch.randint(8, (32,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in sparse.layers.items():
            assert torch.equal(before[name][1], layer.counts())
    for event in sparse.events[-2:]:
        assert event.grown <= int(0.3 * event.kept)
    assert sparse.explored() > 1.3 * (1 - sparse.sparsity)
