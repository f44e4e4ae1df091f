"""What every test gets: real data where it lies, one thread, and no tests marked `gpu` where there is no CUDA device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
if not os.environ.get("RAREFY_DATA") and _BESIDE.is_dir():
    os.environ["RAREFY_DATA"] = str(_BESIDE)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more threads, and threads that wait for each other on a busy machine lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compiler() -> Iterator[None]:
    """Compile anew, and leave nothing compiled: torch counts recompilations over all tests of a process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
