"""Movement pruning against its equations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from rarefy.errors import AllocationError, OptionError
from tests.engine.common import backward, batch, mlp


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def test_scores_add_up_minus_weight_times_gradient_and_weights_follow_their_mask() -> None:
    """Plain SGD by hand in float64: S = -lr sum of W G; kept weights move by -lr G, dropped ones stand still."""
    torch.manual_seed(0)
    model = nn.Linear(8, 6, bias=False).double()
    w, scores, mask = model.weight.detach().clone(), torch.zeros(6, 8).double(), torch.ones(6, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, "movement", sparsity=0.75, optimizer=optimizer, total_steps=20)
    layer = sparse.layers["weight"]
    for step in range(1, 21):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).double()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        forward = (w * mask).requires_grad_()
        (g,) = torch.autograd.grad((F.linear(x, forward) - 1).square().sum(), forward)
        scores, w = scores - 0.1 * w * g, w - 0.1 * g * mask
        progress = min(max((step - 2) / 12, 0), 1)
        keep = int((1 - 0.75 * (1 - (1 - progress) ** 3)) * 48 + 0.5)
        if progress > 0:
            mask = torch.zeros(48).index_fill_(0, scores.flatten().topk(keep).indices, 1).view(6, 8)
        torch.testing.assert_close(layer.extras["scores"].detach(), scores, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.trained(), w, rtol=1e-10, atol=1e-12)
        assert torch.equal(layer.mask(), mask.bool()) and layer.nnz == keep
    assert sparse.nnz == 12


def test_it_keeps_what_moves_away_from_zero_and_not_what_is_large() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.2]]))  # the first shall become 0.5, the second 0.9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    sparse = rarefy.sparsify(model, "movement", sparsity=0.5, optimizer=optimizer, start=10, stop=12)
    for _ in range(12):
        x = torch.randn(64, 2)
        (model(x) - x @ torch.tensor([[0.5], [0.9]])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparse.layers["weight"].trained()[0, 0] > sparse.layers["weight"].trained()[0, 1]
    assert sparse.masks()["weight"].tolist() == [[False, True]]


@pytest.mark.parametrize("allocation", ["uniform", "erk", "global", {"0": 0.5, "*": 0.9}])
def test_every_step_has_exactly_the_sparsity_of_the_curve(allocation: object) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sparse = rarefy.sparsify(
        model, "movement", sparsity=0.9, optimizer=optimizer, total_steps=20, allocation=allocation
    )
    came_back = 0
    for step in range(1, 21):
        before = sparse.masks()
        train(model, optimizer, range(step, step + 1))
        done = 1 - (1 - min(max((step - 2) / 12, 0), 1)) ** 3
        for i, (name, layer) in enumerate(sparse.layers.items()):
            came_back += int((layer.mask() & ~before[name]).sum())
            if allocation == "uniform" or isinstance(allocation, dict):
                final = 0.5 if isinstance(allocation, dict) and i == 0 else 0.9
                assert layer.nnz == int((1 - final * done) * layer.numel + 0.5)
            scores = layer.extras["scores"].detach()
            if 0 < layer.nnz < layer.numel:
                assert scores[layer.mask()].min() >= scores[~layer.mask()].max()
        if not isinstance(allocation, dict):
            assert sparse.nnz == pytest.approx((1 - 0.9 * done) * sparse.numel, abs=2)
    assert came_back > 0


def test_one_ranking_over_all_layers_is_one_threshold() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(
        model, "movement", sparsity=0.8, optimizer=optimizer, total_steps=10, allocation="global", stop=0.5
    )
    train(model, optimizer, range(10))
    kept = torch.cat([layer.extras["scores"][layer.mask()] for layer in sparse.layers.values()])
    rest = torch.cat([layer.extras["scores"][~layer.mask()] for layer in sparse.layers.values()])
    assert kept.min() >= rest.max()
    assert len({round(layer.sparsity, 3) for layer in sparse.layers.values()}) == 3


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="lamp"):
        rarefy.methods.Movement(allocation="lamp")
    optimizer = torch.optim.SGD((model := mlp()).parameters(), lr=0.1)
    with pytest.raises(AllocationError):
        rarefy.sparsify(model, "movement", sparsity=0.9999, optimizer=optimizer, total_steps=10)
    for options in (dict(threshold=0.5), dict(threshold=0.0), dict(penalty_weight=-1.0)):
        with pytest.raises(OptionError):
            rarefy.methods.SoftMovement(**options)


def test_soft_movement_is_a_threshold_and_a_penalty_written_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparse = rarefy.sparsify(
        model, "soft-movement", optimizer=optimizer, total_steps=20, threshold=0.45, penalty_weight=6.0
    )
    scores = [torch.zeros(8, 6).double(), torch.zeros(3, 8).double()]
    for step in range(20):
        model(batch(step)[0][:, :6].double()).square().sum().mul(0.01).backward()
        weights = [layer.trained().clone() for layer in sparse.layers.values()]
        gradients = [layer.extras["scores"].grad.clone() for layer in sparse.layers.values()]
        optimizer.step()
        optimizer.zero_grad()
        tau = [0.45 * (1 - (1 - min(max((s - 2) / 12, 0), 1)) ** 3) for s in (step, step + 1)]
        for i, layer in enumerate(sparse.layers.values()):
            s = scores[i].sigmoid()
            scores[i] = scores[i] - gradients[i] - 6.0 * tau[0] / 0.45 / 2 / layer.numel * s * (1 - s)
            torch.testing.assert_close(layer.extras["scores"].detach(), scores[i], rtol=1e-10, atol=1e-12)
            kept = scores[i].sigmoid() > tau[1]
            assert torch.equal(layer.mask(), kept if kept.any() else scores[i] == scores[i].max())
            assert torch.equal(layer.weight(), layer.trained() * layer.mask())
            assert weights[i].count_nonzero() == layer.numel
    assert 0 < sparse.sparsity < 1


def test_soft_movement_keeps_half_a_percent_at_least() -> None:
    model = nn.Linear(40, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
    sparse = rarefy.sparsify(model, "soft-movement", optimizer=optimizer, total_steps=10, penalty_weight=1e4)
    for _ in range(10):
        (model(torch.randn(4, 40)).sum() * 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparse.nnz == int(0.005 * 400) + 1
