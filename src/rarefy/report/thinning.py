"""Make long curves short enough for a page without changing what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred moving average of `values` over `window` entries, fewer at the ends; NaN are left out.

    Where a whole window is NaN the result is NaN.
    """
    if window <= 1 or len(values) < 3:
        return np.asarray(values, np.float64)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((sums[high] - sums[low]) / (counts[high] - counts[low]))


def spread_out(length: int, most: int) -> np.ndarray:
    """Return at most `most` indices into `length` entries, evenly spread, the first and the last among them."""
    if length <= most:
        return np.arange(length)
    return np.unique(np.linspace(0, length - 1, max(2, most)).round().astype(np.int64))


def thin_topology(events: Mapping[str, Sequence[tuple[int, int, int, int]]], most: int) -> dict[str, Any] | None:
    """Line the layers' topology events up on common steps, at most `most` of them.

    Args:
        events: layer -> (step, dropped, grown, kept), sorted by step.
        most: largest number of columns. Where there are more steps, a column holds the mean dropped and grown of the
            updates that it joins and the last kept, at the last of their steps.

    Returns:
        {"layers", "steps", "joined" (updates per column), "dropped", "grown", "kept"}, the last three one list per
        layer with None where a layer had no event; None where there are no events.
    """
    steps = sorted({step for rows in events.values() for step, *_ in rows})
    if not steps:
        return None
    joined = math.ceil(len(steps) / max(1, most))
    column = {step: index // joined for index, step in enumerate(steps)}
    width = column[steps[-1]] + 1
    ends = [steps[min(len(steps), (index + 1) * joined) - 1] for index in range(width)]
    tables: dict[str, list[list[float | None]]] = {"dropped": [], "grown": [], "kept": []}
    for rows in events.values():
        sums: list[list[int]] = [[] for _ in range(width)]
        grown: list[list[int]] = [[] for _ in range(width)]
        kept: list[float | None] = [None] * width
        for step, lost, won, left in rows:
            sums[column[step]].append(lost)
            grown[column[step]].append(won)
            kept[column[step]] = left
        tables["dropped"].append([_mean(part) for part in sums])
        tables["grown"].append([_mean(part) for part in grown])
        tables["kept"].append(kept)
    return {"layers": list(events), "steps": ends, "joined": joined, **tables}


def flip_rates(
    events: Mapping[str, Sequence[tuple[int, int, int, int]]], size: int, most: int
) -> dict[str, list[float | None]] | None:
    """Return how fast masks move along a run: the share of `size` weights that flip in a step, dropped or grown.

    The sum of flips is SAD, the sparse architecture divergence of Zhou et al. 2021 (arXiv 2102.04010), from step to step.

    Args:
        events: as for `thin_topology`; step 0, the first mask, does not count.
        size: weights of all sparse layers.
        most: largest number of points; where there are more updates, a point joins several, at the last of their steps.

    Returns:
        {"steps", "rate"}, a rate being that since the point before; None where nothing flips.
    """
    flips: dict[int, int] = {}
    for rows in events.values():
        for step, lost, won, _ in rows:
            if step > 0:
                flips[step] = flips.get(step, 0) + lost + won
    if not any(flips.values()) or size < 1:
        return None
    steps = sorted(flips)
    joined = math.ceil(len(steps) / max(1, most))
    parts = [steps[start : start + joined] for start in range(0, len(steps), joined)]
    starts = [0, *(part[-1] for part in parts)]
    rates = [
        sum(flips[step] for step in part) / size / (part[-1] - before)
        for part, before in zip(parts, starts, strict=False)
    ]
    return {"steps": [part[-1] for part in parts], "rate": [rounded(rate, 4) for rate in rates]}


def rounded(value: float | None, digits: int = 5) -> float | None:
    """Round to significant digits for the page; None for what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _mean(values: Sequence[int]) -> float | None:
    if len(values) < 2:
        return values[0] if values else None
    return rounded(sum(values) / len(values), 4)
