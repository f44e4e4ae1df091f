"""Plans of sparse weights: one for each topology, also when several threads ask at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rarefy.kernels.plans import PlanCache


def topology(size: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(3, dtype=torch.int64), torch.zeros(size, dtype=torch.int32)


def test_a_plan_serves_one_topology_as_long_as_it_is_unchanged() -> None:
    cache, (crow, col), (other, columns) = PlanCache(), topology(4), topology(4)
    plan = cache.get(crow, col, "use", object)
    assert cache.get(crow, col, "use", object) is plan
    assert cache.get(crow, col, "another use", object) is not plan
    assert cache.get(other, columns, "use", object) is not plan
    col.add_(1)
    assert cache.get(crow, col, "use", object) is not plan


def test_the_oldest_plan_goes_first() -> None:
    cache, kept = PlanCache(2), [topology(size) for size in (1, 2, 3)]
    first, second = (cache.get(*t, "use", object) for t in kept[:2])
    assert cache.get(*kept[0], "use", object) is first
    cache.get(*kept[2], "use", object)
    assert len(cache) == 2 and cache.get(*kept[0], "use", object) is first
    assert cache.get(*kept[1], "use", object) is not second


@pytest.fixture
def restless() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_threads_share_a_cache() -> None:
    cache, kept = PlanCache(4), [topology(size) for size in range(1, 9)]
    wrong: list[BaseException] = []

    def ask(thread: int) -> None:
        try:
            for i in range(300):
                crow, col = kept[(7 * i + 3 * thread) % 8]
                assert cache.get(crow, col, "use", col.numel) == col.numel()
                cache.get(crow.clone(), col.clone(), "use", object)  # dies at once
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(cache) <= 4
