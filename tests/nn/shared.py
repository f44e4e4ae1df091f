"""Networks whose weights are shared, and how they are trained, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """An embedding, convolutions of every kind, and linear layers; x int [batch, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16, padding_idx=0)
        self.conv = nn.Conv2d(1, 8, 3, padding="same", padding_mode="circular")
        self.strided = nn.Conv2d(8, 8, 3, stride=2, dilation=2, padding=2, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 64, 20)
        self.head = nn.Linear(20, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.strided(F.relu(self.conv(self.embed(x)[:, None]))))
        return self.head(F.relu(self.hidden(y.flatten(1))))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(11, (6, 16), generator=generator), torch.randint(5, (6,), generator=generator)


def train(model: nn.Module, steps: int = 5, lr: float = 0.05, **options: Any) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
    outputs = []
    for step in range(steps):
        x, y = tokens(step)
        out = model(x)
        outputs.append(out.detach().clone())
        F.cross_entropy(out, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs
