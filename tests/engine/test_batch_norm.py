"""Batch-norm statistics that follow a change of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rarefy.engine.batch_norm import feed, follow_change, recalibrate
from rarefy.errors import ModelError, OptionError


def build() -> tuple[nn.Sequential, list[torch.Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5))
    with torch.no_grad():
        for _ in range(200):
            net(2 * torch.randn(50, 4) + 1)
    return net.eval(), [torch.randn(20, 4) for _ in range(2)]


def test_unchanged_weights_keep_their_statistics_on_any_data() -> None:
    net, batches = build()
    other = follow_change(copy.deepcopy(net), net, batches)
    for old, new in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(new, old)
    assert int(other[1].num_batches_tracked) == 200
    assert not other.training


def test_a_scaled_and_shifted_layer_is_followed_exactly() -> None:
    """Inputs of the first norm become a x + b, whatever the data: mean a m + b, variance a^2 v; and the outputs stay."""
    net, batches = build()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight *= 3
        other[0].bias.mul_(3).add_(0.5)
    wanted = other[1].running_mean * 3 + 0.5, other[1].running_var * 9
    follow_change(other, net, batches)
    # the mean is shifted by what the batches say, (3 - 1) times their own mean + 0.5; the variance is exact
    own = torch.stack([net[0](x).mean(0) for x in batches]).mean(0)
    torch.testing.assert_close(other[1].running_mean, net[1].running_mean + 2 * own + 0.5)
    torch.testing.assert_close(other[1].running_var, wanted[1])
    # what reads normalised values in training mode is not moved
    torch.testing.assert_close(other[4].running_mean, net[4].running_mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other[4].running_var, net[4].running_var, rtol=1e-4, atol=1e-4)


def test_a_channel_that_no_longer_varies_keeps_its_variance() -> None:
    net, batches = build()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight[2] = 0
    follow_change(other, net, batches)
    assert float(other[1].running_var[2]) == pytest.approx(float(net[1].running_var[2]))
    assert all(bool(torch.isfinite(t).all()) for t in other.state_dict().values())


def test_without_statistics_or_data() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    assert follow_change(net, copy.deepcopy(net), [torch.randn(3, 4)]) is net
    net, _ = build()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(OptionError, match="at least one batch"):
        follow_change(net, copy.deepcopy(net), [])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


@pytest.mark.parametrize("bad", [torch.randn(1, 4), torch.randn(5, 3), "text"])
def test_a_batch_that_fails_leaves_statistics_and_modes(bad: object) -> None:
    net, batches = build()
    net[1].train()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ModelError, match=r"Sequential does not run on batch 2 .* two values or more"):
        recalibrate(net, [*batches, bad])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert [m.training for m in net] == [False, True, False, False, False] and net[1].momentum == 0.1


class Counting(nn.Module):
    """Counts its calls, and holds a buffer that cannot be written to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("wide", torch.ones(4).expand(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.norm(x)


def test_other_buffers_stay() -> None:
    net = Counting()
    for _ in range(3):
        recalibrate(net, [torch.randn(9, 4) + 2])
    assert int(net.calls) == 0 and float(net.norm.running_mean.min()) > 1 and net.training
    assert int(net.norm.num_batches_tracked) == 1


def test_what_a_batch_may_be() -> None:
    def model(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * scale

    x = torch.ones(2)
    assert feed(model, x).tolist() == feed(model, (x, None)).tolist() == [1.0, 1.0]  # type: ignore[arg-type]
    assert feed(model, {"x": x, "scale": 3.0}).tolist() == [3.0, 3.0]  # type: ignore[arg-type]
