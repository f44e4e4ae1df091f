"""Trainings that worker processes can import."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy import Sparsifier
from rarefy.search import Member, Training

STEPS = 12


def equal(a: Any, b: Any) -> bool:
    """Whether two results are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(16, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    )


def data(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 12, generator=generator)
    return x, (x[:, :5] + 0.3 * x[:, 5:10]).argmax(dim=1)


def steps(model: nn.Module, sparse: Sparsifier, order: range, seed: int, weight_decay: float = 0.01) -> dict[str, Any]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
    sparse.follow(optimizer)
    loss = torch.zeros(())
    for step in order:
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / STEPS))
        x, y = data(seed + step)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": float(loss.detach()), "steps": len(order), "threads": torch.get_num_threads()}


def train(model: nn.Module, sparse: Sparsifier, training: Training) -> dict[str, Any]:
    stop = STEPS if training.stop is None else training.stop
    return steps(model, sparse, range(training.start, stop), seed=0)


def retrain(model: nn.Module, sparse: Sparsifier, member: Member) -> dict[str, Any]:
    order = range(STEPS)
    return steps(model, sparse, order, member.seed % 1000, member.options.get("weight_decay", 0.01)) | {
        "process": os.getpid()
    }


def same(model: nn.Module, sparse: Sparsifier, member: Member) -> dict[str, Any]:
    """Every member is the same."""
    torch.manual_seed(0)
    return steps(model, sparse, range(STEPS), 0)


def draws(item: int) -> dict[str, Any]:
    """Everything that a member's numbers could depend on."""
    import random

    import numpy as np

    a = torch.randn(64, 64)
    return {
        "item": item,
        "random": random.random(),
        "numpy": float(np.random.rand()),
        "torch": torch.randn(3),
        "sum": (a @ a).softmax(dim=0).sum(),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
    }


def count_in(folder: str, item: int) -> int:
    """Leave a trace of the call; item 1 fails once."""
    trace = Path(folder) / f"called-{item}-{time.time_ns()}"
    trace.touch()
    if item == 1 and not (Path(folder) / "mended").exists():
        raise ValueError("item one is broken")
    return 10 * item


def fails_beside(folder: str, item: int) -> int:
    """Item 1 fails while item 0 is still running."""
    other = Path(folder) / "failing"
    if item == 1:
        other.touch()
        raise ValueError("item one is broken")
    while not other.exists():
        time.sleep(0.01)
    time.sleep(0.3)
    return 10 * item


def dies(item: int) -> int:
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def train_until_killed(
    folder: str, round: int, model: nn.Module, sparse: Sparsifier, training: Training
) -> dict[str, Any]:
    """Kill this process in the middle of a round, once."""
    marker = Path(folder) / "killed"
    if training.round == round and not marker.exists():
        marker.touch()
        steps(model, sparse, range(training.start, STEPS // 2), seed=0)
        os.kill(os.getpid(), signal.SIGKILL)
    return train(model, sparse, training)


def retrain_until_killed(folder: str, model: nn.Module, sparse: Sparsifier, member: Member) -> dict[str, Any]:
    """Kill the process that runs the search while member 1 of phase 2 trains, once."""
    import multiprocessing

    (Path(folder) / f"{member.phase}-{member.number}-{time.time_ns()}").touch()
    marker = Path(folder) / "killed"
    if (member.phase, member.number) == (2, 1) and not marker.exists():
        marker.write_text(str(os.getpid()))
        written = Path(folder) / "cut" / "phase-2" / "member-0.pt"
        for _ in range(400):  # the search may still be writing the member before
            if written.exists():
                break
            time.sleep(0.05)
        parent = multiprocessing.parent_process()
        os.kill(os.getpid() if parent is None else parent.pid or 0, signal.SIGKILL)
        time.sleep(60)
    return steps(model, sparse, range(STEPS), member.seed % 1000, member.options.get("weight_decay", 0.01))


def score(model: nn.Module) -> float:
    model.eval()
    x, y = data(77, 200)
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).double().mean())


def parent(seed: int) -> nn.Sequential:
    torch.manual_seed(seed % 2**31)
    return nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 5)
    )


def train_arm(model: nn.Module, sparse: Sparsifier | None, seed: int) -> dict[str, Any]:
    """Two epochs, scored after each."""
    curve = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    if sparse is not None:
        sparse.follow(optimizer)
    for epoch in range(2):
        model.train()
        for step in range(6):
            x, y = data(seed % 1000 + 6 * epoch + step)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        curve.append(score(model))
    return {"score": curve[-1], "curve": curve, "weights": {n: v.clone() for n, v in model.state_dict().items()}}
