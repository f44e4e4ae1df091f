"""The leaderboard on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rarefy.report.fairness import percent
from rarefy.report.leaderboard import Difference, Row
from rarefy.report.numbers import NONE, duration, points, si, times
from rarefy.report.records import Comparison

# heading, cell, rank: in a narrow terminal the columns with the highest rank are left out first
_COLUMNS: tuple[tuple[str, Callable[[Row], str], int], ...] = (
    ("method", lambda row: plain(row.label), 0),
    ("sparsity", lambda row: percent(row.sparsity) if row.sparsity is not None else NONE, 3),
    ("accuracy %", lambda row: _accuracy(row), 0),
    ("seeds", lambda row: f"{row.n}" if row.n == row.total else f"{row.n} of {row.total}", 2),
    ("vs static", lambda row: difference(row.against.get("static")), 4),
    ("vs small-dense", lambda row: difference(row.against.get("small-dense")), 5),
    ("FLOPs", lambda row: times(row.flops_ratio), 1),
    ("train FLOPs", lambda row: times(row.training_flops_ratio), 6),
    ("parameters", lambda row: si(row.parameters), 1),
    ("size", lambda row: si(row.bytes, "B"), 7),
    ("time", lambda row: duration(row.seconds), 1),
    ("CPU time", lambda row: duration(row.cpu_seconds), 3),
    ("peak memory", lambda row: si(row.peak_memory, "B"), 1),
)


def print_leaderboard(console: Console, rows: Sequence[Row], comparison: Comparison | None = None) -> None:
    """Print one table per sparsity, and with `comparison` its warnings and the runs that do not count.

    Accuracy is mean and standard deviation over seeds; differences to a baseline are paired by seed and carry `*` where
    the t-test's p, corrected for the number of methods (Holm), is below 0.05.
    The best accuracy at each sparsity is bold. Columns that do not fit the terminal's width are left out and named.
    """
    columns = [*_COLUMNS, *_evaluated(rows)]
    shown = list(columns)
    cells = {name: [name, *(cell(row) for row in rows)] for name, cell, _ in shown}
    cells["method"] += [_heading(row) for row in rows]
    while len(shown) > 3 and sum(max(map(len, cells[name])) + 2 for name, _, _ in shown) > console.width:
        shown.remove(max(shown, key=lambda column: column[2]))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, _, _ in shown:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    level: float | None = None
    for row in rows:
        if row.sparsity_asked != level:
            level = row.sparsity_asked
            table.add_row()
            table.add_row(Text(_heading(row), style="dim"))
        best = max(other.accuracy or 0.0 for other in rows if other.sparsity_asked == row.sparsity_asked)
        style = "bold" if row.sparsity_asked is not None and row.accuracy == best else ""
        table.add_row(*(Text(cell(row), style=style if name == "accuracy %" else "") for name, cell, _ in shown))
    console.print(table)
    if any(found and found.clear for row in rows for found in row.against.values()):
        console.print(Text("* p < 0.05 in a t-test paired by seed, corrected for the number of methods", style="dim"))
    left_out = [name for name, _, _ in columns if name not in {name for name, _, _ in shown}]
    if left_out:
        console.print(Text(f"(left out for the terminal's width: {', '.join(left_out)})", style="dim"))
    if comparison is not None:
        for run in comparison.problems:
            console.print(Text(f"not counted: {plain(run.name)}: {plain(run.reason or run.status)}", style="red"))
        for warning in comparison.warnings:
            console.print(Text(f"note: {plain(warning)}", style="yellow"))


def _evaluated(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str], int]]:
    """One column for each further evaluation (a share, in percent) that any row has."""
    names = dict.fromkeys(name for row in rows for name in row.evaluations)
    return [(f"{name} %", lambda row, name=name: points(row.evaluations.get(name)), 1) for name in names]  # type: ignore[misc]


def _heading(row: Row) -> str:
    return f"{percent(row.sparsity_asked)} sparsity" if row.sparsity_asked is not None else "sparsity of its own"


def difference(found: Difference | None) -> str:
    """Write a paired difference in points, with `*` where it stands after correction."""
    return NONE if found is None else points(found.mean, sign=True) + ("*" if found.clear else "")


def plain(text: str) -> str:
    """Make text from a run safe for a terminal: no control characters, nothing that cannot be encoded."""
    clean = "".join(character if character.isprintable() else " " for character in text)
    return clean.encode("utf-8", "replace").decode("utf-8")


def _accuracy(row: Row) -> str:
    spread = f" ± {points(row.accuracy_sd)}" if row.accuracy_sd is not None else ""
    return points(row.accuracy) + spread
