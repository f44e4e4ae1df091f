"""Retraining schedules against their closed forms."""

from __future__ import annotations

import math
import re

import pytest

from rarefy.errors import OptionError
from rarefy.schedules import RETRAININGS, retraining

LOGGED = [0.02, 0.06] + [0.1] * 30 + [0.01] * 20 + [0.001] * 8
N = 20


@pytest.mark.parametrize("name", RETRAININGS)
def test_ends_and_warm_up(name: str) -> None:
    rate = retraining(name, LOGGED, N, warm_up=2, distance=0.3, fraction=0.25)
    top = {"allr": 0.1 * 0.6}.get(name, 0.1)
    if name == "ft":
        assert {rate(t) for t in range(N + 1)} == {0.001}
    elif name == "lrw":
        assert [rate(t) for t in range(N)] == LOGGED[-N:]
    else:
        assert rate(0) == 0.0 and rate(2) == pytest.approx(top)
        assert rate(1) == pytest.approx(top / 2)
        assert rate(N) == pytest.approx({"slr": 0.001, "clr": 0.001}.get(name, 0.0))
        rest = [rate(t) for t in range(2, N + 1)]
        assert rest == sorted(rest, reverse=True)


def test_shapes_between_the_ends() -> None:
    u = (11 - 2) / (N - 2)
    assert retraining("clr", LOGGED, N, warm_up=2)(11) == pytest.approx(0.001 + 0.099 * (1 + math.cos(math.pi * u)) / 2)
    assert retraining("llr", LOGGED, N)(11) == pytest.approx(0.1 * (1 - u))
    assert retraining("slr", LOGGED, N, warm_up=2)(12) == LOGGED[int((12 - 2) / (N - 2) * len(LOGGED))]
    assert retraining("slr", LOGGED, N, warm_up=2)(2) == 0.1, "the warm-up part counts as the largest rate"
    assert retraining("clr", LOGGED, N)(N) == min(LOGGED)
    short = retraining("llr", LOGGED, 5)  # no warm-up: fewer than ten steps
    assert [short(t) for t in (0, 5)] == [0.1, 0.0]


@pytest.mark.parametrize("distance", [0.0, 0.1, 0.5, 0.7, 3.0])
def test_allr_stays_within_its_bounds(distance: float) -> None:
    top = retraining("allr", LOGGED, N, distance=distance, fraction=0.25)(2)
    assert N / len(LOGGED) * 0.1 <= top + 1e-12 and top <= 0.1
    assert (top == pytest.approx(0.1)) == (distance >= math.sqrt(0.25))


@pytest.mark.parametrize(
    ("name", "logged", "steps", "options", "said"),
    [
        ("lwr", LOGGED, N, {}, "did you mean"),
        ("llr", [], N, {}, "0 logged"),
        ("llr", LOGGED, 0, {}, "at least 1"),
        ("lrw", LOGGED, 61, {}, "60 were logged"),
        ("allr", LOGGED, N, {}, "needs distance and fraction"),
        ("clr", LOGGED, N, {"warm_up": 60}, "60 of them warm-up"),
    ],
)
def test_errors(name: str, logged: list[float], steps: int, options: dict[str, int], said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        retraining(name, logged, steps, **options)
    with pytest.raises(OptionError, match="step 21 is not in"):
        retraining("llr", LOGGED, N)(21)
