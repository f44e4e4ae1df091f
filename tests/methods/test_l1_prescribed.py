"""l1 with prescribed counts: on problems with closed forms, on small networks, exactly, and from one solve to the next."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.engine.calibration import mean_gradients
from rarefy.errors import OptionError
from rarefy.penalties import L1
from tests.engine.common import assert_sparse


def squares(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(data[0]), data[1], reduction="sum") / 2


def orthonormal(features: int = 12) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A linear model at zero and data whose columns are orthonormal: the lasso has a closed form."""
    g = torch.Generator().manual_seed(0)
    design = torch.linalg.qr(torch.randn(30, features, generator=g, dtype=torch.float64)).Q
    model = nn.Linear(features, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model, (design, torch.randn(30, 1, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 4, 11, 12])
def test_separable_problems_are_solved_at_the_first_try(count: int) -> None:
    model, data = orthonormal()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparse = rarefy.sparsify(
        model,
        "l1-prescribed",
        sparsity=1 - count / 12,
        optimizer=optimizer,
        calibration=[data],
        loss=squares,
        every=60,
        tolerance=0.0,
    )
    correlations = data[0].T @ data[1]
    ordered = correlations.abs().flatten().sort(descending=True).values
    strength = sparse.memory["strength"]["weight"]
    assert strength == pytest.approx(float(ordered[count]) if count < 12 else 0.1 * float(ordered[-1]), rel=1e-5)
    for _ in range(59):
        optimizer.zero_grad()
        squares(model, data).backward()
        optimizer.step()
    expected = L1(strength).prox(correlations.T, 1.0)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-9)
    assert sparse.penalty() == pytest.approx(strength * float(expected.abs().sum()))
    optimizer.zero_grad()
    squares(model, data).backward()
    optimizer.step()
    assert sparse.memory["solves"] == [{"weight": count}] and sparse.memory["residual"]["weight"] < 1e-9
    assert sparse.nnz == count and torch.equal(sparse.layers["weight"].mask(), expected != 0)
    for _ in range(60):  # what is kept is fitted without the penalty: least squares on the support
        optimizer.zero_grad()
        squares(model, data).backward()
        optimizer.step()
    torch.testing.assert_close(
        model.weight.detach(), torch.where(expected != 0, correlations.T, 0.0), atol=1e-9, rtol=0
    )
    assert sparse.penalty() == 0


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))


def classes() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(128, 10, generator=g)
    y = (x @ torch.randn(10, 4, generator=g)).argmax(1)
    return list(zip(x.split(32), y.split(32), strict=True))


def run(
    steps: int, resume: tuple[Any, ...] | None = None, momentum: float = 0.9, **options: Any
) -> tuple[rarefy.Sparsifier, torch.optim.Optimizer]:
    model = network(9 if resume else 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=momentum)
    given = {"sparsity": 0.7, "every": 60, "solves": 8, "calibration": classes()} | options
    start = 0
    if resume is not None:
        weights, opt_state, state = resume
        model.load_state_dict(weights)
        optimizer.load_state_dict(opt_state)
        given["state"], start = state, state["step"]
    sparse = rarefy.sparsify(model, "l1-prescribed", optimizer=optimizer, **given)
    data = classes()
    for step in range(start, steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        x, y = data[step % 4]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return sparse, optimizer


@pytest.mark.parametrize("parameters", ["per-layer", "one"])
def test_prescribed_counts_are_exact_at_the_end(parameters: str) -> None:
    sparse, _ = run(8 * 60 + 20, parameters=parameters)
    target = sparse.memory["target"]
    assert target == {"0.weight": 48, "4.weight": 19}
    assert sparse.nnz == 67
    if parameters == "per-layer":
        assert {n: layer.nnz for n, layer in sparse.layers.items()} == target
    assert_sparse(sparse)
    assert 1 <= len(sparse.memory["solves"]) <= 8
    assert "first" not in sparse.memory and "best" not in sparse.memory
    model = sparse.finalize()
    assert int(model[0].weight.count_nonzero()) + int(model[4].weight.count_nonzero()) <= 67


def test_every_solve_starts_from_the_first_weights_with_fresh_state() -> None:
    sparse, optimizer = run(60, tolerance=0.0, strength=5.0)
    assert sparse.memory["solves"] == [{"0.weight": 0, "4.weight": 0}]  # far above every gradient: nothing is left
    first = network()
    for name, parameter in sparse.model.named_parameters():
        assert torch.equal(parameter, first.get_parameter(name)), name
    assert torch.equal(sparse.model[1].running_mean, first[1].running_mean)
    assert all(not state for state in optimizer.state.values())
    assert set(sparse.memory["strength"].values()) == {5.0 / 4}
    assert sparse.nnz == sparse.numel  # no mask while it searches


def test_the_condition_holds_at_a_solution_and_not_after_thresholding() -> None:
    model, data = orthonormal()
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(12, 6).double(), nn.Tanh(), nn.Linear(6, 1).double())
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.01, momentum=0.9)
    sparse = rarefy.sparsify(
        wide,
        "l1-prescribed",
        optimizer=optimizer,
        calibration=[data],
        loss=squares,
        every=4000,
        strength=0.15,
        sparsity=0.5,
    )
    for _ in range(3999):
        optimizer.zero_grad()
        squares(wide, data).backward()
        optimizer.step()
    gradients = mean_gradients(sparse)
    kept = 0
    for name, layer in sparse.layers.items():
        assert L1(0.15).residual(layer.weight(), gradients[name]) < 1e-3
        kept += int(layer.weight().count_nonzero())
        on = gradients[name][layer.weight() != 0].abs()
        torch.testing.assert_close(on, torch.full_like(on, 0.15), rtol=1e-3, atol=0)
    assert 0 < kept < 78
    largest = next(iter(sparse.layers.values()))
    cut = torch.where(largest.weight().abs() > largest.weight().abs().median(), largest.weight(), 0.0) + 0.1
    assert L1(0.15).residual(cut, gradients[largest.name]) > 1e-2
    del model


def test_without_convergence_the_best_solve_is_kept() -> None:
    sparse, _ = run(60 * 3, solves=3, tolerance=0.0, strength=0.2, sparsity=0.9)
    solves = sparse.memory["solves"]
    target = sparse.memory["target"]
    assert len(solves) == 3
    off = [sum(abs(found[n] - target[n]) for n in target) for found in solves]
    best = solves[off.index(min(off))]
    assert {n: layer.nnz for n, layer in sparse.layers.items()} == target
    for name, layer in sparse.layers.items():
        assert int(layer.weight().count_nonzero()) == min(best[name], target[name])


@pytest.mark.parametrize("stop", [50, 130])
def test_a_resumed_search_is_the_one_that_was_not_stopped(stop: int) -> None:
    whole, _ = run(300, tolerance=0.0, solves=4)
    half, optimizer = run(stop, tolerance=0.0, solves=4)
    buffer = io.BytesIO()
    torch.save([half.model.state_dict(), optimizer.state_dict(), half.state_dict()], buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed, _ = run(300, resume=saved, tolerance=0.0, solves=4)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert whole.memory["solves"] == resumed.memory["solves"]
    assert [tuple(e) for e in whole.events] == [tuple(e) for e in resumed.events]
    with pytest.raises(OptionError, match="pass calibration"):
        run(300, resume=saved, tolerance=0.0, solves=4, calibration=None)


def test_mean_gradients_are_those_of_the_evaluated_model_and_leave_no_trace() -> None:
    sparse, _ = run(3)
    model, data = sparse.model, classes()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    got = mean_gradients(sparse)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.eval()
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), [model[0].weight, model[4].weight])
    for mine, theirs in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_bad_input_is_named_and_the_model_left_alone() -> None:
    for options in (
        {"allocation": "global"},
        {"parameters": "two"},
        {"strength": -1.0},
        {"solves": 0},
        {"every": 0},
        {"tolerance": 2.0},
    ):
        with pytest.raises(OptionError, match=next(iter(options))):
            rarefy.methods.make("l1-prescribed", **options)
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for match, given in (
        ("calibration", {"calibration": None}),
        ("list of batches or a DataLoader", {"calibration": iter(classes())}),
        ("less than one solve", {"total_steps": 10, "calibration": classes()}),
        ("no gradient", {"calibration": [(torch.zeros(4, 10), torch.zeros(4, dtype=torch.long))]}),
    ):
        with pytest.raises(OptionError, match=match):
            rarefy.sparsify(model, "l1-prescribed", **given)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_compressed_storage_solves_the_same(tolerance: float) -> None:
    """Kept values alone are a vector, and their gradients another; the search looks at both in the weight's shape."""
    masks, solves = [], []
    for storage in ("masked", "compressed"):
        model = network().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        data = [(x.double(), y) for x, y in classes()]
        options = {"sparsity": 0.7, "every": 30, "solves": 3, "tolerance": tolerance, "calibration": data}
        sparse = rarefy.sparsify(model, "l1-prescribed", optimizer=optimizer, storage=storage, **options)
        for step in range(100):
            torch.manual_seed(step)
            optimizer.zero_grad()
            F.cross_entropy(model(data[step % 4][0]), data[step % 4][1]).backward()
            optimizer.step()
        assert sparse.nnz == 67
        masks.append(sparse.masks())
        solves.append(sparse.memory["solves"])
    assert solves[0] == solves[1] and all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_the_search_ends_a_solve_before_the_run_does() -> None:
    """What is kept is still to be trained; and a step or two that a gradient scaler skips must not leave a dense network."""
    method = rarefy.methods.L1Prescribed(every=5, solves=3)
    assert [method.clock(total).last for total in (5, 9, 10, 14, 15, 20, 40)] == [5, 5, 5, 5, 10, 15, 15]
    sparse, _ = run(14, every=5, solves=3, total_steps=15, tolerance=0.0)
    assert sparse.nnz == 67 and len(sparse.memory["solves"]) == 2
    assert method.lr_step(9, 15) == (4, 5) and method.lr_step(12, 15) == (2, 5)
