"""When a method acts: update times, and how far along its schedule it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeGuard

from rarefy.errors import OptionError

Time = int | float
"""A number of optimizer steps (int), or a fraction of the whole run (float in [0, 1])."""


@dataclass(frozen=True)
class Clock:
    """The times at which a method updates its masks: every so many steps, from a start to a stop.

    t counts optimizer steps and is 1 after the first one. Updates are due at t in {first, first + every, ...} with
    1 <= t <= last, and always at `last` itself, also where `every` does not divide the interval: a schedule that ends
    there reaches its end.

    Attributes:
        every: steps between two updates.
        start: where the schedule begins; a whole number of steps, or a float in [0, 1], the fraction of `total`
            (rounded to the nearest step; 1 is the first step, 1.0 the end of the run).
        stop: the last update, written like start. None: updates go on for ever, none is forced, and progress is
            measured against `total`; without `total` it stays at 0, so that a decaying drop fraction keeps its start
            value.
        total: optimizer steps of the whole run, where known.

    Raises:
        OptionError: a number out of range, a fraction without `total`, start after stop, or stop after `total`.

    Source: Zhu & Gupta 2017, arXiv 1710.01878 (t0, dt, n dt); Evci et al. 2020 (RigL), arXiv 1911.11134 (dT, T_end).

    Example:
        >>> from rarefy.schedules import Clock
        >>> clock = Clock(every=40, start=20, stop=0.75, total=200)
        >>> [t for t in range(1, 201) if clock.due(t)], clock.last
        ([20, 60, 100, 140, 150], 150)
        >>> clock.progress(20), clock.progress(85), clock.progress(150)
        (0.0, 0.5, 1.0)
    """

    every: int = 100
    start: Time = 0
    stop: Time | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        check_times(self.every, self.start, self.stop)
        if self.total is not None and (not _is_count(self.total) or self.total < 1):
            raise OptionError(f"total_steps is {self.total!r}; it must be a whole number of steps, 1 or more")
        times = [
            ("start", self.first),
            ("stop", self.last),
            ("total_steps", self.total),
        ]
        for (early, a), (late, b) in pairwise((name, t) for name, t in times if t is not None):
            if a > b:
                raise OptionError(f"{early} is step {a}, after {late}, step {b}; move one of them")

    @property
    def first(self) -> int:
        """The step at which the schedule begins; 0 is before the first optimizer step."""
        return _steps(self.start, self.total, "start")

    @property
    def last(self) -> int | None:
        """The step of the last update; None where updates go on for ever."""
        return None if self.stop is None else _steps(self.stop, self.total, "stop")

    def due(self, t: int) -> bool:
        """Tell whether the masks are updated after optimizer step t.

        Example:
            >>> from rarefy.schedules import Clock
            >>> [t for t in range(0, 10) if Clock(every=3, stop=8).due(t)]
            [3, 6, 8]
        """
        first, last = self.first, self.last
        if t < max(1, first) or (last is not None and t > last):
            return False
        return (t - first) % self.every == 0 or t == last

    def progress(self, t: int) -> float:
        """Return how far along the schedule step t is: (t - first) / (last - first), within [0, 1].

        Where first == last it jumps from 0 to 1 there. Without a stop, `total` takes its place; without both it is 0.

        Example:
            >>> from rarefy.schedules import Clock
            >>> Clock(stop=400).progress(100), Clock(total=400).progress(100), Clock().progress(100)
            (0.25, 0.25, 0.0)
        """
        first, last = self.first, self.total if self.stop is None else self.last
        if last is None or t < first:
            return 0.0
        return 1.0 if t >= last else (t - first) / (last - first)


def check_times(every: int, start: Time, stop: Time | None) -> None:
    """Refuse update times that no run could have; what depends on the length of the run, `Clock` checks.

    Raises:
        OptionError: naming the number and what it must be.

    Example:
        >>> from rarefy.schedules import check_times
        >>> check_times(100, 0.1, 500)
    """
    if not _is_count(every) or every < 1:
        raise OptionError(f"every is {every!r}; it must be a whole number of steps, 1 or more")
    check_time("start", start)
    if stop is not None:
        check_time("stop", stop)
    if stop is not None and isinstance(start, float) == isinstance(stop, float) and start > stop:
        raise OptionError(f"start is {start}, after stop, {stop}; move one of them")


def check_time(name: str, time: object) -> None:
    """Refuse what is neither a number of steps nor a fraction of a run; OptionError with the name."""
    fits = 0.0 <= time <= 1.0 if isinstance(time, float) else _is_count(time) and time >= 0
    if not fits:
        raise OptionError(
            f"{name} is {time!r}; it must be a whole number of steps (such as 500), or a fraction of the run between 0.0 and "
            "1.0"
        )


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _steps(time: Time, total: int | None, name: str) -> int:
    """A time in steps: a whole number as it is, a fraction as that part of the run."""
    if isinstance(time, int):
        return time
    if total is None:
        raise OptionError(f"{name} is {time}, a fraction of the run, whose length is not known: pass total_steps")
    return math.floor(time * total + 0.5)
