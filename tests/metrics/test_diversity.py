"""Numbers of masks: against the published integers, by going through all masks, and as sums over other counts."""

from __future__ import annotations

import itertools
import math

import pytest

from rarefy.errors import OptionError, PatternError
from rarefy.metrics import Diversity, mask_diversity, sequential_diversity, transposable_masks


@pytest.mark.parametrize(
    ("n", "m", "number"),
    [(2, 4, 90), (2, 8, 187530840), (4, 8, 116963796250), (3, 6, 297200), (5, 10, 6736218287430460752)],
)
def test_published_numbers_of_matrices(n: int, m: int, number: int) -> None:
    assert transposable_masks(n, m) == transposable_masks(m - n, m) == number


@pytest.mark.parametrize("m", range(1, 5))
def test_all_matrices_gone_through(m: int) -> None:
    lines = list(itertools.product((0, 1), repeat=m))
    for n in range(m + 1):
        rows = [line for line in lines if sum(line) == n]
        choices = itertools.product(rows, repeat=m)
        found = sum(all(sum(column) == n for column in zip(*choice, strict=True)) for choice in choices)
        assert transposable_masks(n, m) == found
    assert transposable_masks(1, m) == math.factorial(m)


def test_the_paper_s_table_for_64_weights() -> None:
    assert mask_diversity("unstructured", [8, 8], 0.5).exact == 1832624140942590534
    assert mask_diversity("4:8", [8, 8]).exact == 70**8 == 576480100000000
    assert mask_diversity("2:4", [8, 8]).exact == 6**16 == 2821109907456
    assert mask_diversity("4:8t", [8, 8]) == Diversity(116963796250, 17557585920000)
    assert mask_diversity("2:8t", [8, 8]) == Diversity(187530840, 203212800)
    assert mask_diversity("2:4t", [8, 8]) == Diversity(90**4, 144**4)
    assert sequential_diversity(4, 8, 64) == 390625


def test_groups_multiply() -> None:
    assert mask_diversity("2:4t", [8, 4, 3]).exact == 90**6
    assert mask_diversity("fan-in", [3, 8], 0.75).exact == math.comb(8, 2) ** 3
    assert mask_diversity("2x2", [4, 4], 0.5).exact == math.comb(4, 2)
    assert mask_diversity("4:8t-exact", [8, 8]) == mask_diversity("4:8t", [8, 8])


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(OptionError, match=r"8:16 .* 735471 states"):
        transposable_masks(8, 16)
    with pytest.raises(OptionError, match="n must lie"):
        transposable_masks(5, 4)
    with pytest.raises(OptionError, match="multiple of m"):
        sequential_diversity(4, 8, 60)
    with pytest.raises(OptionError, match="no density"):
        mask_diversity("unstructured", [8, 8])
    with pytest.raises(OptionError, match="density"):
        mask_diversity("2:4t", [8, 8], 0.9)
    with pytest.raises(PatternError, match="multiple of 8"):
        mask_diversity("4:8t", [8, 12])
