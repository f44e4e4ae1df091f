"""Checks that methods share: each raises OptionError with what was given and what would be right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from rarefy import allocation, schedules
from rarefy.engine.method import check_fraction
from rarefy.engine.sharing import Rule
from rarefy.errors import OptionError, nearest
from rarefy.patterns import Pattern, parse_pattern

__all__ = [
    "check_allocation",
    "check_clock",
    "check_count",
    "check_curve",
    "check_decay",
    "check_end",
    "check_ends",
    "check_flag",
    "check_fraction",
    "check_free",
    "check_not_negative",
    "check_pattern",
    "check_positive",
    "check_share",
    "check_sparsity",
    "check_time",
]


def check_pattern(pattern: str | Pattern) -> None:
    """Refuse a pattern that cannot be read."""
    parse_pattern(pattern)


def check_free(pattern: str | Pattern) -> None:
    """Refuse a pattern whose weights cannot be dropped and grown one by one."""
    parse_pattern(pattern).check_free()


def check_sparsity(sparsity: float, pattern: str | Pattern) -> None:
    """Refuse a sparsity outside [0, 1), or one that contradicts the pattern's own."""
    check_fraction("sparsity", sparsity)
    fixed = parse_pattern(pattern).fixed_sparsity
    if fixed is not None and abs(sparsity - fixed) > 1e-9:
        raise OptionError(
            f"pattern={str(pattern)!r} makes {fixed:g} of the weights zero; sparsity={sparsity!r} contradicts it."
        )


def check_allocation(rule: Rule, more: Iterable[str] = ()) -> None:
    """Refuse an unknown rule (`more`: names that this method adds), or a sparsity by name outside [0, 1)."""
    known = [*allocation.RULES, *more]
    if isinstance(rule, Mapping):
        for name, value in rule.items():
            check_fraction(f"allocation[{name!r}]", value)
    elif rule not in known:
        raise OptionError(
            f"allocation={rule!r} is not known{nearest(str(rule), known)}; it is one of {', '.join(known)}, or sparsities "
            "by layer name."
        )


def check_clock(every: int, start: int | float, stop: int | float | None) -> None:
    """Refuse impossible times; fractions of total_steps are resolved when the run is known."""
    schedules.check_times(every, start, stop)


def check_time(name: str, time: object) -> None:
    """Refuse what is neither a number of steps nor a fraction of the run."""
    schedules.check_time(name, time)


def check_count(name: str, value: object) -> None:
    """Refuse anything but a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}={value!r} must be a whole number of at least 1.")


def check_positive(name: str, value: object, *, zero: bool = False) -> None:
    """Refuse anything but a finite number above 0, or with `zero` not below it."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    if not number or (value == 0 and not zero):
        raise OptionError(f"{name}={value!r} must be a number{', not negative' if zero else ' above 0'}.")


def check_share(name: str, value: object) -> None:
    """Refuse anything but a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise OptionError(f"{name}={value!r} must be a number in [0, 1].")


def check_flag(name: str, value: object) -> None:
    """Refuse anything but True and False: the text "False" would be taken for True."""
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r} must be True or False.")


def check_end(method: str, clock: schedules.Clock) -> None:
    """Refuse an end before the first step, for methods that make their mask there: there would never be one."""
    if clock.last == 0:
        raise OptionError(
            f"{method} makes its mask at the step `stop`, and that is step 0{_of(clock.total)}: set it to 1 or later."
        )


def check_ends(stop: object) -> None:
    """Refuse a schedule without an end, for methods that reach their sparsity there."""
    if stop is None:
        raise OptionError("stop=None: the sparsity is reached at `stop`; give a step, or a fraction of total_steps.")


def _of(total: int | None) -> str:
    return "" if total is None else f" of {total}"


def check_not_negative(name: str, value: object) -> None:
    """Refuse anything but a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise OptionError(f"{name}={value!r} must be a number of at least 0.")


def check_curve(name: str) -> None:
    """Refuse an unknown sparsity curve."""
    schedules.curve(name)


def check_decay(name: str) -> None:
    """Refuse an unknown decay of the drop fraction."""
    schedules.decay(name)
