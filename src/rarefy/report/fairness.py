"""What makes a comparison unfair or incomplete, said in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rarefy.report.records import Run

BASELINES = ("dense", "small-dense", "static")
DYNAMIC = ("gradual", "set", "rigl", "itop", "dsr", "deep-r", "srigl", "snfs", "gse", "top-kast")
FEWEST_SEEDS = 3


def warnings_for(runs: Sequence[Run], single: bool) -> list[str]:
    """List what a reader must know before believing the table; a single run only gets warnings about itself."""
    finished = [run for run in runs if run.finished]
    said: list[str] = []
    if not single:
        said += _lacking(finished)
        said += _few_seeds(finished)
        said += _differing(finished)
        said += _budgets(finished)
    said += _missed_sparsity(finished)
    said += _never_changed(finished)
    broken = len(runs) - len(finished)
    if broken and not single:
        are = "is" if broken == 1 else "are"
        said.append(f"{broken} of {len(runs)} runs {are} not counted; the reasons are listed.")
    return said


def _lacking(finished: Sequence[Run]) -> list[str]:
    methods = {run.method for run in finished}
    said = []
    if "dense" not in methods:
        said.append("There is no finished dense run: nothing shows what sparsity costs in accuracy.")
    for sparsity in sorted({run.sparsity for run in finished if run.sparsity is not None}):
        here = {run.method for run in finished if run.sparsity == sparsity}
        lost = [name for name in BASELINES[1:] if name not in here]
        if lost:
            said.append(f"At {percent(sparsity)} sparsity there is no finished {' and no '.join(lost)} baseline.")
    return said


def _few_seeds(finished: Sequence[Run]) -> list[str]:
    seeds: dict[tuple[str, float | None], int] = {}
    for run in finished:
        seeds[run.key] = seeds.get(run.key, 0) + 1
    few = [f"{name_of(key)} ({count})" for key, count in seeds.items() if count < FEWEST_SEEDS]
    if not few:
        return []
    shown = ", ".join(few[:6]) + (f" and {len(few) - 6} more" if len(few) > 6 else "")
    return [f"Fewer than {FEWEST_SEEDS} seeds finished for {shown}: treat their differences as anecdotes."]


def _differing(finished: Sequence[Run]) -> list[str]:
    results = [run.result for run in finished if run.result is not None]
    said: list[str] = []
    for what, values, harm in (
        ("epochs", {result.epochs for result in results}, "the training budgets are unequal"),
        ("steps", {result.steps for result in results}, "the training budgets are unequal"),
        ("data sets", {result.dataset for result in results}, "accuracies cannot be compared"),
        ("data notes", {result.dataset_note for result in results}, "the runs may have seen different data"),
        ("models", {result.model for result in results}, "the table mixes networks"),
    ):
        if len(values) > 1 and not (what == "steps" and said):
            said.append(f"The runs differ in {what} ({_list(values)}): {harm}.")
    for what in ("cpu", "threads", "torch"):
        found = {str(run.environment[what]) for run in finished if what in run.environment}
        if len(found) > 1:
            said.append(f"The runs differ in {what} ({_list(found)}): seconds and memory cannot be compared.")
    return said


def _budgets(finished: Sequence[Run]) -> list[str]:
    """Sparse methods at one sparsity should keep equal numbers of parameters, to 5 percent.

    A narrower dense net comes in whole units, so it may keep a quarter less; but not more than 5 percent more.
    """
    said = []
    for sparsity in sorted({run.sparsity for run in finished if run.sparsity is not None}):
        here = [run for run in finished if run.sparsity == sparsity and run.result]
        kept = {run.label or run.name: run.result.parameters or 0 for run in here if run.result}
        narrow = {run.label or run.name for run in here if run.method == "small-dense"}
        sparse = sorted((count, name) for name, count in kept.items() if name not in narrow)
        if not sparse:
            continue
        (least, low), (most, high) = sparse[0], sparse[-1]
        pairs = [(low, least, high, most)] if most > 1.05 * least else []
        for name in sorted(narrow):
            if kept[name] > 1.05 * most or kept[name] < 0.75 * least:
                pairs.append((name, kept[name], low, least))
        for first, one, second, two in pairs:
            said.append(
                f"At {percent(sparsity)} sparsity the parameters kept are unequal: {first} {one:,}, {second} {two:,}."
            )
    return said


def _missed_sparsity(finished: Sequence[Run]) -> list[str]:
    off = {}
    for run in finished:
        got = run.result.sparsity if run.result else None
        if run.sparsity is None or got is None or run.method in BASELINES[:2]:
            continue
        if abs(got - run.sparsity) > 0.005:
            off[name_of(run.key)] = got
    return [f"{name} was asked for, but {percent(got)} was reached." for name, got in off.items()]


def _never_changed(finished: Sequence[Run]) -> list[str]:
    """A dynamic method whose masks never moved (fewer steps than its update interval) was a static one."""
    still = dict.fromkeys(
        name_of(run.key)
        for run in finished
        if run.method in DYNAMIC and len(run.curves.train_steps)
        if not any(
            step > 0 and (dropped or grown) for rows in run.curves.topology.values() for step, dropped, grown, _ in rows
        )
    )
    return [f"The masks of {_list(still)} never changed during training."] if still else []


def name_of(key: tuple[str, float | None]) -> str:
    """Name a group of runs: "rigl at 90 %", or "dense"."""
    label, sparsity = key
    return label if sparsity is None else f"{label} at {percent(sparsity)}"


def percent(share: float) -> str:
    """Write a share as a percentage with as many digits as it needs, at most three: "90 %", "99.5 %"."""
    return f"{100 * share:.3f}".rstrip("0").rstrip(".") + " %"


def _list(values: Iterable[object]) -> str:
    names = sorted("not recorded" if value is None else str(value) for value in values)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
