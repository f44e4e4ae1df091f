"""Update times, curves and decays: exact values at the ends and in the middle, and wrong input."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import OptionError
from rarefy.schedules import CURVES, DECAYS, Clock, check_times, curve, decay

SPARSITY = st.floats(0.0, 0.999)
PROGRESS = st.floats(0.0, 1.0)
QUICK = settings(max_examples=50, deadline=None)


def due(clock: Clock, until: int) -> list[int]:
    return [t for t in range(until + 1) if clock.due(t)]


def test_updates_come_on_the_grid_and_at_the_stop() -> None:
    assert due(Clock(every=10, start=0, stop=40), 60) == [10, 20, 30, 40]
    assert due(Clock(every=10, start=5, stop=40), 60) == [5, 15, 25, 35, 40]
    assert due(Clock(every=100, start=5, stop=40), 60) == [5, 40]
    assert due(Clock(every=1, start=3, stop=3), 9) == [3]
    assert due(Clock(every=7, start=0, stop=0), 9) == []


def test_fractions_are_parts_of_the_run() -> None:
    clock = Clock(every=30, start=0.1, stop=0.75, total=200)
    assert (clock.first, clock.last) == (20, 150)
    assert due(clock, 200) == [20, 50, 80, 110, 140, 150]
    mixed = Clock(every=30, start=0.1, stop=100, total=200)
    assert (mixed.first, mixed.last) == (20, 100)
    assert Clock(start=1, stop=1.0, total=50).last == 50 and Clock(start=1).first == 1
    assert Clock(stop=0.5, total=5).last == 3  # to the nearest step, halves up


def test_without_a_stop_updates_go_on_for_ever() -> None:
    clock = Clock(every=10, start=3)
    assert clock.last is None
    assert due(clock, 30) == [3, 13, 23] and clock.due(3 + 10 * 10**6)
    assert {clock.progress(t) for t in (0, 3, 100, 10**9)} == {0.0}
    assert decay("cosine")(0.3, clock.progress(10**6)) == 0.3
    known = Clock(every=10, start=20, total=120)
    assert known.last is None and not known.due(119)
    assert [known.progress(t) for t in (0, 20, 70, 120, 500)] == [
        0.0,
        0.0,
        0.5,
        1.0,
        1.0,
    ]
    assert Clock(every=7, total=20).due(21)


def test_progress() -> None:
    clock = Clock(every=10, start=100, stop=300)
    assert [clock.progress(t) for t in (0, 100, 150, 200, 300, 301)] == [
        0.0,
        0.0,
        0.25,
        0.5,
        1.0,
        1.0,
    ]
    assert [Clock(start=5, stop=5).progress(t) for t in (4, 5, 6)] == [0.0, 1.0, 1.0]


@QUICK
@given(
    every=st.integers(1, 50),
    start=st.integers(0, 100),
    length=st.integers(0, 200),
    extra=st.integers(1, 100),
)
def test_every_schedule_reaches_its_end(every: int, start: int, length: int, extra: int) -> None:
    clock = Clock(every=every, start=start, stop=start + length, total=start + length + extra)
    times = due(clock, start + length + extra)
    expected = set(range(start, start + length + 1, every)) | {start + length}
    assert times == sorted(expected - {0})
    if times:
        assert times[-1] == clock.last and clock.progress(times[-1]) == 1.0
    steps = [clock.progress(t) for t in times]
    assert steps == sorted(steps)


@pytest.mark.parametrize(("start", "stop"), [(0.1, None), (0, 0.75), (1.0, 5)])
def test_a_fraction_needs_the_length_of_the_run(start: float, stop: float | None) -> None:
    with pytest.raises(OptionError, match="pass total_steps"):
        Clock(start=start, stop=stop)
    check_times(100, start, stop)  # the options themselves are right


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"every": 2.5}, r"every is 2\.5"),
        ({"every": True}, "every is True"),
        ({"start": -1}, "start is -1"),
        ({"start": 1.5, "total": 10}, r"start is 1\.5; .*between 0\.0 and 1\.0"),
        ({"stop": math.nan, "total": 10}, "stop is nan"),
        ({"stop": "end"}, "stop is 'end'"),
        ({"start": None}, "start is None"),
        ({"start": True}, "start is True"),
        ({"start": 20, "stop": 10}, "start is 20, after stop, 10"),
        ({"start": 0.5, "stop": 0.4, "total": 10}, r"start is 0\.5, after stop, 0\.4"),
        ({"start": 0.5, "stop": 4, "total": 10}, "start is step 5, after stop, step 4"),
        ({"stop": 200, "total": 100}, "stop is step 200, after total_steps, step 100"),
        (
            {"start": 200, "total": 100},
            "start is step 200, after total_steps, step 100",
        ),
        ({"total": 0}, "total_steps is 0"),
        ({"total": 10.0}, r"total_steps is 10\.0"),
    ],
)
def test_impossible_times_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Clock(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CURVES)
@QUICK
@given(initial=SPARSITY, final=SPARSITY, first=PROGRESS, second=PROGRESS)
def test_curves_start_end_and_never_turn(name: str, initial: float, final: float, first: float, second: float) -> None:
    along = curve(name)
    assert along(0.0, initial, final) == initial and along(1.0, initial, final) == final
    early, late = (along(p, initial, final) for p in sorted((first, second)))
    rounding = 1e-12
    if initial <= final:
        assert initial - rounding <= early <= late + rounding <= final + 2 * rounding
    else:
        assert initial + rounding >= early >= late - rounding >= final - 2 * rounding


def test_curves_half_way() -> None:
    initial, final = 0.2, 0.9
    half = {name: curve(name)(0.5, initial, final) for name in CURVES}
    assert half == pytest.approx(
        {
            "one-shot": final,
            "cubic": final - (final - initial) / 8,
            "linear": (initial + final) / 2,
            "cosine": (initial + final) / 2,
            "exponential": 1 - math.sqrt((1 - initial) * (1 - final)),
        }
    )


@pytest.mark.parametrize("updates", [1, 4, 9])
def test_first_cubic_update(updates: int) -> None:
    """From s_i = 0 the update at t0 + dt prunes s_f (1 - (1 - 1/n)^3)."""
    clock = Clock(every=20, start=30, stop=30 + 20 * updates)
    found = curve("cubic")(clock.progress(50), 0.0, 0.8)
    assert found == pytest.approx(0.8 * (1 - (1 - 1 / updates) ** 3))


@pytest.mark.parametrize("name", ["cubic", "cosine"])
def test_slope_is_zero_at_the_end(name: str) -> None:
    h = 1e-4
    assert (curve(name)(1.0, 0.1, 0.9) - curve(name)(1.0 - h, 0.1, 0.9)) / h < 1e-3


def test_exponential_keeps_the_same_fraction_each_time() -> None:
    kept = [1 - curve("exponential")(k / 5, 0.0, 0.99) for k in range(6)]
    assert [b / a for a, b in pairwise(kept)] == pytest.approx([0.01 ** (1 / 5)] * 5)


def test_cosine_decay_over_a_run() -> None:
    clock = Clock(every=10, start=0, stop=400)
    fraction = [decay("cosine")(0.3, clock.progress(t)) for t in (0, 200, 400)]
    assert fraction == [0.3, 0.15, 0.0]


def test_decay_counts_from_the_start_of_the_schedule() -> None:
    clock = Clock(every=10, start=100, stop=300)
    falling = decay("cosine")
    assert [falling(0.3, clock.progress(t)) for t in (50, 100, 200, 300)] == [
        0.3,
        0.3,
        0.15,
        0.0,
    ]
    assert falling(0.3, clock.progress(150)) == pytest.approx(0.15 * (1 + math.cos(math.pi * 50 / 200)))


@pytest.mark.parametrize("name", DECAYS)
@QUICK
@given(alpha=PROGRESS, first=PROGRESS, second=PROGRESS, q=st.floats(0.1, 10))
def test_decays_fall_from_alpha(name: str, alpha: float, first: float, second: float, q: float) -> None:
    falling = decay(name, q)
    assert falling(alpha, 0.0) == alpha
    assert falling(alpha, 1.0) == (alpha if name == "constant" else 0.0)
    early, late = (falling(alpha, p) for p in sorted((first, second)))
    assert 0.0 <= late <= early <= alpha


def test_power_decay() -> None:
    assert decay("power")(0.4, 0.5) == pytest.approx(0.05)
    assert decay("power", q=1)(0.4, 0.3) == pytest.approx(decay("linear")(0.4, 0.3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: curve("qubic"),
            r"unknown sparsity curve 'qubic' .did you mean 'cubic'",
        ),
        (lambda: decay("cosin"), r"unknown decay 'cosin' .did you mean 'cosine'"),
        (lambda: decay("power", q=0), "q is 0"),
        (lambda: curve("cubic")(1.1, 0.0, 0.9), r"progress is 1\.1"),
        (lambda: curve("linear")(0.5, -0.1, 0.9), r"initial sparsity is -0\.1"),
        (lambda: curve("exponential")(0.5, 0.0, 1.0), r"final sparsity is 1\.0"),
        (lambda: decay("cosine")(1.5, 0.1), r"alpha is 1\.5"),
        (lambda: decay("linear")(0.5, -0.1), r"progress is -0\.1"),
    ],
)
def test_wrong_input_is_refused(wrong: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        wrong()  # type: ignore[operator]
