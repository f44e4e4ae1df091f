"""What each sparse-to-sparse method decides, against its paper's rule written plainly, on both storages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy import Sparsifier
from rarefy.allocation import spread
from rarefy.engine.sharing import largest_across
from rarefy.errors import AllocationError, OptionError
from tests.engine.common import batch, mlp
from tests.engine.compressed import sgd, step

STORAGES = ("masked", "compressed")
both = pytest.mark.parametrize("storage", STORAGES)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def still(method: str, storage: str, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    """A model whose weights do not move: what an update decides can be told from what came before it."""
    model = mlp().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"sparsity": 0.7, "every": 1, "total_steps": 100} | options
    return model, optimizer, rarefy.sparsify(model, method, optimizer=optimizer, storage=storage, **options)


def dense_gradients(sparse: Sparsifier, model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Gradients of all weights by autograd, from a twin that rarefy never saw."""
    twin = mlp().eval()
    weights = {name: layer.weight() for name, layer in sparse.layers.items()}
    rest = {name: value for name, value in model.state_dict().items() if name in twin.state_dict()}
    twin.load_state_dict(rest | weights)
    F.cross_entropy(twin(data[0]), data[1]).backward()
    return {name: twin.get_parameter(name).grad for name in weights}


def top(scores: Tensor, count: int) -> Tensor:
    flat = torch.zeros(scores.numel(), dtype=torch.bool)
    flat[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
    return flat.view_as(scores)


# --- sharing out -------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 40)), min_size=1, max_size=6), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_spread_is_exact_within_room_and_in_proportion(parts: list[tuple[float, int]], share: float) -> None:
    shares = {str(i): weight for i, (weight, _) in enumerate(parts)}
    room = {str(i): size for i, (_, size) in enumerate(parts)}
    total = int(share * sum(room.values()))
    given_out = spread(total, shares, room)
    assert sum(given_out.values()) == total
    assert all(0 <= count <= room[name] for name, count in given_out.items())
    free = [n for n in shares if given_out[n] < room[n] and shares[n] > 0]
    for a in free:  # where nothing is full, counts differ from proportion by rounding only
        for b in free:
            assert given_out[a] / shares[a] <= (given_out[b] + 1) / shares[b] + 1 / shares[a] + 1e-6


def test_spread_needs_room() -> None:
    with pytest.raises(AllocationError, match="room for 3 weights, not for 4"):
        spread(4, {"a": 1.0}, {"a": 3})


def test_the_largest_across_layers_leave_each_layer_some() -> None:
    scores = {"a": torch.tensor([5.0, 4.0, 3.0]), "b": torch.tensor([0.1, 0.2])}
    assert [m.tolist() for m in largest_across(scores, 3).values()] == [[True, True, True], [False, False]]
    assert [m.tolist() for m in largest_across(scores, 3, each=1).values()] == [[True, True, False], [False, True]]


# --- ITOP --------------------------------------------------------------------------------------------------------------


@both
def test_itop_falls_to_its_last_fraction_and_reports_what_was_tried(storage: str) -> None:
    model, optimizer, sparse = still("itop", storage, drop_fraction=0.5, final_fraction=0.1, every=10)
    union = sparse.masks()
    reported = []
    for i in range(100):
        step(model, optimizer, batch(i))
        union = {name: union[name] | mask for name, mask in sparse.masks().items()}
        if (i + 1) % 10 == 0 and i + 1 < 100:
            reported.append([i + 1, sum(int(m.sum()) for m in union.values()) / sparse.numel])
    method: Any = sparse.method
    assert method.fraction(sparse, 0) == 0.5 and method.fraction(sparse, 50) == pytest.approx(0.3)
    assert method.fraction(sparse, 100) == pytest.approx(0.1)
    assert sparse.memory["explored"] == [[0, sparse.nnz / sparse.numel], *reported]
    values = [share for _, share in sparse.memory["explored"]]
    assert values == sorted(values) and values[-1] > values[0]


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_itop_with_their_options_is_set_or_rigl(growth: str) -> None:
    masks = []
    for method, options in (
        ("itop", {"growth": growth, "final_fraction": 0.0, "drop_fraction": 0.3, "stop": 0.75}),
        ("set" if growth == "random" else "rigl", {}),
    ):
        model = mlp()
        optimizer = sgd(model)
        sparse = rarefy.sparsify(
            model, method, sparsity=0.8, optimizer=optimizer, total_steps=40, every=5, seed=2, **options
        )
        for i in range(40):
            step(model, optimizer, batch(i))
        masks.append(sparse.masks())
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


# --- DSR ---------------------------------------------------------------------------------------------------------------


@both
def test_dsr_drops_below_one_threshold_and_gives_to_layers_with_much_left(storage: str) -> None:
    model, optimizer, sparse = still("dsr", storage, threshold=0.15, target=30, init="dense", allocation="uniform")
    for i in range(4):
        threshold = sparse.memory["threshold"]
        before, weights = sparse.masks(), {name: layer.weight().abs() for name, layer in sparse.layers.items()}
        step(model, optimizer, batch(i))
        large = {name: mask & (weights[name] >= threshold) for name, mask in before.items()}
        for name, mask in before.items():
            if not large[name].any():
                large[name] = top(weights[name].masked_fill(~mask, -1), 1)
        left = {name: int(mask.sum()) for name, mask in large.items()}
        dropped = sum(int(mask.sum()) for mask in before.values()) - sum(left.values())
        for name, layer in sparse.layers.items():
            after = layer.mask()
            assert bool((after | ~large[name]).all()), "a weight above the threshold was dropped"
            grown = after & ~large[name]
            assert not bool((grown & before[name]).any()), "what was just dropped grew"
            assert abs(int(grown.sum()) - dropped * left[name] / sum(left.values())) < 1
        assert sum(layer.nnz for layer in sparse.layers.values()) == sum(int(m.sum()) for m in before.values())
        expected = threshold / 2 if dropped > 33 else threshold * 2 if dropped < 27 else threshold
        assert sparse.memory["threshold"] == expected


def test_dsr_refuses_a_target_that_leaves_nothing() -> None:
    model = mlp()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(OptionError, match="target=600 weights to drop are not below"):
        rarefy.sparsify(model, "dsr", sparsity=0.8, target=600)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    for wrong in (0, 1.5, True):
        with pytest.raises(OptionError, match="target"):
            rarefy.methods.make("dsr", target=wrong)


# --- SRigL -------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9])
def test_srigl_decides_as_the_paper_says(storage: str, gamma: float) -> None:
    model, optimizer, sparse = still(
        "srigl", storage, gamma=gamma, drop_fraction=0.6, allocation="uniform", sparsity=0.75
    )
    budgets = {name: layer.nnz for name, layer in sparse.layers.items()}
    ablated = revived = 0
    for i in range(8):
        data = batch(i)
        gradients = dense_gradients(sparse, model, data)
        before = {name: (layer.mask(), layer.weight().abs()) for name, layer in sparse.layers.items()}
        step(model, optimizer, data)
        fraction = 0.3 * (1 + math.cos(math.pi * (i + 1) / 75))
        for name, layer in sparse.layers.items():
            mask, weight = before[name]
            gradient, outputs, inputs = gradients[name].abs(), *mask.shape
            moved = int(fraction * int(mask.sum()))
            kept = top(weight.masked_fill(~mask, -1), int(mask.sum()) - moved)
            salient = (kept | top(gradient, moved)).sum(1)
            tau = max(1, int(gamma * (budgets[name] // outputs)))
            tau = min(tau, int(salient.sort(descending=True).values[max(1, budgets[name] // inputs) - 1]))
            live = salient >= tau if name != "5.weight" else torch.ones(outputs, dtype=torch.bool)
            fan_in = min(inputs, budgets[name] // int(live.sum()))
            expected = torch.zeros_like(mask)
            for row in live.nonzero().flatten().tolist():
                stay = top(weight[row].masked_fill(~kept[row], -1), min(fan_in, int(kept[row].sum())))
                expected[row] = stay | top(gradient[row].masked_fill(stay, -1), fan_in - int(stay.sum()))
            assert torch.equal(layer.mask(), expected), (name, i)
            assert layer.pattern.obeys(layer.mask()[live]) and layer.nnz == fan_in * int(live.sum()) <= budgets[name]
            ablated += int((~live).sum())
            revived += int((live & ~mask.any(1)).sum())
    if gamma == 0.9:
        assert ablated > 0 and revived > 0


def test_a_network_with_dead_neurons_runs_accelerated() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(
        model, "srigl", sparsity=0.9, optimizer=optimizer, every=2, gamma=0.9, drop_fraction=0.5, allocation="uniform"
    )
    for i in range(12):
        generator = torch.Generator().manual_seed(i)
        step(model, optimizer, (torch.randn(32, 64, generator=generator), torch.randint(5, (32,), generator=generator)))
    dead = [int((layer.mask().sum(1) == 0).sum()) for layer in sparse.layers.values()]
    assert dead[0] > 0 and dead[-1] == 0
    plain = sparse.finalize().eval()
    x = torch.randn(7, 64)
    fast = rarefy.accelerate(plain, x)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


# --- SNFS --------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("window", [1, 3, 50])
def test_snfs_decides_by_the_momentum_of_the_last_steps(storage: str, window: int) -> None:
    model, optimizer, sparse = still(
        "snfs", storage, window=window, every=5, momentum=0.8, drop_fraction=0.4, final_fraction=0.0, total_steps=40
    )
    momentum = {name: torch.zeros(layer.shape) for name, layer in sparse.layers.items()}
    for i in range(20):
        data = batch(i)
        before = {name: (layer.mask(), layer.weight().abs()) for name, layer in sparse.layers.items()}
        if i % 5 >= 5 - window:
            found = dense_gradients(sparse, model, data)
            momentum = {name: 0.8 * momentum[name] + found[name] for name in found}
        step(model, optimizer, data)
        if i % 5 < 4:
            assert all(torch.equal(before[name][0], layer.mask()) for name, layer in sparse.layers.items())
            continue
        fraction = 0.2 * (1 + math.cos(math.pi * (i + 1) / 40))
        means = {name: float(momentum[name].abs()[before[name][0]].mean()) for name in momentum}
        survivors = {}
        for name, (mask, weight) in before.items():
            sparsity = 1 - float(mask.double().mean())
            share = means[name] / sum(means.values())
            here = min(fraction, sparsity) if sparsity < 0.2 and share > 1 / 3 else fraction
            survivors[name] = top(weight.masked_fill(~mask, -1), int(mask.sum()) - math.ceil(here * int(mask.sum())))
        dropped = sum(int(mask.sum()) - int(survivors[name].sum()) for name, (mask, _) in before.items())
        room = {name: int(0.99 * int((~mask).sum())) for name, mask in survivors.items()}
        for name, count in spread(dropped, means, room).items():
            grown = top(momentum[name].abs().masked_fill(survivors[name], -1), count)
            assert torch.equal(sparse.layers[name].mask(), survivors[name] | grown), (name, i)
        momentum = {name: torch.zeros_like(value) for name, value in momentum.items()}
    steps = {cost.dense_gradient_steps for cost in sparse.training_cost().values()}
    assert steps == {4 * min(window, 5)}


def test_compressed_momentum_is_never_larger_than_dense_or_factors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparse = rarefy.sparsify(
        model, "snfs", sparsity=0.95, optimizer=optimizer, storage="compressed", every=80, window=70, total_steps=100
    )
    wide: Any = sparse.layers["0.weight"]
    for i in range(80):
        step(model, optimizer, (torch.randn(4, 400), torch.randint(5, (4,))))
        held = sum(part.numel() if isinstance(part, Tensor) else part.numel for _, part in wide._gradient.past)
        assert held <= min(300 * 400, 80 * 4 * 700)
        if 10 < i < 40:
            assert held == (i + 1 - 10) * 4 * 700, "factors are smaller here"
    assert sparse.events[-1].step == 80


# --- all methods that look at gradients ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("method", ["snfs", "srigl", "itop", "gse"])
def test_the_one_edge_that_explains_the_data_is_found(method: str, storage: str) -> None:
    """A growth score taken from masked gradients is 0 everywhere, and the lowest places win."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"itop": {"growth": "gradient"}, "gse": {"gamma": 10.0}}.get(method, {})
    sparse = rarefy.sparsify(
        model, method, sparsity=0.9, optimizer=optimizer, every=5, total_steps=200, seed=3, storage=storage, **options
    )
    absent = int((~sparse.layers["0.weight"].mask()).nonzero()[-1, 1])
    for _ in range(30):
        x = torch.randn(256, 100)
        F.mse_loss(model(x)[:, 0], 3 * x[:, absent]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparse.layers["0.weight"].mask()[0, absent]


@both
@pytest.mark.parametrize("method", ["snfs", "srigl", "gse"])
def test_a_layer_without_gradient_keeps_its_mask_and_is_named(method: str, storage: str) -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 5), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(
        model, method, sparsity=0.5, optimizer=optimizer, every=1, stop=9, storage=storage, allocation="uniform"
    )
    masks = sparse.masks()
    model(torch.randn(4, 12)).square().sum().backward()
    with pytest.warns(UserWarning, match=r"No finite gradient reached b\.weight"):
        optimizer.step()
    assert torch.equal(masks["b.weight"], sparse.layers["b.weight"].mask())
    assert not torch.equal(masks["a.weight"], sparse.layers["a.weight"].mask())


@pytest.mark.parametrize("method", ["itop", "dsr", "deep-r", "gse"])
def test_nothing_dense_is_made_of_a_layer_too_large_for_it(method: str) -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    side, options = 20_000, {"deep-r": {"l1": 1.0}, "dsr": {"threshold": 1e-2}}.get(method, {})
    model = nn.Sequential(rarefy.nn.SparseLinear(side, side, sparsity=0.9999), nn.ReLU(), nn.Linear(side, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sparse = rarefy.sparsify(
        model, method, sparsity=0.99, optimizer=optimizer, storage="compressed", every=1, total_steps=9, **options
    )
    with rarefy.metrics.PeakMemory() as memory:
        for i in range(3):
            generator = torch.Generator().manual_seed(i)
            step(model, optimizer, (torch.randn(4, side, generator=generator), torch.tensor([0, 1, 2, 0])))
    assert sparse.layers["0.weight"].explored() > sparse.layers["0.weight"].nnz, "nothing moved"
    assert memory.increase < 200e6, f"{memory.increase / 1e6:.0f} MB; one bit mask in bytes is 400 MB"
