"""Progressive gradient flow: its timeline, its two gradients, its frames."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.errors import OptionError, PatternError
from rarefy.methods import make
from rarefy.metrics import flops, training_flops
from tests.engine.common import backward, mlp


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False)).double()


def data(seed: int) -> Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(
    ("pattern", "stepwise", "geometric"),
    [
        ("1:8", "7:8 4:8 2:8 1:8", "8:64 4:32 2:16 1:8"),
        ("2:8", "7:8 4:8 2:8", "16:64 8:32 4:16 2:8"),
        ("1:16", "15:16 8:16 4:16 2:16 1:16", "8:128 4:64 2:32 1:16"),
        ("1:32", "31:32 16:32 8:32 4:32 2:32 1:32", "8:256 4:128 2:64 1:32"),
        ("1:4@0", "3:4@0 2:4@0 1:4@0", "8:32@0 4:16@0 2:8@0 1:4@0"),
        ("4:4", "4:4", "32:32 16:16 8:8 4:4"),
    ],
)
def test_frames(pattern: str, stepwise: str, geometric: str) -> None:
    for recipe, expected in (("sdgf-stepwise", stepwise), ("sdgf-geometric", geometric), ("mdgf-linear", pattern)):
        frames = make("pgf", pattern=pattern, recipe=recipe).frames
        assert " ".join(map(str, frames)) == expected
        if recipe == "sdgf-stepwise" and frames[0].n < frames[0].m and pattern.startswith(("1", "2")):
            assert len(frames) == math.floor(math.log2(frames[-1].m / frames[-1].n)) + 1


def timeline(recipe: str, steps: int = 100) -> tuple[rarefy.Sparsifier, list[tuple[float, int, int]]]:
    """Beta, the frame and the kept weights that each of the forward passes computes with."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    sparse = rarefy.sparsify(model, "pgf", pattern="1:8", recipe=recipe, optimizer=optimizer, total_steps=100)
    layer = sparse.layers["0.weight"]
    seen = []
    for step in range(steps):
        forward = model[0].weight.detach()
        seen.append((float(layer.settings["beta"]), int(layer.settings["frame"]), int(forward.count_nonzero())))
        optimizer.zero_grad()
        model(data(step)).square().sum().backward()
        optimizer.step()
    return sparse, seen


def test_the_linear_timeline() -> None:
    sparse, seen = timeline("mdgf-linear")
    betas = [beta for beta, _, _ in seen]
    assert betas[:6] == [1.0] * 6, "dense for 5 steps, and beta(0) = 1"
    assert betas[15] == pytest.approx(1 - 10 / 60) and betas[64] > 0 and betas[65] == 0, "0 at j = 0.6 T"
    assert [kept for _, _, kept in seen] == [128] * 65 + [16] * 35
    sparse.finalize()
    assert sparse.sparsity == 1 - 1 / 8


@pytest.mark.parametrize("length", [49, 98, 237])
def test_the_linear_decay_ends_at_zero_and_on_time(length: int) -> None:
    options: dict[str, Any] = dict(recipe="mdgf-linear", coefficient=1 / length, start=3, stop=900)
    sparse = rarefy.sparsify(net(), "pgf", pattern="1:4", **options)
    assert isinstance(sparse.method, rarefy.methods.PGF)
    betas = [sparse.method.stage(sparse, step)[0] for step in range(3 + length + 2)]
    assert betas[2:5] == [1.0, 1.0, 1 - 1 / length] and betas[-3] > 0.5 / length and betas[-2:] == [0.0, 0.0]


def test_the_exponential_timeline() -> None:
    _, seen = timeline("mdgf-exponential")
    betas = [beta for beta, _, _ in seen]
    halving = math.log(2) / (math.log(150) / 60)
    assert betas[5] == 1 and betas[65] == pytest.approx(1 / 150) and betas[89] > 0
    assert betas[20] / betas[32] == pytest.approx(2 ** (12 / halving), rel=1e-5)
    assert betas[90:] == [0.0] * 10, "the last tenth is fine-tuned under a hard mask"


@pytest.mark.parametrize("recipe", ["sdgf-stepwise"])
def test_the_frames_are_of_equal_length_and_the_last_one_starts(recipe: str) -> None:
    _, seen = timeline(recipe)
    assert [kept for _, _, kept in seen[:5]] == [128] * 5
    kept = [kept for _, _, kept in seen[5:90]]
    assert sorted({kept.index(k) for k in kept}) == [0, 22, 43, 64]
    assert [kept[i] for i in (0, 22, 43, 64)] == [112, 64, 32, 16]
    assert {beta for beta, _, _ in seen[5:]} == {0.0} and {k for _, _, k in seen[90:]} == {16}


def test_each_frame_keeps_n_of_its_own_m_geometrically() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(
        model, "pgf", pattern="2:8", recipe="sdgf-geometric", optimizer=optimizer, total_steps=8, start=0, stop=1.0
    )
    for m in (64, 64, 32, 32, 16, 16, 8, 8):
        blocks = (model.weight != 0).view(-1, m).sum(1)
        assert (blocks == m // 4).all()
        if m > 8:
            assert not ((model.weight != 0).view(-1, m // 2).sum(1) == m // 8).all()
        optimizer.zero_grad()
        model(torch.randn(4, 64)).square().sum().backward()
        optimizer.step()
    assert sparse.sparsity == 0.75


@pytest.mark.parametrize("gradient", ["ste", "scaled"])
@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
def test_gradients_of_both_readings(gradient: str, beta: float) -> None:
    model, twin = net(), net()
    sparse = rarefy.sparsify(model, "pgf", pattern="1:4", gradient=gradient, recipe="mdgf-linear", total_steps=100)
    loss = 0
    expected = []
    x = data(0)
    for i, name in ((0, "0.weight"), (2, "2.weight")):
        layer = sparse.layers[name]
        layer.settings["beta"].fill_(beta)
        weight = twin[i].weight
        mask = layer.pattern.project(weight.detach().abs(), 1)
        b = float(torch.tensor(beta))  # float32, as the buffer
        if gradient == "scaled":
            forward = weight * (mask + b * ~mask)
        else:
            value = weight.detach() * (mask + b * ~mask)
            forward = value + weight - weight.detach()
        expected.append(forward)
        torch.testing.assert_close(model[i].weight, weight * (mask + b * ~mask), rtol=1e-14, atol=0)
    y = torch.tanh(x @ expected[0].T) @ expected[1].T
    loss = y.square().sum()
    loss.backward()
    model(x).square().sum().backward()
    for i in (0, 2):
        mine = model[i].parametrizations.weight.original.grad
        torch.testing.assert_close(mine, twin[i].weight.grad, rtol=1e-9, atol=1e-9)


def test_beta_one_is_dense_and_beta_zero_is_ste() -> None:
    for recipe, same in (("dense", "dense"), ("zero", "ste")):
        states = []
        for method in ("pgf", same):
            model = net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            options = {} if method == "dense" else {"pattern": "1:8"}
            if method == "pgf":
                options |= {"start": 20, "stop": 20} if recipe == "dense" else {"start": 0, "stop": 0}
                options["total_steps"] = 20
            sparse = rarefy.sparsify(model, method, optimizer=optimizer, **options)
            for step in range(12):
                optimizer.zero_grad()
                model(data(step)).square().sum().backward()
                optimizer.step()
            sparse.finalize()
            states.append(model.state_dict())
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_training_flops_are_dense_until_beta_is_zero() -> None:
    sparse, _ = timeline("mdgf-linear")
    report = flops(net(), torch.zeros(1, 16, dtype=torch.float64))
    counted = training_flops(report, sparse.training_cost(), samples_per_step=1)
    r = 1 / 8
    assert counted.ratio == pytest.approx(0.65 + 0.35 * (1 + 2 * r) / 3)  # WU is dense to the end
    assert [cost.kept_steps for cost in sparse.training_cost().values()] == [65 * n + 35 * n // 8 for n in (128, 64)]


def test_a_state_is_resumed_within_a_frame() -> None:
    whole, parts = [], []
    for cut in (None, 37):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        sparse = rarefy.sparsify(
            model, "pgf", pattern="1:8", recipe="sdgf-stepwise", optimizer=optimizer, total_steps=100
        )
        for step in range(60):
            if step == cut:
                state, weights, inside = sparse.state_dict(), model.state_dict(), optimizer.state_dict()
                model = net()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
                sparse = rarefy.sparsify(model, sparse.method, optimizer=optimizer, total_steps=100, state=state)
                model.load_state_dict(weights)
                optimizer.load_state_dict(inside)
                assert int(sparse.layers["0.weight"].settings["frame"]) == 1
            optimizer.zero_grad()
            model(data(step)).square().sum().backward()
            optimizer.step()
        (whole if cut is None else parts).append(model.state_dict())
    assert all(torch.equal(value, parts[0][name]) for name, value in whole[0].items())


def test_averaged_models_follow_the_schedule() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(
        model, "pgf", pattern="1:4", recipe="sdgf-stepwise", optimizer=optimizer, total_steps=10, stop=0.5
    )
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(10):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    rarefy.nn.bake_(average)
    assert average.module[0].weight.count_nonzero() == sparse.layers["0.weight"].nnz == 48


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match="mdgf-linear"):
        make("pgf", recipe="mdgf-liner")
    with pytest.raises(OptionError, match="gradient"):
        make("pgf", gradient="none")
    with pytest.raises(OptionError, match="stop=None"):
        make("pgf", stop=None)
    with pytest.raises(OptionError, match="kind NM"):
        make("pgf", pattern="channel", sparsity=0.5)
    with pytest.raises(OptionError, match="total_steps"):
        rarefy.sparsify(net(), "pgf", start=1, stop=5)
    rarefy.sparsify(net(), "pgf", start=1, stop=5, coefficient=0.1)
    model = net()
    with pytest.raises(PatternError, match=r"0\.weight \[8, 16\]: 8:32"):
        rarefy.sparsify(model, "pgf", pattern="1:4", recipe="sdgf-geometric", total_steps=9, include="0")
    assert list(model.state_dict()) == ["0.weight", "2.weight"]
    wide = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 4))
    sparse = rarefy.sparsify(wide, "pgf", pattern="1:8", recipe="sdgf-geometric", total_steps=9)
    assert [*sparse.layers] == ["0.weight"], "a layer that one frame does not fit stays dense"
