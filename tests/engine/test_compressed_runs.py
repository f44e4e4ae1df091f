"""Compressed storage follows the masked run: masks, losses, weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy import kernels
from rarefy.engine.dense_gradient import BLOCK, DenseGradient
from rarefy.nn import SparseLinear
from tests.engine.common import batch, mlp
from tests.engine.compressed import (
    METHODS,
    NETS,
    Make,
    adamw,
    assert_same_run,
    images,
    sgd,
    step,
    train,
)


@pytest.fixture
def double() -> Iterator[None]:
    """Rounding then decides nothing: in float32 a near tie between two weights to drop may fall the other way."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.usefixtures("double")
def test_the_run_is_the_masked_one(net: str, method: str, make: Make) -> None:
    runs = [train(net, storage, make, method, 200, **METHODS[method]) for storage in ("masked", "compressed")]
    assert_same_run(runs[0], runs[1])
    assert method in ("static", "magnitude") or len(runs[1][0].events) > 20


@pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("method", ["static", "set", "rigl"])
@pytest.mark.parametrize("net", NETS)
def test_the_native_run_is_the_masked_one(net: str, method: str, make: Make) -> None:
    def slower(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = make(model)
        optimizer.param_groups[0]["lr"] /= 4
        return optimizer

    runs = [train(net, storage, slower, method, 200, **METHODS[method]) for storage in ("masked", "compressed")]
    for name, mask in runs[0][0].masks().items():
        assert torch.equal(mask, runs[1][0].layers[name].mask()), name
    torch.testing.assert_close(torch.tensor(runs[0][1]), torch.tensor(runs[1][1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["static", "set", "rigl"])
def test_constant_fan_in_too(method: str) -> None:
    runs = [train("mlp", s, sgd, method, 60, pattern="fan-in", **METHODS[method]) for s in ("masked", "compressed")]
    assert_same_run(runs[0], runs[1])


def test_snip_too() -> None:
    runs = [train("mlp", s, sgd, "snip", 30, calibration=[batch(99)]) for s in ("masked", "compressed")]
    assert_same_run(runs[0], runs[1])


def test_blocks_of_rows_find_what_the_whole_gradient_does(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [train(net, "compressed", sgd, "rigl", 40, every=5)[0].masks() for net in NETS]
    monkeypatch.setattr("rarefy.engine.dense_gradient.BLOCK", 37)
    monkeypatch.setattr("rarefy.engine.positions.BLOCK", 37)
    parts = [train(net, "compressed", sgd, "rigl", 40, every=5)[0].masks() for net in NETS]
    for a, b in zip(whole, parts, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    fan_in = [train("mlp", s, sgd, "set", 20, pattern="fan-in", every=5)[0].masks() for s in ("masked", "compressed")]
    assert all(torch.equal(fan_in[0][name], fan_in[1][name]) for name in fan_in[0])


@pytest.mark.parametrize("shape", [(40, 130), (3, 20_000)])
def test_the_largest_entries_are_found_block_by_block(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, cols = shape
    module = SparseLinear(cols, rows, sparsity=0.9)
    collected = DenseGradient()
    collected.watch(module)
    whole = torch.zeros(shape)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # small integers: exact sums with many ties
        x, dy = (torch.randint(-2, 3, (2, n), generator=generator).float() for n in (cols, rows))
        (module(x) * dy).sum().backward()
        collected.commit(module.values)
        whole += dy.T @ x
    besides = torch.randperm(rows * cols, generator=generator)[:500].sort().values
    scores = whole.abs().view(-1).index_fill(0, besides, -1)
    for block in (BLOCK, 7 * cols):
        monkeypatch.setattr("rarefy.engine.dense_gradient.BLOCK", block)
        for count in (0, 1, 300, 2500):
            expected = kernels.select_k(scores, count).nonzero().squeeze(1)
            assert torch.equal(collected.largest(module, count, besides), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
        lambda p: torch.optim.Rprop(p, lr=1e-3),
        lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True, foreach=True),
        lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
        lambda p: torch.optim.NAdam(p, lr=1e-3),
        lambda p: torch.optim.RAdam(p, lr=1e-3),
        lambda p: torch.optim.Adadelta(p),
        lambda p: torch.optim.Adamax(p),
        lambda p: torch.optim.ASGD(p),
        lambda p: torch.optim.SGD(p, lr=0.05, nesterov=True, momentum=0.9),
    ],
)
@pytest.mark.usefixtures("double")
def test_every_elementwise_optimizer(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    runs = [train("mlp", s, lambda m: make(m.parameters()), "rigl", 40, every=8) for s in ("masked", "compressed")]
    a, b = runs[0][0], runs[1][0]
    for name, layer in a.layers.items():
        assert torch.equal(layer.mask(), b.layers[name].mask())
        torch.testing.assert_close(layer.weight(), b.layers[name].weight(), rtol=0, atol=1e-6)


def test_state_that_was_gathered_before_goes_along() -> None:
    """The model was trained densely for a while: momentum follows its weights into the vector of kept ones."""
    results = []
    for storage in ("masked", "compressed"):
        model = mlp()
        optimizer = adamw(model)
        for i in range(5):
            step(model, optimizer, batch(i))
        sparse = rarefy.sparsify(model, "magnitude", sparsity=0.7, optimizer=optimizer, storage=storage)
        losses = [step(model, optimizer, batch(i)) for i in range(30)]
        results.append((sparse, losses))
    assert_same_run(results[0], results[1])


def test_accumulated_passes_decide_together_and_probing_leaves_no_trace() -> None:
    def run(storage: str) -> dict[str, Tensor]:
        model = mlp().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, every=1, optimizer=optimizer, storage=storage)
        for i in range(6):
            for j in range(2):
                x, y = batch(2 * i + j)
                loss = F.cross_entropy(model(x), y)
                probe = F.cross_entropy(model(batch(100 + i)[0]), batch(100 + i)[1])
                torch.autograd.grad(probe * 100, list(model.parameters()))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=i % 2 == 0)
        return sparse.masks()

    masked, compressed = run("masked"), run("compressed")
    assert all(torch.equal(masked[name], compressed[name]) for name in masked)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def test_a_layer_that_is_used_twice_in_a_pass() -> None:
    results = []
    for storage in ("masked", "compressed"):
        model = Twice()
        optimizer = sgd(model)
        sparse = rarefy.sparsify(model, "rigl", sparsity=0.7, every=2, optimizer=optimizer, storage=storage)
        results.append((sparse, [step(model, optimizer, batch(i)) for i in range(12)]))
    assert_same_run(results[0], results[1])


def test_compiled_training_follows_eager() -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = mlp()
        optimizer = sgd(model)
        sparse = rarefy.sparsify(
            model, "rigl", sparsity=0.8, every=3, optimizer=optimizer, storage="compressed", total_steps=20
        )
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        results.append(([step(run, optimizer, batch(i)) for i in range(12)], sparse.masks()))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.tensor(results[0][0]), torch.tensor(results[1][0]), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_flops_are_counted_from_what_is_kept() -> None:
    reports = [train("convnet", s, sgd, "set", 0)[0].summary(images(0)[0]) for s in ("masked", "compressed")]
    assert reports[0].rows == reports[1].rows and reports[0].flops == reports[1].flops
