"""Progress bars for one run and for many."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from rarefy.training.plan import Planned
from rarefy.training.pool import Notice


def _bar(console: Console, counter: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn(counter),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=5,
        expand=True,
        transient=True,
    )


class OneRun:
    """The bar of one training run; call it with (step, steps, latest numbers)."""

    def __init__(self, name: str, console: Console) -> None:
        self._progress = _bar(console, "{task.completed:.0f}/{task.total:.0f} steps{task.fields[latest]}")
        self._name = name
        self._task: TaskID | None = None

    def __enter__(self) -> OneRun:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, step: int, steps: int, latest: dict[str, float]) -> None:
        shown = "".join(f"  {name} {value:.4g}" for name, value in latest.items())
        if self._task is None:
            self._task = self._progress.add_task(self._name, total=steps, completed=step, latest=shown)
        self._progress.update(self._task, completed=step, latest=shown)


class ManyRuns:
    """One bar for a whole comparison, with the time left, and one for each run in progress; call it with notices."""

    def __init__(self, runs: Sequence[Planned], console: Console) -> None:
        self._console = console
        self._todo = sum(run.action != "skip" for run in runs)
        self._progress = _bar(console, "{task.fields[counter]}")
        self._all = self._progress.add_task("all runs", total=float(self._todo), counter=f"0/{self._todo} runs")
        self._running: dict[str, TaskID] = {}
        self._parts: dict[str, float] = {}
        self._done = 0
        self._said: set[str] = set()

    def __enter__(self) -> ManyRuns:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, notice: Notice) -> None:
        name = notice.name
        if notice.kind == "start":
            self._running[name] = self._progress.add_task(name, total=None, counter="")
        elif notice.kind == "step":
            self._parts[name] = notice.step / max(1, notice.steps)
            counter = f"{notice.step}/{notice.steps} steps"
            task = self._running.get(name)
            if task is not None:
                self._progress.update(task, total=notice.steps, completed=notice.step, counter=counter)
        elif notice.kind == "note":
            if notice.text not in self._said:  # every seed would say the same
                self._said.add(notice.text)
                self._print(f"note: {name}: {notice.text}", "yellow")
        else:
            self._end(notice)
        done = self._done + sum(self._parts.values())
        self._progress.update(self._all, completed=done, counter=f"{self._done}/{self._todo} runs")

    def _end(self, notice: Notice) -> None:
        self._done += notice.kind != "interrupted"
        self._parts.pop(notice.name, None)
        task = self._running.pop(notice.name, None)
        if task is not None:
            self._progress.remove_task(task)
        if notice.kind == "failed":
            self._print(f"failed: {notice.name}: {notice.text}", "red")
        elif not self._console.is_terminal:  # a log: bars are not drawn there
            self._print(f"{notice.kind}: {notice.name} ({self._done}/{self._todo})", "")

    def _print(self, text: str, style: str) -> None:
        self._progress.console.print(Text(text, style=style), soft_wrap=True)
