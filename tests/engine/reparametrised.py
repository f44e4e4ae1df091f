"""Methods whose network computes with another weight than it trains, and a few steps of each."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

import rarefy
from rarefy.engine import Sparsifier
from tests.engine.common import backward, mlp

METHODS: dict[str, dict[str, Any]] = {
    "movement": dict(sparsity=0.8),
    "soft-movement": dict(threshold=0.4999, penalty_weight=50.0),
    "trainable-threshold": dict(alpha=0.05),
    "lottery-jackpots": dict(sparsity=0.8, stop=0.6),
    "ste": dict(pattern="1:4"),
    "sr-ste": dict(pattern="2:4", refine=0.05),
    "pgf mdgf": dict(pattern="1:4", recipe="mdgf-linear", coefficient=0.125),
    "pgf sdgf": dict(pattern="1:4", recipe="sdgf-stepwise"),
    "t-mask": dict(pattern="2:4t", every=3, refine=0.05),
    "bdwp": dict(pattern="2:4", refine=0.05),
    "bdwp bp_g": dict(pattern="1:4", mode="bp_g"),
}
BOTH_WAYS = ("t-mask", "bdwp")  # they leave the last layer: its 5 outputs are no multiple of 4


def named(case: str) -> str:
    """The method of a case."""
    return case.partition(" ")[0]


def make(
    method: str, seed: int = 0, optimizer: str = "Adam", **kwargs: Any
) -> tuple[nn.Sequential, torch.optim.Optimizer, Sparsifier]:
    model = mlp(seed)
    made = getattr(torch.optim, optimizer)(model.parameters(), **{"lr": 0.02, **kwargs})
    return (
        model,
        made,
        rarefy.sparsify(model, named(method), optimizer=made, total_steps=20, seed=seed, **METHODS[method]),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*begin again at 0")
        for step in steps:
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
