"""Learning rates for retraining a pruned network, from the rates that the dense one was trained with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rarefy.errors import OptionError, nearest

RETRAININGS = {
    "ft": "the last rate of the dense training (fine-tuning)",
    "lrw": "the last n rates of the dense training again (learning-rate rewinding)",
    "slr": "all rates of the dense training again, compressed",
    "clr": "half a cosine from the largest rate to the smallest",
    "llr": "linear from the largest rate to 0",
    "allr": "linear to 0 from a rate that grows with what the pruning took away",
}
"""Name -> one line, for every retraining schedule."""


def retraining(
    name: str,
    logged: Sequence[float],
    steps: int,
    *,
    warm_up: int = 0,
    distance: float | None = None,
    fraction: float | None = None,
) -> Callable[[int], float]:
    """Return the learning rate of a retraining of n steps as a function of the step t in 0 ... n.

    With eta_max and eta_min the largest and smallest logged rate (after the dense training's warm-up), T the number of
    logged steps, n_w = floor(n / 10), u = (t - n_w) / (n - n_w):

        all but ft and lrw, t < n_w:  eta_s (1 - cos(pi t / n_w)) / 2   (eta_s: the rate at t = n_w)
        ft    the last logged rate
        lrw   logged[T - n + t]
        slr   logged[floor(u T)], where those of the dense training's warm-up count as eta_max
        clr   eta_min + (eta_max - eta_min) (1 + cos(pi u)) / 2
        llr   eta_max (1 - u)
        allr  eta_s (1 - u),  eta_s = eta_max max(min(n / T, 1), min(1, distance / sqrt(fraction)))

    Args:
        name: one of `RETRAININGS`.
        logged: the learning rate of every step of the dense training.
        steps: n.
        warm_up: steps of the dense training's warm-up, at the head of `logged`.
        distance: ||W - W_pruned|| / ||W||, for "allr".
        fraction: of the remaining weights that the pruning took, for "allr".

    Raises:
        OptionError: an unknown name, nothing logged, no steps, "lrw" of more steps than were logged, "allr" without its
            two numbers.

    Source: Zimmer, Spiegel & Pokutta 2023, arXiv 2111.00843; Renda, Frankle & Carbin 2020, arXiv 2003.02389 (lrw); Le & Hua
    2021, arXiv 2105.03193 (slr, clr).

    Example:
        >>> from rarefy.schedules import retraining
        >>> rate = retraining("llr", [0.1] * 100, steps=20)
        >>> [round(rate(t), 3) for t in (0, 1, 2, 11, 20)]
        [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    if name not in RETRAININGS:
        raise OptionError(
            f"unknown retraining schedule {name!r}{nearest(name, RETRAININGS)}; use one of {', '.join(RETRAININGS)}"
        )
    total = len(logged)
    if total == 0 or not 0 <= warm_up < total:
        raise OptionError(
            f"{total} logged learning rates, {warm_up} of them warm-up: give the dense training's, step by step"
        )
    if steps < 1:
        raise OptionError(f"steps is {steps}; a retraining has at least 1")
    if name == "lrw" and steps > total:
        raise OptionError(
            f"lrw replays the last {steps} steps, and {total} were logged; retrain for fewer, or use 'slr'"
        )
    high, low, warm = max(logged), min(logged[warm_up:]), steps // 10
    top = high
    if name == "allr":
        if distance is None or fraction is None or not 0 < fraction <= 1 or distance < 0:
            raise OptionError(f"allr needs distance and fraction of the pruning, not {distance} and {fraction}")
        top = high * max(min(steps / total, 1.0), min(1.0, distance / math.sqrt(fraction)))

    def rate(t: int) -> float:
        if not 0 <= t <= steps:
            raise OptionError(f"step {t} is not in a retraining of {steps} steps")
        if name == "ft":
            return logged[-1]
        if name == "lrw":
            return logged[min(total - steps + t, total - 1)]
        if t < warm:
            return top * (1 - math.cos(math.pi * t / warm)) / 2
        u = (t - warm) / (steps - warm)
        if name == "slr":
            at = min(int(u * total), total - 1)
            return high if at < warm_up else logged[at]
        if name == "clr":
            return low + (high - low) * (1 + math.cos(math.pi * u)) / 2
        return top * (1 - u)

    return rate
