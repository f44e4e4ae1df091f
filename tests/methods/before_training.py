"""Networks and helpers of the tests of pruning before training."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

import rarefy
from tests.engine.common import batch


def chain(widths: list[int], bias: bool = False, seed: int = 0) -> nn.Sequential:
    """An MLP with ReLU between its layers, in float64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(a, b, bias=bias)]
    return nn.Sequential(*layers).double()


def doubles(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    x, y = batch(seed, size)
    return x.double(), y


def looked_at(
    model: nn.Module, calibration: list[Any], method: str | rarefy.methods.Method = "dense", **options: Any
) -> rarefy.Sparsifier:
    """A sparsifier whose calibration data can still be asked."""
    sparse = rarefy.sparsify(model, method, calibration=calibration, **options)
    sparse.calibration = calibration
    return sparse


def top(scores: dict[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Masks of the `keep` largest of all scores, ties to the lower index, by a sort."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:keep]] = True
    parts = chosen.split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)
