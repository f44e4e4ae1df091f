"""Many members side by side: in Ray where it is installed, in worker processes, or one after the other here."""

from __future__ import annotations

import copy
import importlib.util
import multiprocessing
import os
import pickle
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rarefy.errors import OptionError, RarefyError, nearest
from rarefy.search.stored import pack, read, unpack, write

BACKENDS = ("auto", "ray", "processes", "here")


class MemberError(RarefyError):
    """A member failed, or the process that it ran in died."""


@dataclass(frozen=True)
class Workers:
    """Where members run. The results are the same, bit for bit, whatever is chosen: seeds and threads are each member's own.

    Attributes:
        backend: "auto" (default): Ray where it is installed (`pip install 'rarefy[ray]'`), worker processes otherwise, and
            this process where `count` is 1; or "ray", "processes", "here".
        count: members at a time; None (default): as many as there are cores (in Ray: of the cluster) for their threads.
        threads: torch threads of each member. Default 1.
        gpus: GPUs, or a share of one, that Ray gives each member. Default 0. Worker processes see all GPUs.

    Raises OptionError for an unknown or missing backend.
    """

    backend: str = "auto"
    count: int | None = None
    threads: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise OptionError(
                f"backend={self.backend!r} is not known{nearest(self.backend, BACKENDS)}; it is one of {', '.join(BACKENDS)}."
            )
        if self.count is not None and self.count < 1:
            raise OptionError(f"count={self.count} must be at least one member at a time, or None.")
        if self.threads < 1:
            raise OptionError(f"threads={self.threads} must be at least 1.")
        if self.backend == "ray" and not has_ray():
            raise OptionError("Ray is not installed: pip install 'rarefy[ray]', or backend='processes'.")
        if self.gpus and self.chosen() != "ray":
            raise OptionError(
                f"gpus={self.gpus:g}: only Ray gives members GPUs of their own; leave it 0 for processes."
            )

    def chosen(self) -> str:
        """Return the backend that "auto" stands for here."""
        if self.backend != "auto":
            return self.backend
        return "here" if self.count == 1 else "ray" if has_ray() else "processes"

    def at_once(self, members: int, cores: float | None = None) -> int:
        """Return how many run at a time on that many cores."""
        fitting = int((cores or os.cpu_count() or 1) // self.threads)
        return max(1, min(members, self.count or fitting))


def has_ray() -> bool:
    """Whether Ray can be imported."""
    return "ray" in sys.modules or importlib.util.find_spec("ray") is not None


def run_members(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    seeds: Sequence[int],
    workers: Workers | None = None,
    folder: str | os.PathLike[str] | None = None,
    same: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Return [function(item) for item in items], computed side by side.

    Each call has its own copy of function and item, its own thread count and its own seed (Python's, NumPy's and torch's
    generators), and the default dtype and determinism settings of this process.

    Args:
        function: of one item; a function of a module, or a `functools.partial` of one (worker processes import it).
        items: what they work on; anything that can be pickled.
        seeds: one for each item, in [0, 2**63).
        workers: where; see `Workers`.
        folder: keep each result in a file there, whole or not at all, and do not compute again what is there. It
            belongs to one call with these seeds.
        same: plain values that must be those of the call that wrote the folder; tell here what function and items depend
            on.

    Returns:
        The results in the order of the items: tensors (on the CPU), numbers, strings, lists and dicts of these.

    Raises:
        MemberError: a member failed, or its process died. Nothing new was started then, and what was finished or
            running beside it is in the folder.
        StateError: a file in the folder is damaged, or of another seed or another `same`.
        OptionError: function or items cannot be sent to a worker.
    """
    workers = workers or Workers()
    if len(seeds) != len(items):
        raise OptionError(f"{len(items)} members and {len(seeds)} seeds: give each its own.")
    home = None if folder is None else Path(folder)
    results: dict[int, Any] = {}
    if home is not None:
        for i, seed in enumerate(seeds):
            found = read(home / f"member-{i}.pt", {**(same or {}), "seed": seed})
            if found is not None:
                results[i] = found["result"]
    todo = [i for i in range(len(items)) if i not in results]
    run = {"here": _here, "processes": _in_processes, "ray": _in_ray}[workers.chosen()]
    failed: MemberError | None = None
    for i, outcome in run(function, [(i, items[i], seeds[i]) for i in todo], workers) if todo else ():
        if isinstance(outcome, MemberError):
            failed = failed or outcome
            continue
        results[i] = unpack(outcome)
        if home is not None:
            write(home / f"member-{i}.pt", {**(same or {}), "seed": seeds[i], "result": results[i]})
    if failed is not None:
        raise failed
    return [results[i] for i in range(len(items))]


Job = tuple[int, Any, int]  # number, item, seed
# A backend starts nothing new after a failure, and still hands out what was running beside it.
Done = Iterator[tuple[int, "bytes | MemberError"]]


def _here(function: Callable[[Any], Any], jobs: Sequence[Job], workers: Workers) -> Done:
    for number, item, seed in jobs:
        outcome = _told(number, _member(*copy.deepcopy((function, item)), seed, _settings(workers.threads)))
        yield number, outcome
        if isinstance(outcome, MemberError):
            return


def _in_processes(function: Callable[[Any], Any], jobs: Sequence[Job], workers: Workers) -> Done:
    """A server that has only imported things is forked for each worker: safe where threads run here."""
    context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload([__name__])
    settings = _settings(workers.threads)
    try:  # as bytes: tensors would travel in shared memory, which dies with a worker
        tasks = [(number, pickle.dumps((function, item, seed, settings))) for number, item, seed in jobs]
    except Exception as error:  # pickle raises many kinds
        raise OptionError(
            f"the members cannot be sent to worker processes ({error}): give a function of a module, or a functools.partial "
            "of one, and items that can be pickled; or Workers('here')."
        ) from error
    with ProcessPoolExecutor(workers.at_once(len(jobs)), context, initializer=_leave_with_parent) as pool:
        waiting: dict[Future[bytes | str], int] = {pool.submit(_unpickled, task): number for number, task in tasks}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    number = waiting.pop(future)
                    outcome = _result(number, future)
                    yield number, outcome
                    if isinstance(outcome, MemberError):
                        waiting = {later: n for later, n in waiting.items() if not later.cancel()}
        finally:
            for future in waiting:
                future.cancel()


def _in_ray(function: Callable[[Any], Any], jobs: Sequence[Job], workers: Workers) -> Done:
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    have = ray.cluster_resources()
    if have.get("CPU", 0) < workers.threads or have.get("GPU", 0) < workers.gpus:
        raise OptionError(
            f"the Ray cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs: too few for a member of "
            f"{workers.threads} threads and {workers.gpus:g} GPUs."
        )
    task = ray.remote(num_cpus=workers.threads, num_gpus=workers.gpus, max_retries=0)(_member)
    shared, settings = ray.put(function), _settings(workers.threads)
    todo, running = list(jobs), dict[Any, int]()
    room = workers.at_once(len(jobs), have.get("CPU"))
    while todo or running:
        while todo and len(running) < room:
            number, item, seed = todo.pop(0)
            running[task.remote(shared, item, seed, settings)] = number
        done, _ = ray.wait(list(running), num_returns=1)
        number = running.pop(done[0])
        try:
            outcome = _told(number, ray.get(done[0]))
        except ray.exceptions.RayError as error:
            outcome = MemberError(f"member {number}: its Ray worker failed: {error}")
        if isinstance(outcome, MemberError):
            todo.clear()
        yield number, outcome


def _unpickled(task: bytes) -> bytes | str:
    return _member(*pickle.loads(task))


def _member(function: Callable[[Any], Any], item: Any, seed: int, settings: dict[str, Any]) -> bytes | str:
    """One member's call: the packed result, or what went wrong as text (not every exception can be sent)."""
    with _as_set(seed, settings):
        try:
            return pack(function(item))
        except RarefyError as error:
            return str(error)
        except Exception:
            return traceback.format_exc()


def _result(number: int, future: Future[bytes | str]) -> bytes | MemberError:
    try:
        return _told(number, future.result())
    except BrokenProcessPool:
        return MemberError(
            "a worker process died: was it killed, or was there too little memory? Finished members are "
            "kept where a folder was given; the same call goes on from there."
        )


def _told(number: int, outcome: bytes | str) -> bytes | MemberError:
    return MemberError(f"member {number} failed: {outcome}") if isinstance(outcome, str) else outcome


def _settings(threads: int) -> dict[str, Any]:
    """What decides a member's numbers beside its seed."""
    return {
        "threads": threads,
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
    }


@contextmanager
def _as_set(seed: int, settings: dict[str, Any]) -> Iterator[None]:
    before = _settings(torch.get_num_threads())
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            _apply(settings)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
        finally:
            _apply(before)
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def _apply(settings: dict[str, Any]) -> None:
    torch.set_num_threads(settings["threads"])
    torch.set_default_dtype(settings["dtype"])
    torch.use_deterministic_algorithms(settings["deterministic"])
    torch.set_float32_matmul_precision(settings["matmul"])


def _leave_with_parent() -> None:
    """End this worker when its parent is killed: the pool's own queue would leave it waiting for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
