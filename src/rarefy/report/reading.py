"""Read run folders and comparison folders; a run that cannot be read is listed with the reason, no more."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from rarefy.errors import DataError
from rarefy.report.fairness import warnings_for
from rarefy.report.records import ORDER, Comparison, Curves, Result, Run, Status, explain

RUN_FILES = ("result.json", "metrics.jsonl", "config.yaml", "environment.json", "checkpoint.ckpt")
_ABSENT = "missing: compare.yaml asks for it, but it has no folder"
_RUN_NAME = re.compile(r"^(?P<method>.+?)(?:-(?P<sparsity>0?\.\d+|0|1))?-s(?P<seed>\d+)$")


def collect(folder: str | Path) -> Comparison:
    """Read a comparison folder, or the folder of one run, into a `Comparison`.

    Args:
        folder: a folder of run folders, or one run folder, as `rarefy compare` and `rarefy train` write them.

    Returns:
        Every run found, in order of method, sparsity and seed. Runs that failed, were interrupted, are unfinished,
        unreadable or announced by `compare.yaml` but absent carry a `reason`.

    Raises:
        DataError: `folder` does not exist or holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {str(folder)!r}; give the folder of a run or of a comparison")
    children = [child for child in sorted(folder.iterdir()) if _looks_like_run(child)]
    single = not children and _looks_like_run(folder)
    runs = [read_run(child) for child in ([folder] if single else children)]
    if not single:
        runs += _announced_but_absent(folder, runs)
    if not runs:
        raise DataError(
            f"folder {str(folder)!r} holds no run: expected {RUN_FILES[0]} or {RUN_FILES[1]} in it or a sub-folder"
        )
    ordered = _without_duplicates(sorted(runs, key=_order))
    return Comparison(folder.resolve(), tuple(ordered), tuple(warnings_for(ordered, single)), single)


def read_run(folder: Path) -> Run:
    """Read one run folder; whatever is wrong with it ends in `status`, `reason` and `notes`, not in an exception."""
    guess = _RUN_NAME.match(folder.name)
    run = Run(
        folder.name,
        folder,
        "unfinished",
        method=guess["method"] if guess else None,
        label=guess["method"] if guess else None,
        sparsity=float(guess["sparsity"]) if guess and guess["sparsity"] else None,
        seed=int(guess["seed"]) if guess else None,
    )
    notes: list[str] = []
    run = replace(
        run,
        config=_text(folder / "config.yaml", notes),
        environment=_environment(folder / "environment.json", notes),
        curves=_curves(folder / "metrics.jsonl", notes),
    )
    return replace(_with_result(run), notes=tuple(notes))


def _with_result(run: Run) -> Run:
    path = run.folder / "result.json"
    status: Status = "corrupt"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        result = Result.model_validate(raw)
    except FileNotFoundError:
        return replace(run, reason=f"unfinished: no result.json yet{_last_step(run.curves)}")
    except ValidationError as error:
        return replace(run, status=status, reason=f"corrupt: result.json is not valid: {explain(error)}")
    except (OSError, ValueError, RecursionError) as error:
        return replace(run, status=status, reason=f"corrupt: result.json cannot be read: {_short(error)}")
    dense = result.method == "dense" or result.sparsity_asked is None
    reason = None
    if result.status != "finished":
        said = (result.error or "").strip() or "no reason was recorded"
        reason = f"{result.status}{_last_step(run.curves)}: {said}"
    return replace(
        run,
        status=result.status,
        reason=reason,
        result=result,
        method=result.method,
        label=result.label or result.method,
        sparsity=None if dense else round(float(result.sparsity_asked or 0.0), 6),
        seed=result.seed,
    )


def _looks_like_run(folder: Path) -> bool:
    if not folder.is_dir() or folder.name.startswith("."):
        return False
    return any((folder / name).is_file() for name in RUN_FILES) or bool(_RUN_NAME.match(folder.name))


def _order(run: Run) -> tuple[int, str, float, int, str]:
    rank = ORDER.index(run.method) if run.method in ORDER else len(ORDER)
    return (rank, run.label or run.name, run.sparsity or 0.0, run.seed or 0, run.name)


def _without_duplicates(runs: Iterable[Run]) -> list[Run]:
    seen: dict[tuple[Any, ...], str] = {}
    kept = []
    for run in runs:
        identity = (*run.key, run.seed)
        if run.finished and identity in seen:
            told = f"the same method, sparsity and seed as {seen[identity]!r}; only that one is counted"
            run = replace(run, status="duplicate", reason=told)
        elif run.finished:
            seen[identity] = run.name
        kept.append(run)
    return kept


def _announced_but_absent(folder: Path, runs: list[Run]) -> list[Run]:
    """Runs that `planned.json` names, or else `compare.yaml` asks for (methods x sparsities x seeds), without a folder."""
    try:
        names = json.loads((folder / "planned.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        names = None
    if isinstance(names, list):
        have_folders = {run.name for run in runs}
        lost = [
            name for name in names if isinstance(name, str) and name not in have_folders and Path(name).name == name
        ]
        return [replace(read_run(folder / name), status="missing", reason=_ABSENT, notes=()) for name in lost]
    try:
        asked = yaml.safe_load((folder / "compare.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    if not isinstance(asked, dict):
        return []
    seeds: Any = asked.get("seeds")
    seeds = list(range(seeds)) if isinstance(seeds, int) else seeds
    methods, sparsities = asked.get("methods"), asked.get("sparsities")
    if not all(isinstance(part, list) for part in (seeds, methods, sparsities)):
        return []
    have = {(name, run.sparsity, run.seed) for run in runs for name in (run.label, run.method) if name}
    absent = []
    for entry in methods or []:
        name = (entry.get("label") or entry.get("name") or entry.get("method")) if isinstance(entry, dict) else entry
        method = (entry.get("name") or entry.get("method")) if isinstance(entry, dict) else entry
        flat = method == "dense" or any(label == name and level is None for label, level, _ in have)
        levels = [None] if flat else [s for s in sparsities or [] if isinstance(s, (int, float))]
        for level in levels:
            for seed in seeds or []:
                sparsity = None if level is None else round(float(level), 6)
                if isinstance(name, str) and isinstance(seed, int) and (name, sparsity, seed) not in have:
                    label = f"{name}-s{seed}" if sparsity is None else f"{name}-{sparsity:g}-s{seed}"
                    absent.append(
                        Run(
                            label,
                            folder / label,
                            "missing",
                            _ABSENT,
                            method=method if isinstance(method, str) else name,
                            label=name,
                            sparsity=sparsity,
                            seed=seed,
                        )
                    )
    return absent


def _text(path: Path, notes: list[str], limit: int = 20_000) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return ""
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {_short(error)}")
        return ""
    return text if len(text) <= limit else text[:limit] + "\n# ... shortened"


def _environment(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path, notes)
    if not text:
        return {}
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        notes.append(f"environment.json cannot be read: {_short(error)}")
        return {}
    return read if isinstance(read, dict) else {}


def _curves(path: Path, notes: list[str]) -> Curves:
    """Read `metrics.jsonl` line by line; a broken line (a run killed in mid-write) is counted and skipped."""
    train: dict[int, float] = {}
    evals: dict[str, dict[int, tuple[float, float]]] = {}
    topology: dict[str, dict[int, tuple[int, int, int]]] = {}
    bad = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    kind, step = entry["kind"], int(entry["step"])
                    if kind == "train":
                        train[step] = _number(entry["loss"])
                    elif kind == "eval":
                        split = evals.setdefault(str(entry.get("split", "test")), {})
                        split[step] = (_number(entry.get("loss")), _number(entry.get("accuracy")))
                    elif kind == "topology":
                        counts = (int(entry["dropped"]), int(entry["grown"]), int(entry["kept"]))
                        topology.setdefault(str(entry["layer"]), {})[step] = counts
                except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                    bad += 1
    except FileNotFoundError:
        notes.append("metrics.jsonl is missing: no curves")
    except OSError as error:
        notes.append(f"metrics.jsonl cannot be read: {_short(error)}")
    if bad:
        notes.append(f"{bad} broken line{'s' if bad > 1 else ''} of metrics.jsonl skipped")
    steps = sorted(train)
    return Curves(
        np.array(steps, np.int64),
        np.array([train[step] for step in steps], np.float64),
        {split: [(step, *found[step]) for step in sorted(found)] for split, found in evals.items()},
        {layer: [(step, *found[step]) for step in sorted(found)] for layer, found in topology.items()},
        bad,
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _last_step(curves: Curves) -> str:
    return f" after step {int(curves.train_steps[-1])}" if len(curves.train_steps) else ""


def _short(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text or type(error).__name__).splitlines()[0][:300]
