"""Two ranks with different data and different first weights keep the same masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import rarefy


def work(rank: int, folder: str, method: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)  # ranks that disagree until DistributedDataParallel shares rank 0's weights
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"every": 2} if method == "rigl" else {}
    generator = torch.Generator().manual_seed(10 + rank)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(8, 12, generator=generator), torch.randint(5, (8,), generator=generator)

    calibration = [batch()] if method == "snip" else None
    sparse = rarefy.sparsify(model, method, sparsity=0.7, optimizer=optimizer, calibration=calibration, **options)
    wrapped = DistributedDataParallel(model)
    for _ in range(6):
        x, y = batch()
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"masks": sparse.masks(), "weights": model.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["rigl", "magnitude", "snip"])
def test_ranks_agree(method: str, tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path), method), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in ("masks", "weights"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    assert all(not one["weights"][name][~mask].any() for name, mask in one["masks"].items())
