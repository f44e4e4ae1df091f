"""How layers follow each other in a network, and networks made wider from outside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy import models
from rarefy.nn import widen_
from rarefy.nn.dataflow import follow


class Residual(nn.Module):
    """A small residual network with everything that must fit: sums, concatenation, flattening, a depthwise layer."""

    def __init__(self, head_bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm2 = nn.GroupNorm(1, 8)
        self.act = nn.PReLU(8)
        self.fc = nn.Linear(16 * 16, 12)
        self.norm3 = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5, bias=head_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = x + self.norm1(self.conv1(x))
        x = torch.cat([x, self.act(self.norm2(self.depthwise(x)))], 1)
        return self.head(self.norm3(self.fc(x.flatten(1))))


def image(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_stem_head_and_norms_are_seen() -> None:
    flow = follow(Residual(), image())
    assert flow.stem == {"stem"} and flow.head == {"head"}
    assert flow.norms == {"stem": "norm0", "conv1": "norm1"}
    assert flow.called == {"stem", "conv1", "depthwise", "fc", "head"}
    assert flow.shapes == [(2, 5)]


def test_a_norm_counts_only_where_it_alone_reads_the_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(self.norm(y)) + y

    flow = follow(Twice(), torch.randn(3, 4))
    assert flow.norms == {} and flow.head == {"a", "b"} and flow.stem == {"a"}


def test_every_reference_network_is_understood() -> None:
    x = torch.zeros(1, 3, 32, 32)
    for name, stem, head in (
        ("resnet-20", {"conv1"}, {"fc"}),
        ("vgg-19-bn", None, None),
        ("wrn-22-2", None, None),
        ("mobilenet-v2", None, None),
    ):
        flow = follow(models.build(name, width=0.25, num_classes=10), x)
        assert len(flow.stem) == len(flow.head) == 1
        assert stem is None or (flow.stem, flow.head) == (stem, head)
    gpt = models.build("gpt", width=0.25, num_classes=64, context=8)
    flow = follow(gpt, torch.zeros(1, 8, dtype=torch.int64))
    assert len(flow.head) == 1 and all("embed" in n or "position" in n or "token" in n for n in flow.stem)


def test_following_leaves_the_network_and_the_random_state_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    follow(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("factor", "width"), [(2**0.5, 90), (2.0, 128), (10**0.5, 202)])
def test_widths_of_the_paper(factor: float, width: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 10)
    )
    widen_(model, factor, torch.zeros(1, 3, 5, 5))
    assert model[0].weight.shape == (width, 3, 3, 3) and model[2].weight.shape == (width, width, 3, 3)
    assert model[1].running_mean.shape == (width,) and model[4].weight.shape == (10, width)


def test_a_widened_network_runs_trains_and_keeps_its_ends() -> None:
    torch.manual_seed(0)
    model = Residual()
    stem, head = model.stem, model.head
    widen_(model, 1.5, image())
    assert model.stem is stem and model.head is head
    assert model.stem.weight.shape == (12, 3, 3, 3) and model.depthwise.weight.shape == (12, 1, 3, 3)
    assert model.depthwise.groups == 12 and model.act.weight.shape == (12,) and model.norm3.normalized_shape == (18,)
    assert model.fc.weight.shape == (18, 24 * 16) and model.head.weight.shape == (5, 18)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(image()).square().sum().backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_outputs_keep_their_variance_and_constants_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 300), nn.BatchNorm1d(300), nn.Linear(300, 200))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[1].bias)
    x = torch.randn(500, 300)
    before = float(model[:2](x).var().detach())
    widen_(model, 2.0, x)
    assert float(model[:2](x).var().detach()) == pytest.approx(before, rel=0.1)
    assert not model[2].weight.any() and model[2].weight.shape == (600,) and not model[1].bias.any()


def test_factor_one_changes_nothing() -> None:
    model = Residual()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    widen_(model, 1.0, image())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Counts(nn.Module):
    """Counts its channels itself: cannot be widened from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).view(-1, 8 * 4))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


@pytest.mark.parametrize(
    ("model", "example", "match"),
    [
        (Counts(), torch.zeros(1, 3, 4, 4), "build it anew|instead of"),
        (Own(), torch.zeros(1, 3), "holds parameters"),
        (models.build("resnet-20", width=0.5), torch.zeros(1, 3, 8, 8), "build it anew"),  # its shortcuts pad channels
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 5), "does not run"),
    ],
)
def test_a_network_that_cannot_be_widened_is_left_as_it_was(model: nn.Module, example: Tensor, match: str) -> None:
    before = copy.deepcopy(model.state_dict())
    shapes = {n: dict(vars(m)) for n, m in model.named_modules()}
    with pytest.raises(rarefy.RarefyError, match=match):
        widen_(model, 1.5, example)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for name, module in model.named_modules():
        for key in ("in_channels", "out_channels", "in_features", "out_features", "num_features"):
            assert vars(module).get(key) == shapes[name].get(key)


def test_tied_and_idle_layers_are_refused() -> None:
    tied: Any = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    tied[2].weight = tied[0].weight
    with pytest.raises(rarefy.RarefyError, match="0 and 2 share a weight"):
        widen_(tied, 2.0, torch.tensor([[1, 2]]))
    idle = Residual()
    idle.unused = nn.Linear(3, 3)
    with pytest.raises(rarefy.RarefyError, match="does not reach unused"):
        widen_(idle, 2.0, image())
