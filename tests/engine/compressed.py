"""Runs on masks and on kept values, to be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy import Sparsifier
from tests.engine.common import batch, mlp

Make = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)


def convnet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def images(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    "mlp": (mlp, batch),
    "convnet": (convnet, images),
}
METHODS: dict[str, dict[str, Any]] = {
    "static": {},
    "set": {"every": 10},
    "rigl": {"every": 10},
    "gradual": {"every": 15, "start": 20, "stop": 150, "allocation": "erk"},
    "magnitude": {"start": 40},
}


def train(
    net: str, storage: str, make: Make, method: str, steps: int, **options: Any
) -> tuple[Sparsifier, list[float], torch.optim.Optimizer]:
    model, data = NETS[net][0](), NETS[net][1]
    optimizer = make(model)
    sparse = rarefy.sparsify(
        model, method, optimizer=optimizer, storage=storage, total_steps=200, seed=3, **{"sparsity": 0.8} | options
    )
    dtype = next(model.parameters()).dtype
    batches = ((x.to(dtype), y) for x, y in map(data, range(steps)))
    return sparse, [step(sparse.model, optimizer, pair) for pair in batches], optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor]) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(data[0]), data[1])
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def assert_same_run(masked: tuple[Any, ...], compressed: tuple[Any, ...]) -> None:
    a, b = masked[0], compressed[0]
    assert a.nnz == b.nnz and a.explored() == b.explored() and a.events == b.events
    for name, mask in a.masks().items():
        assert torch.equal(mask, b.layers[name].mask()), name
        torch.testing.assert_close(a.layers[name].weight(), b.layers[name].weight(), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(masked[1]), torch.tensor(compressed[1]), rtol=0, atol=1e-4)
