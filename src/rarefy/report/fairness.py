"""What makes a comparison unfair or incomplete, said in sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from rarefy import methods
from rarefy.engine.taxonomy import DENSE_IS_TRAINED, Family
from rarefy.report.records import Result, Run, dense_training

BASELINES = ("dense", "small-dense", "static")
FEWEST_SEEDS = 3
UNEQUAL = 1.1  # FLOPs that differ by more than this factor are named


def warnings_for(runs: Sequence[Run], single: bool) -> list[str]:
    """List what a reader must know before believing the table; a single run only gets warnings about itself."""
    finished = [run for run in runs if run.finished]
    said: list[str] = []
    if not single:
        said += _lacking(finished)
        said += _few_seeds(finished)
        said += _differing(finished)
        said += _budgets(finished)
        said += _flops(finished)
        said += _routes(finished)
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
    without: dict[str, list[str]] = {}
    for sparsity in sorted({run.sparsity for run in finished if run.sparsity is not None}):
        here = {run.method for run in finished if run.sparsity == sparsity}
        lost = [name for name in BASELINES[1:] if name not in here]
        if lost:
            without.setdefault(" and no ".join(lost), []).append(percent(sparsity))
    for lost_there, levels in without.items():
        said.append(f"At {_and(levels)} sparsity there is no finished {lost_there} baseline.")
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
    said: list[str] = []
    for what, field, harm in (
        ("epochs", "epochs", "the training budgets are unequal"),
        ("steps", "steps", "the training budgets are unequal"),
        ("data sets", "dataset", "accuracies cannot be compared"),
        ("data notes", "dataset_note", "the runs may have seen different data"),
        ("models", "model", "the table mixes networks"),
    ):
        values: dict[object, set[str]] = {}
        for run in finished:
            if run.result is not None:
                values.setdefault(getattr(run.result, field), set()).add(run.label or run.name)
        if len(values) > 1 and not (what == "steps" and said):
            where = f": {_which(values)}" if field in ("epochs", "steps") else ""
            said.append(f"The runs differ in {what} ({_list(values)}): {harm}{where}.")
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


def _flops(finished: Sequence[Run]) -> list[str]:
    """At one sparsity, methods may still differ in what they cost: by allocation, dense phases, or longer runs."""
    said = []
    dense = dense_training(finished)
    for sparsity in sorted({run.sparsity for run in finished if run.sparsity is not None}):
        here = [run for run in finished if run.sparsity == sparsity]
        for what, cost, mend in (
            ("forward FLOPs", _forward, "compare networks of one allocation, or at equal FLOPs"),
            (
                "training FLOPs",
                lambda result: _training(result, dense),
                "give the cheaper ones more steps, or read that column beside the accuracy",
            ),
        ):
            sparse = _means([run for run in here if run.method != "small-dense"], cost)
            # whole units make a narrower net up to a quarter cheaper, as in _budgets
            cheapest = 0.75 * min(sparse.values(), default=0.0)
            narrow = _means([run for run in here if run.method == "small-dense"], cost)
            odd = {label: mean for label, mean in narrow.items() if not cheapest <= mean <= UNEQUAL * cheapest / 0.75}
            ordered = sorted((mean, label) for label, mean in {**sparse, **odd}.items())
            if ordered and ordered[-1][0] > UNEQUAL * ordered[0][0]:
                (least, low), (most, high) = ordered[0], ordered[-1]
                said.append(
                    f"At {percent(sparsity)} sparsity the {what} are unequal: {high} {most:.3g}x of dense, "
                    f"{low} {least:.3g}x; {mend}."
                )
    return said


def _means(runs: Sequence[Run], cost: Callable[[Result], float | None]) -> dict[str, float]:
    """Mean cost over the seeds of every label that recorded it."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if run.result is not None and (value := cost(run.result)) is not None:
            found.setdefault(run.label or run.name, []).append(value)
    return {label: sum(values) / len(values) for label, values in found.items()}


def _forward(result: Result) -> float | None:
    return result.flops / result.flops_dense if result.flops and result.flops_dense else None


def _training(result: Result, dense: float | None) -> float | None:
    whole = dense or result.training_flops_dense
    return result.training_flops / whole if result.training_flops and whole else None


def _routes(finished: Sequence[Run]) -> list[str]:
    """Name the methods that train a dense network first, where others never do; and those that have no zeros."""
    said = []
    for sparsity in sorted({run.sparsity for run in finished if run.sparsity is not None}):
        groups: dict[Family, dict[str, None]] = {}
        for run in finished:
            if run.sparsity == sparsity and (family := family_of(run)) not in (None, "baseline"):
                groups.setdefault(family, {})[run.label or run.name] = None
        dense = [label for family in groups if family in DENSE_IS_TRAINED for label in groups[family]]
        sparse = [label for family in ("before training", "sparse to sparse") for label in groups.get(family, {})]
        if dense and sparse:
            said.append(
                f"At {percent(sparsity)} sparsity the table mixes methods that train a dense network first "
                f"({_list(dense)}) with methods that are sparse from the first step ({_list(sparse)}): the first pay its "
                "memory and FLOPs; compare within each of the two groups, or at equal training FLOPs."
            )
        shared = list(groups.get("parameter sharing", {}))
        if shared and dense + sparse:
            said.append(
                f"At {percent(sparsity)} sparsity {_list(shared)} shares parameters and has no zeros: it is as small as "
                "the sparse networks and computes as much as the dense one."
            )
    return said


def family_of(run: Run) -> Family | None:
    """Return the family of a run's method; None for a method that is not known here."""
    known = methods.available().values()
    cls = next((cls for cls in known if run.method == cls.name or run.method in cls.aliases), None)
    return None if cls is None else cls.family


def _missed_sparsity(finished: Sequence[Run]) -> list[str]:
    off = {}
    for run in finished:
        if run.result is None:
            continue
        got = run.result.sparsity
        if run.sparsity is None or got is None or run.method in BASELINES[:2]:
            continue
        if got == 0 and (run.result.parameters or 0) < (run.result.parameters_dense or 0):  # smaller, not sparse
            continue
        if abs(got - run.sparsity) > 0.005:
            off[name_of(run.key)] = got
    return [f"{name} was asked for, but {percent(got)} was reached." for name, got in off.items()]


def _never_changed(finished: Sequence[Run]) -> list[str]:
    """A method that moves its masks while training, and did not (fewer steps than its interval), was a static one."""
    still = dict.fromkeys(
        name_of(run.key)
        for run in finished
        if family_of(run) in ("sparse to sparse", "dense to sparse") and len(run.curves.train_steps)
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


def _which(values: Mapping[object, set[str]]) -> str:
    """Write what each value belongs to: "3 rigl; 30 set"."""
    ordered = sorted(values.items(), key=lambda item: str(item[0]))
    return "; ".join(f"{'not recorded' if value is None else value} {_list(labels)}" for value, labels in ordered[:4])


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _list(values: Iterable[object]) -> str:
    names = sorted("not recorded" if value is None else str(value) for value in values)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
