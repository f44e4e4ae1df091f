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
    "check_fraction",
    "check_free",
    "check_not_negative",
    "check_pattern",
    "check_positive",
    "check_sparsity",
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


def check_count(name: str, value: object) -> None:
    """Refuse anything but a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}={value!r} must be a whole number of at least 1.")


def check_positive(name: str, value: object) -> None:
    """Refuse anything but a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise OptionError(f"{name}={value!r} must be a number above 0.")


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
