"""How many masks a pattern allows: counted exactly, and as the paper on transposable masks counts them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from rarefy.errors import OptionError
from rarefy.patterns import Pattern, TransposableNM, parse_pattern

_MOST_STATES = 25_000  # a second or two of counting


class Diversity(NamedTuple):
    """The number of masks of one shape and sparsity that a pattern allows.

    Attributes:
        exact: their number.
        formula: what "Accelerated sparse neural training" (arXiv 2102.08124) counts. The same, but for transposable N:M, where
            it is (M! (M-1)! ... (M-N+1)!) per tile: 1.6 times too many for 2:4, 150 times for 4:8, too few for 2:16.
    """

    exact: int
    formula: int


def mask_diversity(pattern: Pattern | str, shape: Sequence[int], sparsity: float | None = None) -> Diversity:
    """Count the masks of a weight that follow a pattern at a sparsity; their logarithms: `math.log10(d.exact)`.

    Args:
        pattern: a pattern, or its text.
        shape: the weight's shape.
        sparsity: fraction of zeros; None where the pattern prescribes it. Every group
            keeps `pattern.keep(shape, 1 - sparsity)`.

    Raises:
        PatternError: the shape does not fit.
        OptionError: no sparsity, or not what the pattern prescribes, or a transposable pattern too large to count (see
            `transposable_masks`).

    >>> mask_diversity("2:4", [8, 8])
    Diversity(exact=2821109907456, formula=2821109907456)
    >>> mask_diversity("2:4t", [8, 8])
    Diversity(exact=65610000, formula=429981696)
    """
    pattern = parse_pattern(pattern)
    groups, units = pattern.units(shape)
    keep = pattern.keep(shape, None if sparsity is None else 1 - sparsity)
    if isinstance(pattern, TransposableNM):
        formula = math.prod(math.factorial(pattern.m - i) for i in range(pattern.n))
        return Diversity(transposable_masks(pattern.n, pattern.m) ** groups, formula**groups)
    number = math.comb(units, keep) ** groups
    return Diversity(number, number)


def sequential_diversity(n: int, m: int, weights: int) -> int:
    """Count the masks that keep one run of n neighbours in each m, of so many weights: (m - n + 1)^(weights / m).

    Raises OptionError where m does not divide the number of weights, or n is not in [1, m].

    >>> sequential_diversity(4, 8, 64)
    390625
    """
    if not 1 <= n <= m or weights % m:
        raise OptionError(
            f"{weights} weights are not runs of {m} with {n} kept in each; weights must be a multiple of m"
        )
    return int((m - n + 1) ** (weights // m))


@cache
def transposable_masks(n: int, m: int) -> int:
    """Count the m x m matrices of zeros and ones whose rows and columns all hold n ones, exactly.

    Row by row: what counts is how many columns still want r ones, for each r, not which. At most about C(m + n, n) such
    states, for the smaller of n and m - n.

    Raises:
        OptionError: n outside [0, m], or more than 25 000 states (8:16 has 735 471).

    >>> transposable_masks(2, 4), transposable_masks(4, 8)
    (90, 116963796250)
    """
    if not 0 <= n <= m:
        raise OptionError(f"{n} ones in each line of {m} cannot be; n must lie in [0, {m}]")
    n = min(n, m - n)
    states = math.comb(m + n, n)
    if states > _MOST_STATES:
        raise OptionError(
            f"the masks of {n}:{m} along rows and columns are too many to count: {states} states, and {_MOST_STATES} are the "
            "most that is quick; take a smaller m, or n further from m / 2"
        )
    counts = {(0,) * n + (m,): 1}  # how many columns still want 0, 1, ..., n
    for _ in range(m):
        after: dict[tuple[int, ...], int] = {}
        for wants, number in counts.items():
            for chosen, ways in _rows(wants, n):
                left = list(wants)
                for r, k in enumerate(chosen, start=1):
                    left[r] -= k
                    left[r - 1] += k
                after[tuple(left)] = after.get(tuple(left), 0) + number * ways
        counts = after
    return counts[(m,) + (0,) * n]


def _rows(wants: tuple[int, ...], n: int) -> list[tuple[tuple[int, ...], int]]:
    """Ways to put n ones into columns that want 1, 2, ... more: how many of each kind, and how many rows that makes."""
    found: list[tuple[tuple[int, ...], int, int]] = [((), 1, n)]
    for here in wants[1:]:
        found = [
            ((*chosen, k), ways * math.comb(here, k), rest - k)
            for chosen, ways, rest in found
            for k in range(min(here, rest) + 1)
        ]
    return [(chosen, ways) for chosen, ways, rest in found if rest == 0]
