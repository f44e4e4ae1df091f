"""Optimizer state of dropped and grown weights: it must be as if the weight had never been trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def fresh_value(optimizer: Optimizer, group: dict[str, Any], key: str) -> float:
    """Return what a per-element state tensor holds for a weight that has never moved: 0, but for two optimizers."""
    if isinstance(optimizer, torch.optim.Rprop) and key == "step_size":
        return float(group["lr"])
    if isinstance(optimizer, torch.optim.Adagrad) and key == "sum":
        return float(group["initial_accumulator_value"])
    return 0.0


class Optimizers:
    """The user's optimizers, looked up afresh at every call: parameters and groups may be added at any time."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.all = list(optimizers)

    def owners(self) -> dict[int, Optimizer]:
        """Return which optimizer holds each parameter, by the parameter's id."""
        return {id(p): optimizer for optimizer in self.all for group in optimizer.param_groups for p in group["params"]}

    @torch.no_grad()
    def refresh(self, parameter: nn.Parameter, where: Tensor) -> None:
        """Set every per-element state tensor of `parameter` to its fresh value wherever `where` (bool) is True."""
        for optimizer, group in self._groups(parameter):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(where.to(value.device), fresh_value(optimizer, group, key))

    def _groups(self, parameter: nn.Parameter) -> Iterator[tuple[Optimizer, dict[str, Any]]]:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                if any(p is parameter for p in group["params"]):
                    yield optimizer, group
