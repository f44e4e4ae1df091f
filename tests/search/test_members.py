"""Members side by side: the same bits wherever they run, and nothing finished is lost."""

from __future__ import annotations

import random
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rarefy.errors import OptionError, StateError
from rarefy.search import MemberError, Workers, run_members
from tests.search.conftest import NEEDS_RAY
from tests.search.trainings import count_in, dies, draws, equal, fails_beside

SEEDS = [5, 6, 2**63 - 1]


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Ray's calls that are used, with tasks that run when they are waited for, last one first."""
    ray: Any = types.ModuleType("ray")
    state: dict[str, Any] = {"up": False, "asked": {}, "running": 0, "most": 0}

    class RayError(Exception):
        pass

    def remote(**asked: Any) -> Any:
        state["asked"] = asked

        def decorate(function: Any) -> Any:
            def call(*args: Any) -> Any:
                state["running"] += 1
                state["most"] = max(state["most"], state["running"])
                return partial(function, *args)

            return types.SimpleNamespace(remote=call)

        return decorate

    def wait(references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        state["running"] -= 1
        return references[-1:], references[:-1]

    # As Ray does: an argument that was put is unpacked when the task runs.
    ray.put = lambda value: value
    ray.get = lambda reference: reference()
    ray.init = lambda **options: state.update(up=True)
    ray.is_initialized = lambda: state["up"]
    ray.cluster_resources = lambda: {"CPU": 2.0, "GPU": 1.0}
    ray.remote, ray.wait, ray.state = remote, wait, state
    ray.exceptions = types.SimpleNamespace(RayError=RayError)
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


def test_every_backend_gives_the_same_bits(fake_ray: Any) -> None:
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    here = run_members(draws, [1, 2, 3], SEEDS, Workers("here"))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1:] == (random.getstate(), torch.get_num_threads())
    torch.manual_seed(99)
    np.random.seed(3)
    for workers in (Workers("processes", 2), Workers("ray", 2), Workers("ray"), Workers("here")):
        assert equal(here, run_members(draws, [1, 2, 3], SEEDS, workers)), workers
    assert here[0]["random"] != here[1]["random"] and not torch.equal(here[0]["torch"], here[1]["torch"])
    assert [result["item"] for result in here] == [1, 2, 3]
    assert fake_ray.state["asked"] == {"num_cpus": 1, "num_gpus": 0.0, "max_retries": 0} and fake_ray.state["most"] == 2


@NEEDS_RAY
def test_ray_itself_gives_the_same_bits() -> None:
    import ray

    here = run_members(draws, [1, 2, 3], SEEDS, Workers("here"))
    try:
        assert equal(here, run_members(draws, [1, 2, 3], SEEDS, Workers("ray")))
        with pytest.raises(MemberError, match=r"member 1.*its Ray worker failed"):
            run_members(dies, [0, 1], [0, 1], Workers("ray", 1))
        with pytest.raises(OptionError, match="too few for a member of 4096 threads"):
            run_members(draws, [1, 2], [1, 2], Workers("ray", threads=4096))
    finally:
        ray.shutdown()


def test_threads_and_dtype_reach_the_members() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        for workers in (Workers("here", threads=2), Workers("processes", 1, threads=2)):
            (result,) = run_members(draws, [1], [1], workers)
            assert result["threads"] == 2 and result["dtype"] == "torch.float64"
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("workers", [Workers("here"), Workers("processes", 1)])
def test_finished_members_are_kept_when_one_fails(workers: Workers, tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()
    job = partial(count_in, str(traces))
    with pytest.raises(MemberError, match=r"member 1 failed: (.|\n)*item one is broken"):
        run_members(job, [0, 1, 2], [0, 1, 2], workers, tmp_path / "kept")
    (traces / "mended").touch()
    assert run_members(job, [0, 1, 2], [0, 1, 2], workers, tmp_path / "kept") == [0, 10, 20]
    assert len(list(traces.glob("called-0-*"))) == 1, "a finished member was computed again"
    assert run_members(job, [0, 1, 2], [0, 1, 2], workers, tmp_path / "kept") == [0, 10, 20]
    assert len(list(traces.glob("called-1-*"))) == 2
    with pytest.raises(StateError, match=r"of another search: seed was 0 and is 7 now"):
        run_members(job, [0, 1, 2], [7, 1, 2], workers, tmp_path / "kept")
    (tmp_path / "kept" / "member-2.pt").write_bytes(b"half")
    with pytest.raises(StateError, match=r"member-2\.pt cannot be read"):
        run_members(job, [0, 1, 2], [0, 1, 2], workers, tmp_path / "kept")


def test_what_runs_beside_a_failure_is_kept(tmp_path: Path) -> None:
    job = partial(fails_beside, str(tmp_path))
    with pytest.raises(MemberError, match="item one is broken"):
        run_members(job, [0, 1], [0, 1], Workers("processes", 2), tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["member-0.pt"]


def test_a_worker_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(MemberError, match="a worker process died"):
        run_members(dies, [0, 1], [0, 1], Workers("processes", 1), tmp_path)
    assert (tmp_path / "member-0.pt").exists()


def test_what_cannot_be_sent_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="give a function of a module"):
        run_members(lambda item: item, [1], [1], Workers("processes"))
    assert run_members(lambda item: item, [1], [1], Workers("here")) == [1]
    with pytest.raises(MemberError, match="a result must be made of tensors"):
        run_members(lambda item: object(), [1], [1], Workers("here"))
    with pytest.raises(OptionError, match="did you mean 'processes'"):
        Workers("process")
    with pytest.raises(OptionError, match="2 members and 1 seeds"):
        run_members(draws, [1, 2], [1])
    with pytest.raises(OptionError, match="only Ray gives members GPUs"):
        Workers("processes", gpus=1)
    monkeypatch.setattr("rarefy.search.members.has_ray", lambda: False)
    with pytest.raises(OptionError, match=r"pip install 'rarefy\[ray\]'"):
        Workers("ray")
    assert Workers().chosen() == "processes" and Workers(count=1).chosen() == "here"


def test_a_member_cannot_change_what_the_next_one_gets() -> None:
    shared = {"calls": torch.zeros(1)}

    def change(item: dict[str, torch.Tensor]) -> float:
        item["calls"] += 1
        return float(item["calls"])

    assert run_members(change, [shared, shared], [0, 1], Workers("here")) == [1.0, 1.0]
    assert float(shared["calls"]) == 0
