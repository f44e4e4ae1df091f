"""One row per method and sparsity: means over seeds, spreads, costs, and paired differences to the baselines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rarefy._files import atomic_write
from rarefy.metrics import statistics
from rarefy.report.records import Comparison, Result, Run, dense_training

BASELINES = ("static", "small-dense")


@dataclass(frozen=True)
class Difference:
    """Accuracy of a method minus that of a baseline, paired by seed.

    `low` and `high` bound the 95 % t-interval of the mean difference and `p` is its two-sided p-value (None with fewer
    than two common seeds); `p_holm` is corrected (Holm) for the number of methods compared with this baseline at
    this sparsity.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int
    p_holm: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the difference stands after the correction: `p_holm` below 0.05."""
        return self.p_holm is not None and self.p_holm < 0.05


@dataclass(frozen=True)
class Row:
    """One line of the leaderboard; None where no finished run recorded the number.

    Accuracy, sparsity and ratios are shares (0..1), `bytes` and `peak_memory` are bytes, `seconds` are those of the clock,
    `cpu_seconds` those of all cores. Ratios are relative to the un-narrowed dense net, of training to
    that of the dense runs of the comparison (without one, to dense training of the same length). All are means over the
    finished seeds.
    """

    label: str
    method: str
    sparsity_asked: float | None
    n: int
    total: int
    seeds: tuple[int, ...] = ()
    accuracy: float | None = None
    accuracy_sd: float | None = None
    loss: float | None = None
    ece: float | None = None
    evaluations: dict[str, float] = field(default_factory=dict)
    sparsity: float | None = None
    flops: float | None = None
    flops_ratio: float | None = None
    training_flops: float | None = None
    training_flops_ratio: float | None = None
    parameters: float | None = None
    parameters_ratio: float | None = None
    bytes: float | None = None
    storage: str | None = None
    storage_bytes: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory: float | None = None
    explored: float | None = None
    epochs: float | None = None
    against: dict[str, Difference | None] = field(default_factory=dict)

    @property
    def level(self) -> float | None:
        """The sparsity at which this row stands: the one asked for, or where none can be, the one reached; None for dense."""
        return self.sparsity_asked if self.sparsity_asked is not None else self.sparsity or None


def leaderboard(comparison: Comparison) -> list[Row]:
    """Average the finished runs of each method and sparsity over their seeds.

    Args:
        comparison: what `collect` read.

    Returns:
        Rows ordered by sparsity (dense first), then accuracy, best first. A method of which every run failed still has
        its row, with `n` = 0. `against["static"]` and `against["small-dense"]` hold the paired differences, None where
        there is no such baseline at that sparsity.
    """
    groups: dict[tuple[str, float | None], list[Run]] = {}
    for run in comparison.runs:
        if run.label is not None and run.status != "duplicate":
            groups.setdefault(run.key, []).append(run)
    finished = {key: [run for run in runs if run.finished] for key, runs in groups.items()}
    baselines = {
        (name, sparsity): found
        for sparsity in {key[1] for key in groups}
        for name in BASELINES
        if (found := _baseline(name, sparsity, finished)) is not None
    }
    differences: dict[tuple[str, float | None], dict[str, Difference | None]] = {key: {} for key in groups}
    for (name, sparsity), base in baselines.items():
        family = {key: paired(finished[key], finished[base]) for key in groups if key[1] == sparsity and key != base}
        for key, difference in corrected(family).items():
            differences[key][name] = difference
    dense = dense_training(comparison.runs)
    rows = [_row(key, groups[key], differences[key], dense) for key in groups]
    return sorted(rows, key=lambda row: (row.level or 0.0, row.n == 0, -(row.accuracy or 0.0), row.label))


def write_table(path: str | Path, comparison: Comparison, rows: Sequence[Row]) -> Path:
    """Write the leaderboard with its warnings and the runs that do not count as JSON, atomically."""
    contents = {
        "comparison": comparison.name,
        "warnings": list(comparison.warnings),
        "rows": [asdict(row) for row in rows],
        "not_counted": [{"run": run.name, "status": run.status, "reason": run.reason} for run in comparison.problems],
    }
    text = json.dumps(contents, indent=1, allow_nan=False) + "\n"
    with atomic_write(path, "w") as file:
        file.write(text)
    return Path(path)


def _row(
    key: tuple[str, float | None], runs: Sequence[Run], against: dict[str, Difference | None], dense: float | None
) -> Row:
    finished = [run for run in runs if run.finished and run.result is not None]
    results = [run.result for run in finished if run.result is not None]
    method = next((run.method for run in (*finished, *runs) if run.method), key[0])
    if not results:
        return Row(key[0], method, key[1], n=0, total=len(runs), against=against)
    accuracies = [result.accuracy for result in results if result.accuracy is not None]
    stored = _storage(results)
    smallest = min(stored, key=lambda kind: stored[kind]) if stored else None
    nothing_sparse = stored.get("bitmask") == stored.get("csr")  # a narrower net is stored as it is
    return Row(
        key[0],
        method,
        key[1],
        n=len(results),
        total=len(runs),
        seeds=tuple(sorted(run.seed for run in finished if run.seed is not None)),
        accuracy=statistics.mean(accuracies),
        accuracy_sd=statistics.sd(accuracies),
        loss=_mean(results, lambda result: result.loss),
        ece=_mean(results, lambda result: result.ece),
        evaluations=_evaluations(results),
        sparsity=_mean(results, lambda result: result.sparsity),
        flops=_mean(results, lambda result: result.flops),
        flops_ratio=_mean(results, lambda result: _ratio(result.flops, result.flops_dense)),
        training_flops=_mean(results, lambda result: result.training_flops),
        training_flops_ratio=_mean(
            results, lambda result: _ratio(result.training_flops, dense or result.training_flops_dense)
        ),
        parameters=_mean(results, lambda result: result.parameters),
        parameters_ratio=_mean(results, lambda result: _ratio(result.parameters, result.parameters_dense)),
        bytes=stored[smallest] if smallest else None,
        storage="dense" if nothing_sparse and smallest else smallest,
        storage_bytes=stored,
        seconds=_mean(results, lambda result: result.seconds),
        cpu_seconds=_mean(results, lambda result: result.cpu_seconds),
        peak_memory=_mean(results, lambda result: result.peak_memory_bytes),
        explored=_mean(results, lambda result: result.explored),
        epochs=_mean(results, lambda result: result.epochs),
        against=against,
    )


def paired(runs: Iterable[Run], baseline: Iterable[Run]) -> Difference | None:
    """Compare accuracies seed by seed; None where no seed is common."""
    ours, theirs = ({run.seed: run.result.accuracy for run in part if run.result} for part in (runs, baseline))
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys(), key=str)]
    whole = [(first, second) for first, second in pairs if first is not None and second is not None]
    if not whole:
        return None
    if len(whole) == 1:  # one seed measures no spread
        return Difference(whole[0][0] - whole[0][1], None, None, None, 1)
    test = statistics.paired_t_test([first for first, _ in whole], [second for _, second in whole])
    return Difference(test.difference, test.low, test.high, test.p, test.n) if test else None


def corrected(family: dict[Any, Difference | None]) -> dict[Any, Difference | None]:
    """Fill in `p_holm` for methods that were compared with one baseline."""
    adjusted = statistics.holm([found.p if found else None for found in family.values()])
    pairs = zip(family.items(), adjusted, strict=True)
    return {key: replace(found, p_holm=p) if found else None for (key, found), p in pairs}


def _baseline(
    name: str, sparsity: float | None, finished: dict[tuple[str, float | None], list[Run]]
) -> tuple[str, float | None] | None:
    """The group that serves as baseline: the one labelled so, else the first whose method it is."""
    if sparsity is None:
        return None
    groups = [key for key, runs in finished.items() if key[1] == sparsity and any(run.method == name for run in runs)]
    return next((key for key in groups if key[0] == name), groups[0] if groups else None)


def _mean(results: Iterable[Result], number: Callable[[Result], float | None]) -> float | None:
    values = [value for result in results if (value := number(result)) is not None and math.isfinite(value)]
    return statistics.mean(values) if values else None


def _evaluations(results: Sequence[Result]) -> dict[str, float]:
    names = dict.fromkeys(name for result in results for name in result.evaluations)
    means = {name: _mean(results, lambda result, name=name: result.evaluations.get(name)) for name in names}  # type: ignore[misc]
    return {name: value for name, value in means.items() if value is not None}


def _storage(results: Sequence[Result]) -> dict[str, float]:
    means = {}
    for kind in ("dense", "bitmask", "csr"):
        values = [size for result in results if (size := result.storage_bytes.get(kind)) is not None]
        if values:
            means[kind] = statistics.mean(values)
    return means


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
