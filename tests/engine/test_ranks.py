"""Two ranks with different data and different first weights keep the same masks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import rarefy
from rarefy.errors import OptionError

LOOKING = ("snip", "grasp", "synflow")
MOVING = ("rigl", "snfs", "gse", "srigl", "dsr", "deep-r", "top-kast")
TRAINED: dict[str, dict[str, object]] = {  # masks that follow from trained tensors
    "movement": {"sparsity": 0.7, "start": 0, "stop": 4},
    "trainable-threshold": {"alpha": 0.1},
    "lottery-jackpots": {"sparsity": 0.7},
    "sr-ste": {"pattern": "1:4", "refine": 0.01},
    "pgf": {"pattern": "1:4", "recipe": "sdgf-stepwise", "start": 1, "stop": 5},
    "bdwp": {"pattern": "2:4"},
    "t-mask": {"pattern": "2:4t", "every": 2},
}
OPTIONS: dict[str, dict[str, object]] = {"deep-r": {"l1": 0.05}, "gse": {"scope": "layer"}}
CASES = ("branches", "magnitude", *LOOKING, "compressed branches", "compressed magnitude")
# DistributedDataParallel cannot follow a parameter whose length changes: of compressed layers only those that keep theirs
CASES += (*MOVING, *(f"compressed {method}" for method in ("rigl", "gse", "deep-r", "top-kast")))
RESIZING: dict[str, dict[str, object]] = {
    **{method: {"every": 2} for method in ("dsr", "snfs", "srigl")},
    "gse": {"every": 2, "scope": "global"},
    "gradual": {"every": 2, "start": 1, "stop": 5},
    "magnitude": {"start": 3},
    "ac-dc": {"every": 2, "start": 0, "stop": 5},
}


class Branches(nn.Sequential):
    """Rank 0 and rank 1 take different branches: some layers see a gradient on one rank only, one on none."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 5), nn.Linear(12, 5), nn.Linear(12, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[dist.get_rank()](x)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for case in (*CASES, *TRAINED):
        torch.save(train(rank, case), f"{folder}/{case}-{rank}.pt")
    for method, options in RESIZING.items():
        torch.save(refused(rank, method, options), f"{folder}/{method} resizes-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes outlive the group, and abort where the interpreter is shut down under them


def train(rank: int, case: str) -> dict[str, dict[str, torch.Tensor]]:
    storage, case = ("compressed", case.split()[1]) if " " in case else ("masked", case)
    torch.manual_seed(rank)  # ranks that disagree until DistributedDataParallel shares rank 0's weights
    model = Branches() if case == "branches" else nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(10 + rank)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(8, 12, generator=generator), torch.randint(5, (8,), generator=generator)

    method = "rigl" if case == "branches" else case
    sparse = rarefy.sparsify(
        model,
        method,
        optimizer=optimizer,
        storage=storage,
        calibration=[batch()] if method in LOOKING else None,
        **TRAINED.get(method, {"sparsity": 0.7} | ({"every": 2} if method in MOVING else {}) | OPTIONS.get(method, {})),
    )
    wrapped = DistributedDataParallel(model, find_unused_parameters=case == "branches")
    for _ in range(6):
        x, y = batch()
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = sparse.masks()
    assert method not in MOVING or sparse.explored() > 1 - sparse.sparsity, f"{case} does not move"
    if storage == "compressed" or method in TRAINED:
        sparse.finalize()
    return {"masks": masks, "weights": model.state_dict()}


def refused(rank: int, method: str, options: dict[str, object]) -> dict[str, object]:
    """Train compressed layers until the method would change their length; what it said, and whether they are whole."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    sparse = rarefy.sparsify(model, method, optimizer=optimizer, storage="compressed", sparsity=0.7, **options)
    wrapped, said = DistributedDataParallel(model), ""
    for _ in range(6):
        x, before = torch.randn(8, 12), {name: layer.nnz for name, layer in sparse.layers.items()}
        F.cross_entropy(wrapped(x), torch.randint(5, (8,))).backward()
        try:
            optimizer.step()
        except OptionError as error:
            said = str(error)
            break
        optimizer.zero_grad()
    after = {name: layer.nnz for name, layer in sparse.layers.items()}
    return {"said": said, "same": before == after}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("case", [*CASES, *TRAINED])
def test_ranks_agree(case: str, results: Path) -> None:
    one, two = (torch.load(results / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in ("masks", "weights"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    assert all(not one["weights"][name][~mask].any() for name, mask in one["masks"].items())
    assert not all(mask.all() for mask in one["masks"].values())


@pytest.mark.parametrize("method", RESIZING)
def test_compressed_layers_keep_their_length_where_ranks_train(method: str, results: Path) -> None:
    one, two = (torch.load(results / f"{method} resizes-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one == two and one["same"]
    assert "weights here instead of" in one["said"] and 'use storage="masked"' in one["said"]
