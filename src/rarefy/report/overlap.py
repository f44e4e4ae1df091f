"""How much the masks of runs have in common, counted on the packed bits of `masks.safetensors`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from rarefy.report.fairness import percent
from rarefy.report.records import Comparison, Run

LARGEST_GROUP = 24


@dataclass(frozen=True)
class Masks:
    """The masks of one run: per layer the packed bits (64 to a word, zero beyond the end), weights kept, and shape."""

    words: dict[str, np.ndarray]
    kept: dict[str, int]
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Overlap:
    """Kept weights that runs share: the Jaccard index |A and B| / |A or B| of each pair, and its value by chance.

    `values` and `chance` are square and symmetric; None where two runs have different layers. `chance` is what two
    independent random masks with the same number of kept weights in each layer would give on average (ratio of means).
    """

    title: str
    names: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    chance: tuple[tuple[float | None, ...], ...]


def read_masks(path: Path) -> Masks:
    """Read packed masks.

    Raises:
        ValueError: the file is missing or corrupt, or a layer's bytes do not fit the shape that it states.
    """
    words, kept, shapes = {}, {}, {}
    try:
        with safe_open(path, framework="numpy") as file:
            stated = file.metadata() or {}
            for layer in sorted(file.keys()):
                bits = np.ascontiguousarray(file.get_tensor(layer))
                shape = tuple(int(size) for size in json.loads(stated.get(layer, "null")) or ())
                size = math.prod(shape)
                if bits.dtype != np.uint8 or bits.ndim != 1 or bits.size != (size + 7) // 8 or not shape:
                    raise ValueError(f"layer {layer!r}: {bits.size} bytes do not fit the stated shape {list(shape)}")
                if size % 8 and int(bits[-1]) >> (size % 8):
                    raise ValueError(f"layer {layer!r}: bits are set beyond its {size} weights")
                padded = np.zeros(-(-bits.size // 8) * 8, np.uint8)
                padded[: bits.size] = bits
                words[layer] = padded.view(np.uint64)
                kept[layer] = _ones(words[layer])
                shapes[layer] = shape
    except (OSError, SafetensorError, TypeError) as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    return Masks(words, kept, shapes)


def jaccard(first: Masks, second: Masks) -> tuple[float, float] | None:
    """Return the Jaccard index of two runs' masks and its value by chance, or None where their layers differ."""
    if first.shapes != second.shapes or not first.shapes:
        return None
    common, expected = 0, 0.0
    for layer, words in first.words.items():
        common += _ones(words & second.words[layer])
        expected += first.kept[layer] * second.kept[layer] / math.prod(first.shapes[layer])
    total = sum(first.kept.values()) + sum(second.kept.values())
    if total == 0:
        return None
    return common / (total - common), expected / (total - expected)


def overlaps(comparison: Comparison) -> tuple[list[Overlap], list[str]]:
    """Compare masks between the methods of one seed, and between the seeds of one method, at each sparsity.

    Returns:
        The matrices, and a sentence for every mask file that could not be used.
    """
    notes: dict[str, str] = {}
    cache: dict[str, Masks | None] = {}

    def masks_of(run: Run) -> Masks | None:
        if run.name not in cache:
            cache[run.name] = _masks_of(run, notes)
        return cache[run.name]

    found: list[Overlap] = []
    for title, runs, names in _groups(comparison):
        usable = [(name, masks) for run, name in zip(runs, names, strict=True) if (masks := masks_of(run)) is not None]
        if len(usable) > 1:
            found.append(_matrix(title, usable[:LARGEST_GROUP]))
        if sum(words.nbytes for held in cache.values() if held for words in held.words.values()) > 500_000_000:
            cache.clear()
    return found, list(notes.values())


def _groups(comparison: Comparison) -> Iterator[tuple[str, list[Run], list[str]]]:
    runs = [run for run in comparison.finished if run.result and run.result.masks and run.sparsity is not None]
    for sparsity in sorted({run.sparsity for run in runs if run.sparsity is not None}):
        here = [run for run in runs if run.sparsity == sparsity]
        for seed in sorted({run.seed for run in here if run.seed is not None}):
            group = [run for run in here if run.seed == seed]
            yield f"Methods at {percent(sparsity)}, seed {seed}", group, [run.label or run.name for run in group]
        for label in dict.fromkeys(run.label for run in here):
            group = [run for run in here if run.label == label]
            yield f"Seeds of {label} at {percent(sparsity)}", group, [f"seed {run.seed}" for run in group]


def _masks_of(run: Run, notes: dict[str, str]) -> Masks | None:
    stated = run.result.masks if run.result else None
    if not stated:
        return None
    try:
        if Path(stated).name != stated:
            raise ValueError(f"result.json names {stated!r}, which is not a file of the run's own folder")
        masks = read_masks(run.folder / stated)
        claimed = {layer.name: layer.kept for layer in run.result.layers} if run.result else {}
        for layer, kept in masks.kept.items():
            if claimed.get(layer, kept) != kept:
                raise ValueError(f"layer {layer!r} keeps {kept} weights, but result.json says {claimed[layer]}")
        full = all(kept == math.prod(masks.shapes[layer]) for layer, kept in masks.kept.items())
        return None if full else masks  # a narrower dense net has nothing to compare
    except ValueError as error:
        notes[run.name] = f"The masks of {run.name} cannot be used: {error}."
        return None


def _matrix(title: str, usable: Sequence[tuple[str, Masks]]) -> Overlap:
    size = len(usable)
    values: list[list[float | None]] = [[None] * size for _ in range(size)]
    chance: list[list[float | None]] = [[None] * size for _ in range(size)]
    for row in range(size):
        for column in range(row, size):
            pair = jaccard(usable[row][1], usable[column][1])
            if pair is not None:
                values[row][column] = values[column][row] = pair[0]
                chance[row][column] = chance[column][row] = pair[1]
    return Overlap(title, tuple(name for name, _ in usable), tuple(map(tuple, values)), tuple(map(tuple, chance)))


def _ones(words: np.ndarray) -> int:
    if hasattr(np, "bitwise_count"):
        return int(np.bitwise_count(words).sum(dtype=np.int64))
    return int(np.unpackbits(words.view(np.uint8)).sum(dtype=np.int64))  # NumPy before 2.0
