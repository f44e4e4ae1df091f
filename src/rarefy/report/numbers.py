"""Numbers for people: few digits, SI prefixes."""

from __future__ import annotations

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
NONE = "-"


def si(value: float | None, unit: str = "") -> str:
    """Write 26611 as "26.6 k" and, with a unit, 1.2e6 as "1.20 MB"."""
    if value is None:
        return NONE
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    if power == 0:
        text = f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"
    else:
        text = f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"
    return f"{text} {_PREFIXES[power]}{unit}".rstrip()


def times(ratio: float | None) -> str:
    """Write a ratio to the dense net: "0.102x"."""
    return NONE if ratio is None else f"{ratio:.3f}x" if ratio < 0.9995 else f"{ratio:.2f}x"


def points(share: float | None, sign: bool = False) -> str:
    """Write a share in points of percent with two digits: 0.9741 is "97.41", with `sign` "+97.41"."""
    return NONE if share is None else f"{100 * share:{'+' if sign else ''}.2f}"


def duration(seconds: float | None) -> str:
    """Write seconds as "9.7 s", "12 min 5 s" or "3 h 20 min"."""
    if seconds is None:
        return NONE
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
