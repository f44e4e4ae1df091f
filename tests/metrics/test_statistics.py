"""Statistics against SciPy."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import scipy.special
import scipy.stats

from rarefy import metrics
from rarefy.errors import OptionError
from rarefy.metrics import holm, mean, paired_t_test, sd
from rarefy.metrics.statistics import incomplete_beta, student_t_cdf, student_t_quantile, student_t_tails

AB = [0.5, 1.0, 2.5, 10.0, 80.0]


@pytest.mark.parametrize("a", AB)
@pytest.mark.parametrize("b", AB)
def test_incomplete_beta(a: float, b: float) -> None:
    for x in (0.0, 1e-9, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0):
        assert incomplete_beta(a, b, x) == pytest.approx(scipy.special.betainc(a, b, x), rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 9, 30, 1000])
def test_student_t(df: int) -> None:
    for t in (-50.0, -3.2, -1.0, -1e-6, 0.0, 1e-9, 0.2, 1.0, 2.776, 12.0, 400.0):
        assert student_t_cdf(t, df) == pytest.approx(scipy.stats.t.cdf(t, df), rel=1e-9)
        assert student_t_tails(t, df) == pytest.approx(2 * scipy.stats.t.sf(abs(t), df), rel=1e-8)
        if df == 1:  # Cauchy: closed form, more exact than SciPy near 0
            assert student_t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, rel=1e-12)
    for p in (0.005, 0.3, 0.5, 0.8, 0.975, 0.9995):
        assert student_t_quantile(p, df) == pytest.approx(scipy.stats.t.ppf(p, df), rel=1e-10, abs=1e-12)
    assert student_t_cdf(math.inf, df) == 1.0 and student_t_cdf(-math.inf, df) == 0.0


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_paired_t_test_against_scipy(n: int, confidence: float) -> None:
    rng = random.Random(n)
    first = [94 + rng.gauss(0, 1) for _ in range(n)]
    second = [93.5 + rng.gauss(0, 1) for _ in range(n)]
    got, expected = paired_t_test(first, second, confidence), scipy.stats.ttest_rel(first, second)
    interval = expected.confidence_interval(confidence)
    assert got is not None and got.n == n and got.df == expected.df
    assert (got.t, got.p) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-10)
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert got.differs == (interval.low > 0 or interval.high < 0)
    flipped = paired_t_test(second, first, confidence)
    assert flipped is not None and flipped.p == got.p and flipped.low == pytest.approx(-got.high)


def test_pairs_by_seed() -> None:
    first, second = {0: 1.0, 1: 2.0, 2: 4.0, 7: 9.0}, {2: 3.0, 1: 1.5, 0: 0.9, 5: 0.0}
    assert paired_t_test(first, second) == paired_t_test([1.0, 2.0, 4.0], [0.9, 1.5, 3.0])
    assert paired_t_test({0: 1.0, 1: 2.0}, {1: 1.0}) is None
    assert paired_t_test([], []) is None and paired_t_test([1.0], [2.0]) is None


def test_differences_without_spread() -> None:
    same = paired_t_test([0.93, 0.95, 0.94], [0.93, 0.95, 0.94])
    assert same is not None and (same.t, same.p, same.low, same.high) == (0.0, 1.0, 0.0, 0.0) and not same.differs
    shifted = paired_t_test([0.3, 0.4, 0.7], [0.2, 0.3, 0.6])  # 0.1 up to rounding
    assert shifted is not None and (shifted.t, shifted.p) == (math.inf, 0.0) and shifted.differs
    assert shifted.low == shifted.high == pytest.approx(0.1) and shifted.within(0.11) and not shifted.within(0.05)
    worse = paired_t_test([1.0, 1.0], [2.0, 2.0])
    assert worse is not None and worse.t == -math.inf


def test_bad_input_is_refused() -> None:
    with pytest.raises(OptionError, match="3 and 2 values"):
        paired_t_test([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(OptionError, match="both"):
        paired_t_test({0: 1.0}, [1.0])
    with pytest.raises(OptionError, match="finite"):
        paired_t_test([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(OptionError, match="confidence"):
        paired_t_test([1.0, 2.0], [1.0, 3.0], confidence=95)
    with pytest.raises(OptionError):
        student_t_quantile(1.0, 3)
    with pytest.raises(OptionError):
        student_t_tails(1.0, 0)
    with pytest.raises(OptionError):
        mean([])


def test_mean_and_sd() -> None:
    assert mean([1.0, 2.0, 4.0]) == pytest.approx(7 / 3) and sd([1.0, 2.0, 4.0]) == pytest.approx(math.sqrt(7 / 3))
    assert sd([5.0]) is None and sd([]) is None and sd([2.0, 2.0]) == 0.0


def test_holm() -> None:
    p = [0.01, 0.02, 0.03, 0.005, 0.5]
    by_hand = [0.04, 0.06, 0.06, 0.025, 0.5]  # sorted: .005*5, .01*4, .02*3, .03*2, .5*1, then running maximum
    assert holm(p) == pytest.approx(by_hand)
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([None]) == [None] and holm([0.02]) == [0.02]
    with pytest.raises(OptionError):
        holm([1.2])


def test_scipy_is_not_needed_at_run_time() -> None:
    for file in Path(metrics.__file__).parent.glob("*.py"):
        assert "import scipy" not in file.read_text(), file.name
