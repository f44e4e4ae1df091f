"""Which pattern the zeros of a weight follow: the narrowest family of masks that holds this one, if that is no accident."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.patterns import NM, Block, FanIn, Pattern

SURE = 20.0  # bits: a random mask with as many zeros falls into a family this much smaller once in a million times
_LARGEST_M = 32
_LARGEST_SIDE = 64
_SAMPLE = 1 << 18
_TIGHT = 0.9  # share of groups that keep exactly the largest number: kept weights may be zero by themselves


class Found(NamedTuple):
    """The pattern of a weight's zeros.

    Attributes:
        pattern: "dense", "empty" (all zero), "unstructured", or "2:4", "2:4@0", "4x1", "row", "column", "fan-in" as
            `rarefy.patterns` writes them, or "row+column" (whole rows and columns), "kernel" (whole kernels of a
            convolution), "fan-out" (every input feeds equally many outputs).
        also: other patterns that hold beside it; for a transposable mask N:M along the other dimension.
        bits: log2 of the number of masks in that family.
        unstructured_bits: log2 of the number of all masks with as many zeros.
        zero_rows, zero_columns: rows (dimension 0) and columns (dimension 1) that are all zero.
    """

    pattern: str
    also: tuple[str, ...]
    bits: float
    unstructured_bits: float
    zero_rows: int
    zero_columns: int


def detect(weight: Tensor) -> Found:
    """Find the pattern that the zeros of a weight or mask follow.

    Of all patterns that hold, the one with the fewest masks is the answer, as the shortest description is; a pattern
    counts only where a random mask with as many zeros would follow it less than once in a million times (20 bits), so that a
    small or very sparse layer is not called structured by accident. N:M, constant fan-in and fan-out hold where no
    group keeps more than N and at least 90 % keep exactly N.

    Args:
        weight: bool (True = kept) or numbers (exact zeros), with two or more dimensions.

    Raises OptionError for fewer dimensions or no entries.

    >>> from rarefy.patterns import NM
    >>> detect(NM(2, 4).project(torch.randn(16, 32), keep=2)).pattern
    '2:4'
    >>> detect(torch.rand(64, 64) < 0.1).pattern
    'unstructured'
    """
    if weight.dim() < 2 or weight.numel() == 0:
        raise OptionError(f"a weight of shape {list(weight.shape)} has no pattern: it needs two dimensions and entries")
    mask = weight if weight.dtype == torch.bool else nonzero(weight)
    kept, numel = int(mask.sum()), mask.numel()
    rows, columns = (mask.transpose(0, dim).flatten(1).any(1) for dim in (0, 1))
    zero_rows, zero_columns = int((~rows).sum()), int((~columns).sum())
    unstructured = _choices(numel, kept)
    if kept in (0, numel):
        return Found("dense" if kept else "empty", (), 0.0, 0.0, zero_rows, zero_columns)
    found = [(bits, name) for name, bits in _candidates(mask, rows, columns, kept) if unstructured - bits >= SURE]
    if not found:
        return Found("unstructured", (), unstructured, unstructured, zero_rows, zero_columns)
    bits, name = min(found, key=lambda item: item[0])
    base, _, _ = name.partition("@")
    other = tuple(n for _, n in found if n != name and ":" in name and n.partition("@")[0] == base)
    return Found(name, other, bits, unstructured, zero_rows, zero_columns)


def nonzero(weight: Tensor) -> Tensor:
    """Return where entries are not exactly zero, also for 8-bit floats, which know no comparison."""
    try:
        return weight != 0
    except (RuntimeError, NotImplementedError):
        return weight.float() != 0


def _candidates(mask: Tensor, rows: Tensor, columns: Tensor, kept: int) -> Iterator[tuple[str, float]]:
    """Yield each pattern that holds, with the log2 of how many masks it has at these counts."""
    r, c = int(rows.sum()), int(columns.sum())
    per_cell = mask[0, 0].numel()
    choose_rows, choose_columns = _choices(len(rows), r), _choices(len(columns), c)
    if kept == r * c * per_cell:  # nothing but whole rows and columns
        if c == len(columns):
            yield "row", choose_rows
        elif r == len(rows):
            yield "column", choose_columns
        else:
            yield "row+column", choose_rows + choose_columns
    if per_cell > 1:
        whole = mask.flatten(2).all(2)
        if int(whole.sum()) * per_cell == kept:
            yield "kernel", _choices(whole.numel(), int(whole.sum()))
    sides = [_largest_side(mask, dim) for dim in (0, 1)]
    if sides != [1, 1]:
        block = Block(*sides)
        size = sides[0] * sides[1]
        yield str(block), _choices(mask.numel() // size, kept // size)
    for dim in (0, 1):
        for m in range(2, min(_LARGEST_M, mask.shape[dim] // 2) + 1):
            if mask.shape[dim] % m == 0 and (found := _per_group(mask, NM(1, m, dim), m)):
                yield str(NM(found[0], m, dim)), found[1]
    for name, turned in (("fan-in", mask), ("fan-out", mask.transpose(0, 1))):
        if found := _per_group(turned, FanIn(), math.prod(turned.shape[1:])):
            yield name, found[1]


def _per_group(mask: Tensor, pattern: Pattern, size: int) -> tuple[int, float] | None:
    """Return (N, bits) where no group of `size` weights keeps more than N < size, and nearly all keep exactly N."""
    step = size if isinstance(pattern, NM) and pattern.dim == 0 else 1
    few = max(step, _SAMPLE // mask[0].numel() // step * step)
    if few < len(mask) and not _tight(pattern.pool(mask[:few]).sum(1), size):
        return None
    counts = pattern.pool(mask).sum(1)
    if not _tight(counts, size):
        return None
    # masks with this histogram of counts: which groups have which count, times the choices within each group
    histogram = torch.bincount(counts, minlength=size + 1).tolist()
    arrangements = _log2_factorial(len(counts)) - sum(_log2_factorial(h) for h in histogram)
    within = sum(h * _choices(size, n) for n, h in enumerate(histogram) if h)
    return int(counts.max()), arrangements + within


def _tight(counts: Tensor, size: int) -> bool:
    """Whether no group is full, and nearly all that keep anything keep the same number."""
    largest = int(counts.max())
    some = int((counts > 0).sum())
    return 0 < largest < size and int((counts == largest).sum()) >= _TIGHT * some


def _largest_side(mask: Tensor, dim: int) -> int:
    """Return the largest block side along a dimension within which weights live and die together."""
    for side in range(min(_LARGEST_SIDE, mask.shape[dim]), 1, -1):
        if mask.shape[dim] % side:
            continue
        few = max(side, _SAMPLE // mask[0].numel() // side * side)
        if all(_alike(part, dim, side) for part in (mask[:few], mask)):
            return side
    return 1


def _alike(mask: Tensor, dim: int, side: int) -> bool:
    cut = mask.unflatten(dim, (-1, side))
    return torch.equal(cut.all(dim + 1), cut.any(dim + 1))


def _choices(n: int, k: int) -> float:
    """log2 of n over k."""
    return _log2_factorial(n) - _log2_factorial(k) - _log2_factorial(n - k)


def _log2_factorial(n: int) -> float:
    return math.lgamma(n + 1) / math.log(2)
