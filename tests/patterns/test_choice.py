"""Which N:M for which sparsity: the paper's rule, against its own numbers and against scipy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from rarefy.errors import OptionError
from rarefy.patterns import NM, nm_for


@pytest.mark.parametrize(
    ("sparsity", "m", "n", "sure"),
    [(0.8, 4, 2, 0.9728), (0.8, 8, 4, 0.9896), (0.8, 16, 6, 0.9733), (0.9, 8, 2, 0.9619), (0.95, 4, 1, 0.9860)],
)
def test_the_papers_numbers(sparsity: float, m: int, n: int, sure: float) -> None:
    assert nm_for(sparsity, m) == NM(n, m)
    assert binom.sf(m - n - 1, m, sparsity) == pytest.approx(sure, abs=5e-5)
    assert nm_for(sparsity, m, sure - 1e-4) == NM(n, m) and nm_for(sparsity, m, sure + 1e-4).n > n


@given(st.floats(0, 0.999), st.integers(1, 40), st.floats(0, 0.999))
def test_the_sparsest_that_is_sure_enough(sparsity: float, m: int, confidence: float) -> None:
    n = nm_for(sparsity, m, confidence).n
    slack = 1e-9
    if n < m:
        assert binom.sf(m - n - 1, m, sparsity) > confidence - slack
    if n > 1:
        assert binom.sf(m - n, m, sparsity) <= confidence + slack


def test_ends_and_errors() -> None:
    assert nm_for(0.0, 4) == NM(4, 4) and nm_for(0.999, 4) == NM(1, 4)
    assert nm_for(0.5, 1024).n == 1024 - int(binom.ppf(0.05, 1024, 0.5))
    for wrong in (
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"sparsity": float("nan")},
        {"confidence": 1.0},
        {"m": 0},
        {"m": 2.5},
        {"m": 1025},
    ):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            nm_for(**{"sparsity": 0.5, "m": 4, **wrong})  # type: ignore[arg-type]
