"""Run a whole comparison, and run it again until it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rarefy._files import atomic_write
from rarefy.training.plan import CompareConfig, Planned, decide, expand, plain
from rarefy.training.pool import Notice, Notify, run_here, run_in_workers

PLANNED = "planned.json"
"""Names of all runs of a comparison: a report tells from it which are missing."""


@dataclass
class Outcome:
    """What became of a comparison's runs, by name."""

    folder: Path
    finished: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def compare(
    config: CompareConfig,
    folder: str | Path | None = None,
    *,
    force: bool = False,
    jobs: int | None = None,
    threads: int | None = None,
    on_plan: Callable[[list[Planned]], None] | None = None,
    notify: Notify | None = None,
    source: str = "the comparison",
) -> Outcome:
    """Run methods x sparsities (or patterns) x seeds into one folder, each in a run folder `<method>-<sparsity>-s<seed>`.

    Finished runs of the same configuration are skipped, interrupted ones continued, failed ones tried again.

    Args:
        config: what to compare.
        folder: where to; default `config.out`, else runs/<name>.
        force: run again what was run with another configuration.
        jobs: processes; default `config.jobs`. Each gets an equal share of the threads.
        threads: torch threads in all; default the configuration's, else one per core.
        on_plan: called once with the runs and what will be done about each.
        notify: called with every `Notice`.

    Raises:
        ConfigError: the comparison cannot be run as asked; nothing was run.
        Interrupted: it was stopped; the same call continues it.
    """
    home = Path(folder or config.out or Path("runs") / (config.name or "comparison"))
    runs = decide(expand(config, home, source), force)
    with atomic_write(home / "compare.yaml", "w") as file:  # it can be given to `rarefy compare` again
        file.write(yaml.safe_dump(dict(plain(config)), sort_keys=False))
    with atomic_write(home / PLANNED, "w") as file:
        file.write(json.dumps([run.name for run in runs]))
    if on_plan is not None:
        on_plan(runs)
    outcome = Outcome(home, skipped=[run.name for run in runs if run.action == "skip"])

    def note(notice: Notice) -> None:
        if notice.kind == "finished":
            outcome.finished.append(notice.name)
        elif notice.kind == "failed":
            outcome.failed[notice.name] = notice.text
        if notify is not None:
            notify(notice)

    todo = [run for run in runs if run.action != "skip"]
    jobs = max(1, min(jobs or config.jobs, len(todo)))
    given = threads or config.base.get("threads")
    each = max(1, (given or os.cpu_count() or 1) // jobs) if jobs > 1 or given else None
    if jobs == 1:
        run_here(todo, each, note)
    else:
        run_in_workers(todo, jobs, each, note)
    return outcome
