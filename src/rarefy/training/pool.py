"""Many runs, one after the other here, or side by side in worker processes that stay warm."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from rarefy.errors import RarefyError
from rarefy.training.folder import RunFolder
from rarefy.training.plan import Planned
from rarefy.training.signals import Interrupted


@dataclass(frozen=True)
class Notice:
    """What happened to a run: "start", "step" (step of steps), "note" (text), "finished", "failed" or "interrupted"."""

    kind: str
    name: str
    step: int = 0
    steps: int = 0
    text: str = ""


Notify = Callable[[Notice], None]

GRACE_SECONDS = 60.0  # for workers to write their checkpoints when asked to stop


def run_here(runs: Sequence[Planned], threads: int | None, notify: Notify) -> None:
    """Do the runs one after the other in this process; a failing one does not stop the rest.

    Raises Interrupted when one was stopped from outside.
    """
    for run in runs:
        notify(Notice("start", run.name))
        end = _one(run, threads, notify)
        notify(end)
        if end.kind == "interrupted":
            raise Interrupted(end.text)


def _one(run: Planned, threads: int | None, notify: Notify) -> Notice:
    from rarefy.training.loop import train

    def report(step: int, steps: int, latest: dict[str, float]) -> None:
        notify(Notice("step", run.name, step, steps))

    try:
        with _warnings_as_notes(run.name, notify):
            resume = run.action == "resume"
            train(run.config, run.folder, resume=resume, force=not resume, threads=threads, report=report)
    except Interrupted as error:
        return Notice("interrupted", run.name, text=str(error))
    except RarefyError as error:
        return Notice("failed", run.name, text=str(error))
    except Exception as error:
        return Notice("failed", run.name, text=f"{type(error).__name__}: {error}")
    return Notice("finished", run.name)


@contextmanager
def _warnings_as_notes(name: str, notify: Notify) -> Iterator[None]:
    """Hand warnings on, so that they appear above a progress bar and not through it."""

    def show(message: Warning | str, *rest: Any, **more: Any) -> None:
        notify(Notice("note", name, text=str(message)))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def run_in_workers(runs: Sequence[Planned], jobs: int, threads: int | None, notify: Notify) -> None:
    """Do the runs in `jobs` processes, each with `threads` torch threads; numbers are those of `run_here`.

    A process does many runs, so Python and torch are started once. One that dies (out of memory) costs its run only.
    Raises Interrupted when SIGINT or SIGTERM came: every run in progress then has written its checkpoint.
    """
    todo, workers = deque(runs), [_Worker(threads) for _ in range(min(jobs, len(runs)))]
    stopped = False
    with _sigterm_as_interrupt():
        try:
            _serve(workers, todo, threads, notify)
        except KeyboardInterrupt:
            stopped = True
            for worker in workers:
                worker.stop()
            deadline = time.monotonic() + GRACE_SECONDS
            todo.clear()
            with contextlib.suppress(KeyboardInterrupt):  # asked twice: leave them their last checkpoints
                _serve(workers, todo, threads, notify, deadline)
        finally:
            for worker in workers:
                worker.end()
    if stopped:
        raise Interrupted("stopped from outside")


def _serve(
    workers: list[_Worker], todo: deque[Planned], threads: int | None, notify: Notify, deadline: float | None = None
) -> None:
    for worker in workers:
        if worker.run is None and todo:
            worker.give(todo.popleft(), notify)
    while busy := [worker for worker in workers if worker.run is not None]:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if left == 0.0:
            return
        ready = wait([worker.pipe for worker in busy], left)
        for worker in busy:
            if worker.pipe not in ready:
                continue
            run = worker.run
            assert run is not None
            try:
                notice: Notice = worker.pipe.recv()
            except (EOFError, OSError):
                code = worker.died()
                error = f"its process died (exit code {code}); was there enough memory?"
                RunFolder(run.folder).write_result({**_who(run), "status": "failed", "error": error})
                notice = Notice("failed", run.name, text=error)
                workers[workers.index(worker)] = worker = _Worker(threads)
            notify(notice)
            if notice.kind in ("finished", "failed", "interrupted"):
                worker.run = None
                if todo:
                    worker.give(todo.popleft(), notify)


def _who(run: Planned) -> dict[str, Any]:
    c = run.config
    return {"method": c.method, "label": c.shown(), "sparsity_asked": c.sparsity, "seed": c.seed, "model": c.model}


class _Worker:
    """One process and our end of its pipe."""

    def __init__(self, threads: int | None) -> None:
        # A server that has only imported things is forked: safe where threads run here, and quicker than a new Python.
        context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
        if sys.platform != "win32":
            context.set_forkserver_preload(["rarefy.training.loop"])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.run: Planned | None = None

    def give(self, run: Planned, notify: Notify) -> None:
        self.run = run
        notify(Notice("start", run.name))
        with contextlib.suppress(OSError):  # dead: the next read tells
            self.pipe.send(run)

    def stop(self) -> None:
        if self.run is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGINT)

    def died(self) -> int | None:
        self.process.join(5)
        self.pipe.close()
        code: int | None = self.process.exitcode
        return code

    def end(self) -> None:
        if not self.pipe.closed:
            self.pipe.close()  # an idle worker leaves when its pipe ends
        self.process.join(2)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(2)


def _work(pipe: Connection, threads: int | None) -> None:
    """The life of a worker: do one run after the other until the pipe ends."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the parent alone, which passes it on once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between runs; a run has its own handler

    def notify(notice: Notice) -> None:
        try:
            pipe.send(notice)
        except OSError:  # the parent is gone
            raise Interrupted("the comparison has ended") from None

    while True:
        try:
            run: Planned = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            notify(_one(run, threads, notify))
        except Interrupted:
            return


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Make SIGTERM what Ctrl-C is, for a block in the main thread."""

    def handle(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
