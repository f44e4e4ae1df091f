"""Mean, spread and a paired comparison over seeds, without leaning on SciPy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rarefy.errors import OptionError


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean, summed without rounding loss. OptionError where there are no values."""
    if not values:
        raise OptionError("the mean of no values does not exist")
    return math.fsum(values) / len(values)


def sd(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation (divided by n - 1); None for fewer than 2 values."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), a, b > 0, x in [0, 1], to about 1e-13.

    Lentz's method on the continued fraction 26.5.8 of Abramowitz & Stegun, on the side where it converges fast.
    """
    if not (a > 0 and b > 0 and 0 <= x <= 1):
        raise OptionError(f"incomplete_beta needs a, b > 0 and x in [0, 1], got {a}, {b}, {x}")
    if x in (0.0, 1.0):
        return float(x)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    return front * _fraction(a, b, x) / a


def _fraction(a: float, b: float, x: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1.0 + step * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + step / c
            c = c if abs(c) > tiny else tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return value


def student_t_tails(t: float, df: float) -> float:
    """Return P(|T| >= |t|) for Student's t with `df` > 0 degrees of freedom: the two-sided p value."""
    if df <= 0:
        raise OptionError(f"degrees of freedom must be positive, got {df}")
    if math.isinf(t):
        return 0.0
    if t * t < df:  # 1 - x loses its digits near t = 0; the mirrored form does not
        return 1.0 - incomplete_beta(0.5, df / 2, t * t / (df + t * t))
    return incomplete_beta(df / 2, 0.5, df / (df + t * t))


def student_t_cdf(t: float, df: float) -> float:
    """Return P(T <= t) for Student's t with `df` > 0 degrees of freedom (Abramowitz & Stegun 26.7.1)."""
    tail = student_t_tails(t, df) / 2
    return 1.0 - tail if t > 0 else tail


def student_t_quantile(p: float, df: float) -> float:
    """Return the t with P(T <= t) = p, 0 < p < 1, by bisection to the last bits.

    >>> round(student_t_quantile(0.975, 4), 6)
    2.776445
    """
    if not 0 < p < 1:
        raise OptionError(f"p must lie between 0 and 1, got {p}")
    if p < 0.5:
        return -student_t_quantile(1 - p, df)
    target = 2 * (1 - p)  # two-sided tail: keeps its digits where p is close to 1
    low, high = 0.0, 1.0
    while student_t_tails(high, df) > target:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if student_t_tails(middle, df) > target else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class PairedTest:
    """A paired t-test: the mean difference first minus second, its interval, and how surprising it is.

    Attributes:
        n: number of pairs.
        difference: mean of the differences, in the unit of the values.
        sd: their standard deviation (n - 1).
        t: difference / (sd / sqrt(n)); infinite where all differences are equal and not 0, 0 where all are 0.
        p: two-sided p value.
        low, high: interval of the mean difference at the `confidence` that was asked for.
    """

    n: int
    difference: float
    sd: float
    t: float
    p: float
    low: float
    high: float
    confidence: float

    @property
    def df(self) -> int:
        """Degrees of freedom, n - 1."""
        return self.n - 1

    @property
    def differs(self) -> bool:
        """Tell whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def within(self, margin: float) -> bool:
        """Tell whether the whole interval lies in [-margin, margin]: the two match up to the margin."""
        return -margin <= self.low and self.high <= margin


Values = Sequence[float] | Mapping[int, float]


def paired_t_test(first: Values, second: Values, confidence: float = 0.95) -> PairedTest | None:
    """Compare two methods over the same seeds; None for fewer than 2 pairs.

    Args:
        first, second: values in the same order, or mappings from seed to value, of which the common seeds are paired.
        confidence: of the two-sided interval, between 0 and 1.

    Raises:
        OptionError: sequences of different lengths, NaN or infinite values, a confidence out of range.

    Equal differences have no spread to measure: the interval shrinks to the difference itself and p to 0 (or 1 where
    all are 0). With few seeds that says little: look at `n`.

    >>> test = paired_t_test([94.1, 93.8, 94.3], [93.6, 93.5, 93.7])
    >>> round(test.difference, 4), round(test.t, 4), test.differs
    (0.4667, 5.2915, True)
    """
    if not 0 < confidence < 1:
        raise OptionError(f"confidence must lie between 0 and 1, got {confidence}")
    pairs = _pairs(first, second)
    if not all(math.isfinite(value) for pair in pairs for value in pair):
        raise OptionError("the values to compare must be finite numbers")
    n = len(pairs)
    if n < 2:
        return None
    differences = [a - b for a, b in pairs]
    difference, spread = mean(differences), sd(differences)
    assert spread is not None
    scale = max(abs(value) for pair in pairs for value in pair)
    if spread <= 4e-16 * scale:  # equal up to the rounding of the subtraction
        zero = abs(difference) <= 4e-16 * scale
        t = 0.0 if zero else math.copysign(math.inf, difference)
        return PairedTest(n, difference, spread, t, 1.0 if zero else 0.0, difference, difference, confidence)
    error = spread / math.sqrt(n)
    t = difference / error
    reach = student_t_quantile((1 + confidence) / 2, n - 1) * error
    p = student_t_tails(t, n - 1)
    return PairedTest(n, difference, spread, t, p, difference - reach, difference + reach, confidence)


def _pairs(first: Values, second: Values) -> list[tuple[float, float]]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return [(first[seed], second[seed]) for seed in first if seed in second]
    if isinstance(first, Mapping) or isinstance(second, Mapping):
        raise OptionError("give both methods as mappings from seed to value, or both as sequences in seed order")
    if len(first) != len(second):
        raise OptionError(f"{len(first)} and {len(second)} values cannot be paired; give mappings from seed to value")
    return list(zip(first, second, strict=True))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values corrected for the number of comparisons (Holm 1979), in the order given; None stays None.

    Sorted p_(1) <= ... <= p_(m): corrected p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)).

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    given = [(p, i) for i, p in enumerate(p_values) if p is not None]
    if any(not 0 <= p <= 1 for p, _ in given):
        raise OptionError("p values must lie in [0, 1]")
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(sorted(given)):
        largest = max(largest, min(1.0, (len(given) - rank) * p))
        corrected[i] = largest
    return corrected
