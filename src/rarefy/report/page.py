"""One stand-alone HTML page about a comparison or a run: data, style and script inside, no network."""

from __future__ import annotations

import base64
import datetime
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from rarefy import __version__
from rarefy._files import atomic_write
from rarefy.report.fairness import percent
from rarefy.report.leaderboard import BASELINES, Row, leaderboard
from rarefy.report.overlap import overlaps
from rarefy.report.reading import collect
from rarefy.report.records import Comparison, Run
from rarefy.report.thinning import flip_rates, rounded, smoothed, spread_out, thin_topology

SCRIPTS = ("base.js", "plots.js", "leaderboard.js", "panels.js", "topology.js", "flips.js", "page.js")
MOST_POINTS = 400
# upper bounds for a whole page, which keep 60 runs under about 2 MB
_ALL_POINTS = 24_000
_ALL_EVENTS = 36_000


def write_html(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a comparison folder or a run folder as one HTML file, atomically.

    Args:
        folder: what `collect` reads.
        out: the file to write; default `report.html` in `folder`.

    Returns:
        The path written. The page needs no network, runs from `file://`, and forbids itself everything else by its
        content security policy.

    Raises:
        DataError: `folder` does not exist or holds no run.
    """
    comparison = collect(folder)
    path = Path(out) if out is not None else Path(folder) / "report.html"
    text = render(comparison)
    with atomic_write(path, "w") as file:
        file.write(text)
    return path


def render(comparison: Comparison) -> str:
    """Return the page's HTML."""
    files = resources.files("rarefy.report") / "web"
    style = (files / "page.css").read_text(encoding="utf-8")
    parts = [(files / name).read_text(encoding="utf-8") for name in SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    page = (files / "page.html").read_text(encoding="utf-8")
    filled = {
        "{{policy}}": policy,
        "{{title}}": _escaped(comparison.name),
        "{{style}}": style,
        "{{data}}": embedded(payload(comparison)),
        "{{script}}": script,
    }
    before = page
    pieces = []
    for mark, text in filled.items():  # cut at the marks, so that a mark inside inserted text stays text
        head, _, before = before.partition(mark)
        pieces += [head, text]
    return "".join([*pieces, before])


def embedded(data: Any) -> str:
    """Return JSON that cannot end or open an HTML element, whatever text it holds."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def payload(comparison: Comparison) -> dict[str, Any]:
    """Return all the page shows as plain data; every text in it is to be shown as text, never as HTML."""
    rows = leaderboard(comparison)
    labels = _ordered(comparison)
    matrices, notes = overlaps(comparison)
    notes += [f"{run.name}: {note}." for run in comparison.finished for note in run.notes]
    most = max(60, min(MOST_POINTS, _ALL_POINTS // len(comparison.runs)))
    layers = sum(len(run.curves.topology) for run in comparison.runs)
    columns = max(12, min(MOST_POINTS, _ALL_EVENTS // max(1, layers)))
    shapes: dict[tuple[tuple[str, tuple[int, ...]], ...], int] = {}
    runs = [_run(run, most, columns, shapes) for run in comparison.runs]
    return {
        "title": comparison.name,
        "single": comparison.single,
        "about": about(comparison, rows),
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "labels": labels,
        "rows": [_row(row) for row in rows],
        "warnings": list(comparison.warnings),
        "notes": notes,
        "runs": runs,
        "networks": [[{"name": name, "shape": list(shape)} for name, shape in network] for network in shapes],
        "overlaps": [
            {
                "title": matrix.title,
                "names": list(matrix.names),
                "values": [[rounded(value, 4) for value in line] for line in matrix.values],
                "chance": [[rounded(value, 4) for value in line] for line in matrix.chance],
            }
            for matrix in matrices
        ],
    }


def about(comparison: Comparison, rows: Sequence[Row]) -> str:
    """Say in one plain paragraph what was run: methods, data, network, length, seeds, machine."""
    results = [run.result for run in comparison.runs if run.result]
    parts = []
    methods = _ordered(comparison)
    levels = sorted({row.sparsity_asked for row in rows if row.sparsity_asked is not None})
    if comparison.single:
        run = comparison.runs[0]
        at = f" at {percent(levels[0])} sparsity" if levels else ""
        parts.append(f"One run of {run.label or 'an unknown method'}{at}")
    else:
        at = f" at {_and([percent(level) for level in levels])} sparsity" if levels else ""
        parts.append(f"{len(methods)} method{'s' if len(methods) != 1 else ''} ({', '.join(methods)}){at}")
    for what, found in (
        ("on", {f"{r.dataset} ({r.dataset_note})" if r.dataset_note else r.dataset for r in results if r.dataset}),
        ("with the network", {r.model for r in results if r.model}),
    ):
        if found:
            parts.append(f"{what} {_and(sorted(str(name) for name in found))}")
    first = " ".join(parts)
    epochs = sorted({r.epochs for r in results if r.epochs is not None})
    steps = sorted({r.steps for r in results if r.steps is not None})
    seeds = sorted({run.seed for run in comparison.runs if run.seed is not None})
    length = [
        f"{_and(epochs)} epoch{'' if epochs == [1] else 's'}" if epochs else "",
        f"{_and([f'{n:,}' for n in steps])} optimizer steps" if steps else "",
        f"seed{'' if len(seeds) == 1 else 's'} {_and(seeds)}" if seeds else "",
    ]
    second = f"{', '.join(part for part in length if part)}." if any(length) else ""
    counted = "" if comparison.single else f"{len(comparison.finished)} of {len(comparison.runs)} runs finished."
    return " ".join(part for part in (f"{first}.", second, _machine(comparison), counted) if part)


def _machine(comparison: Comparison) -> str:
    environments = [run.environment for run in comparison.runs if run.environment]
    named = []
    for key, pattern in (("cpu", "{}"), ("threads", "{} threads"), ("torch", "PyTorch {}"), ("rarefy", "rarefy {}")):
        found = sorted({str(environment[key]) for environment in environments if environment.get(key) is not None})
        if found:
            said = pattern.format(" / ".join(found[:3]))
            named.append("1 thread a run" if said == "1 threads" else said)
    return f"Machine: {', '.join(named)}." if named else ""


def _run(run: Run, most: int, columns: int, shapes: dict[Any, int]) -> dict[str, Any]:
    result = run.result
    network = tuple((layer.name, layer.shape) for layer in result.layers) if result else ()
    window = max(1, len(run.curves.train_loss) // 50)
    loss = smoothed(run.curves.train_loss, window)
    chosen = spread_out(len(loss), most)
    evals = {}
    for split, rows in run.curves.evals.items():
        picked = [rows[index] for index in spread_out(len(rows), most)]
        evals[split] = {
            "steps": [step for step, _, _ in picked],
            "loss": [rounded(value) for _, value, _ in picked],
            "accuracy": [rounded(value) for _, _, value in picked],
        }
    updates = {layer: [row for row in rows if row[0] > 0] for layer, rows in run.curves.topology.items()}
    facts = result.model_dump(exclude={"layers", "masks", "error"}) if result else {}
    return {
        "name": run.name,
        "label": run.label or run.name,
        "sparsity": run.sparsity,
        "seed": run.seed,
        "status": run.status,
        "reason": run.reason,
        "facts": _rounded(facts),
        "config": run.config,
        "environment": _plain(run.environment),
        "notes": list(run.notes),
        "window": window,
        "train": {
            "steps": run.curves.train_steps[chosen].tolist(),
            "loss": [rounded(float(value), 4) for value in loss[chosen]],
        },
        "evals": evals,
        "topology": thin_topology(updates, columns),  # without step 0: the first mask is no update
        "flips": flip_rates(updates, sum(layer.numel for layer in result.layers) if result else 0, most),
        "network": shapes.setdefault(network, len(shapes)) if network else None,
        "kept": [layer.kept for layer in result.layers] if result else [],
    }


def _row(row: Row) -> dict[str, Any]:
    flat = _rounded({**asdict(row), "level": row.level})
    flat["against"] = {}
    for name in BASELINES:
        found = row.against.get(name)
        if found is not None:
            flat["against"][name] = {**asdict(found), "clear": found.clear}
    return flat


def _rounded(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _rounded(value) if isinstance(value, dict) else rounded(value, 9) if isinstance(value, float) else value
        for key, value in facts.items()
    }


def _ordered(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(run.label or run.name for run in comparison.runs))


def _plain(value: Any, depth: int = 0) -> Any:
    """Cut what a run recorded about its machine down to short plain values."""
    if isinstance(value, dict) and depth < 4:
        return {str(key)[:100]: _plain(part, depth + 1) for key, part in list(value.items())[:50]}
    if isinstance(value, list) and depth < 4:
        return [_plain(part, depth + 1) for part in value[:50]]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, float)):
        return rounded(float(value), 9)
    return str(value)[:500]


def _and(values: Sequence[object]) -> str:
    names = [str(value) for value in values]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def _escaped(text: str) -> str:
    return html.escape(text).encode("utf-8", "replace").decode("utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
