"""Counting FLOPs leaves the model as it was, and refuses what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rarefy.errors import ModelError, OptionError, SelectionError
from rarefy.metrics import flops


def test_the_model_is_left_as_it_was() -> None:
    class Counting(nn.Module):
        calls: torch.Tensor
        replaced: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("replaced", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.replaced = self.replaced + 1
            return x

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False), nn.Dropout(), Counting()
    )
    model[1].eval()  # a frozen norm in a model that trains
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    buffers = [id(b) for b in model.buffers()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    flops(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    assert flags == [module.training for module in model.modules()]
    assert buffers == [id(b) for b in model.buffers()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_a_model_that_fails_is_left_as_it_was_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))
    with pytest.raises(ModelError, match=r"Sequential does not run on the example input \(shapes \[\(2, 4\)\]\)"):
        flops(model, torch.randn(2, 4))
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert flops(model[0], torch.randn(2, 4)).dense == 32


def test_compiled_models_are_counted_as_their_originals() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert flops(torch.compile(model), torch.randn(2, 4)) == flops(model, torch.randn(2, 4))  # type: ignore[arg-type]


def test_masks_that_do_not_fit_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6)), torch.randn(2, 4)
    with pytest.raises(SelectionError, match=r"'0.wieght'.*did you mean '0.weight'"):
        flops(model, x, {"0.wieght": torch.ones(6, 4, dtype=torch.bool)})
    with pytest.raises(OptionError, match=r"'0.weight' has shape \(4, 6\), its parameter \(6, 4\)"):
        flops(model, x, {"0.weight": torch.ones(4, 6, dtype=torch.bool)})
    with pytest.raises(OptionError, match=r"'0.weight' must be a bool tensor.*float32"):
        flops(model, x, {"0.weight": torch.ones(6, 4)})
    with pytest.raises(OptionError, match="batch is 0"):
        flops(model, torch.randn(0, 4))
