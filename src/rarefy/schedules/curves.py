"""How sparsity rises and how the drop fraction falls between the start and the stop of a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from rarefy.errors import OptionError, nearest

Curve = Callable[[float, float, float], float]
Decay = Callable[[float, float], float]


def one_shot(progress: float, initial: float, final: float) -> float:
    """Go to the final sparsity at once: s = s_f for p > 0.

    Example:
        >>> from rarefy.schedules import curve
        >>> curve("one-shot")(0.0, 0.0, 0.9), curve("one-shot")(0.01, 0.0, 0.9)
        (0.0, 0.9)
    """
    return _between(progress, initial, final, 1.0)


def cubic(progress: float, initial: float, final: float) -> float:
    """Rise steeply while weights are redundant and flatten out at the end: s = s_f + (s_i - s_f) (1 - p)^3.

    Source: Zhu & Gupta 2017, arXiv 1710.01878, eq. 1.

    Example:
        >>> from rarefy.schedules import curve
        >>> round(curve("cubic")(0.5, 0.0, 0.8), 12)
        0.7
    """
    return _between(progress, initial, final, 1.0 - (1.0 - progress) ** 3)


def linear(progress: float, initial: float, final: float) -> float:
    """Rise evenly: s = s_i + (s_f - s_i) p.

    Example:
        >>> from rarefy.schedules import curve
        >>> curve("linear")(0.5, 0.0, 0.8)
        0.4
    """
    return _between(progress, initial, final, progress)


def cosine(progress: float, initial: float, final: float) -> float:
    """Rise slowly at both ends: s = s_i + (s_f - s_i) (1 - cos(pi p)) / 2.

    Example:
        >>> from rarefy.schedules import curve
        >>> round(curve("cosine")(0.5, 0.0, 0.8), 12)
        0.4
    """
    return _between(progress, initial, final, (1.0 - math.cos(math.pi * progress)) / 2.0)


def exponential(progress: float, initial: float, final: float) -> float:
    """Remove the same fraction of what is left each time: 1 - s = (1 - s_i)^(1 - p) (1 - s_f)^p.

    Source: Tanaka et al. 2020 (SynFlow), arXiv 2006.05467, kept fraction rho^(k/n).

    Example:
        >>> from rarefy.schedules import curve
        >>> round(curve("exponential")(0.5, 0.0, 0.99), 12)
        0.9
    """
    _check(progress, initial, final)
    if progress in (0.0, 1.0):
        return _between(progress, initial, final, progress)
    return float(1.0 - (1.0 - initial) ** (1.0 - progress) * (1.0 - final) ** progress)


def _between(progress: float, initial: float, final: float, share: float) -> float:
    """The sparsity a share of the way from initial to final; exactly these at the ends of the schedule."""
    _check(progress, initial, final)
    if progress == 0.0:
        return initial
    return final if share == 1.0 else initial + (final - initial) * share


def _check(progress: float, initial: float, final: float) -> None:
    _check_progress(progress)
    for name, value in (("initial", initial), ("final", final)):
        if not 0.0 <= value < 1.0:
            raise OptionError(f"{name} sparsity is {value}; it is the fraction of zeros and must lie in [0, 1)")


def _check_progress(progress: float) -> None:
    if not 0.0 <= progress <= 1.0:
        raise OptionError(f"progress is {progress}; it must lie in [0, 1], as Clock.progress() gives it")


CURVES: Mapping[str, Curve] = MappingProxyType(
    {
        "one-shot": one_shot,
        "cubic": cubic,
        "linear": linear,
        "cosine": cosine,
        "exponential": exponential,
    }
)
"""Name -> sparsity curve."""


def curve(name: str) -> Curve:
    """Look up how the sparsity rises over a schedule.

    Args:
        name: "one-shot", "cubic", "linear", "cosine" or "exponential".

    Returns:
        A function (progress in [0, 1], initial sparsity, final sparsity) -> sparsity: exactly `initial` at progress 0,
        exactly `final` at 1, and monotone between. It raises OptionError for numbers out of range.

    Raises:
        OptionError: unknown name.

    Example:
        >>> from rarefy.schedules import curve
        >>> [round(curve("cubic")(p / 4, 0.0, 0.9), 3) for p in range(5)]
        [0.0, 0.52, 0.787, 0.886, 0.9]
    """
    if not isinstance(name, str) or name not in CURVES:
        raise OptionError(
            f"unknown sparsity curve {name!r}{nearest(str(name), CURVES)}; use one of {', '.join(CURVES)}"
        )
    return CURVES[name]


def decay(name: str, q: float = 3.0) -> Decay:
    """Look up how the fraction of weights that an update drops and grows falls over a schedule.

    | name | fraction at progress p |
    |---|---|
    | `cosine` | alpha / 2 (1 + cos(pi p)) |
    | `constant` | alpha |
    | `linear` | alpha (1 - p) |
    | `power` | alpha (1 - p)^q |

    Args:
        name: one of the table.
        q: exponent of "power", above 0; the others do not use it.

    Returns:
        A function (alpha in [0, 1], progress in [0, 1]) -> fraction. It raises OptionError for numbers out of range.

    Raises:
        OptionError: unknown name, or q not above 0.

    Source: Evci et al. 2020 (RigL), arXiv 1911.11134 (cosine, with alpha 0.3; the others in its appendix).

    Example:
        >>> from rarefy.schedules import decay
        >>> [decay("cosine")(0.3, p) for p in (0.0, 0.5, 1.0)]
        [0.3, 0.15, 0.0]
    """
    if not isinstance(name, str) or name not in DECAYS:
        raise OptionError(f"unknown decay {name!r}{nearest(str(name), DECAYS)}; use one of {', '.join(DECAYS)}")
    if not q > 0.0:
        raise OptionError(f"q is {q}; the exponent of the power decay must be above 0")
    falling = DECAYS[name]

    def fraction(alpha: float, progress: float) -> float:
        if not 0.0 <= alpha <= 1.0:
            raise OptionError(f"alpha is {alpha}; it is the fraction dropped at the start and must lie in [0, 1]")
        _check_progress(progress)
        return alpha * falling(progress, q)

    return fraction


DECAYS: Mapping[str, Callable[[float, float], float]] = MappingProxyType(
    {
        "cosine": lambda p, q: (1.0 + math.cos(math.pi * p)) / 2.0,
        "constant": lambda p, q: 1.0,
        "linear": lambda p, q: 1.0 - p,
        "power": lambda p, q: float((1.0 - p) ** q),
    }
)
"""Name -> what is left of the drop fraction at progress p, with exponent q."""
