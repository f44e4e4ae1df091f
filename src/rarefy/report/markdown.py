"""The leaderboard as a Markdown table, for a results page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rarefy.errors import OptionError, nearest
from rarefy.report.fairness import percent
from rarefy.report.leaderboard import Difference, Row
from rarefy.report.numbers import points, si

_NONE = "–"


def _level(row: Row) -> str:
    """The sparsity asked for; what came out, in parentheses, where a method cannot be asked."""
    if row.sparsity_asked is not None:
        return percent(row.sparsity_asked)
    return f"({100 * row.sparsity:.1f} %)" if row.sparsity else _NONE


def _accuracy(row: Row) -> str:
    spread = f" ± {points(row.accuracy_sd)}" if row.accuracy_sd is not None else ""
    return _NONE if row.accuracy is None else points(row.accuracy) + spread


def _difference(found: Difference | None) -> str:
    if found is None:
        return _NONE
    said = points(found.mean, sign=True) + ("*" if found.clear else "")
    return said if found.low is None else f"{said} [{points(found.low, sign=True)}, {points(found.high, sign=True)}]"


def _ratio(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"


def _whole(value: float | None) -> str:
    return _NONE if value is None else f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "sparsity": _level,
    "method": lambda row: row.label.replace("|", "\\|"),
    "accuracy %": _accuracy,
    "against static": lambda row: _difference(row.against.get("static")),
    "against small-dense": lambda row: _difference(row.against.get("small-dense")),
    "FLOPs": lambda row: _ratio(row.flops_ratio),
    "training FLOPs": lambda row: _ratio(row.training_flops_ratio),
    "parameters": lambda row: _NONE if row.parameters is None else si(row.parameters),
    "size": lambda row: _NONE if row.bytes is None else si(row.bytes, "B"),
    "seconds": lambda row: _whole(row.seconds),
    "CPU seconds": lambda row: _whole(row.cpu_seconds),
    "peak memory": lambda row: _NONE if row.peak_memory is None else si(row.peak_memory, "B"),
}


def markdown(rows: Sequence[Row], without: Sequence[str] = ()) -> str:
    """Return the leaderboard as the lines of a Markdown table, in the order of `rows`.

    Accuracy is mean ± standard deviation over seeds; differences are in points with their 95 % interval, `*` as on the
    terminal. FLOPs are relative to the dense net. A sparsity in parentheses was an outcome and not asked for. Columns that
    no row has are left out.

    Args:
        rows: of `leaderboard`.
        without: names of further columns to leave out; see `COLUMNS`.

    Raises:
        OptionError: there is no column of that name.
    """
    for name in without:
        if name not in COLUMNS:
            raise OptionError(f"there is no column {name!r}{nearest(name, COLUMNS)}; columns: {', '.join(COLUMNS)}.")
    cells = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items() if name not in without}
    shown = {name: column for name, column in cells.items() if any(text != _NONE for text in column)}
    head, *body = (f"| {' | '.join(line)} |\n" for line in (shown, *zip(*shown.values(), strict=True)))
    return "".join([head, f"|{'---|' * len(shown)}\n", *body])
