"""How narrow a dense net must be to have as few parameters as a sparse one."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from rarefy.errors import ModelError

_NARROWEST = 1e-6
_CLOSE = 1e-7


def _count(build: Callable[[float], nn.Module], width: float) -> int:
    with torch.random.fork_rng(devices=[]):  # looking for a width must not move the caller's random numbers
        try:
            with torch.device("meta"):
                model = build(width)
        except (NotImplementedError, RuntimeError):  # the constructor looks at values: build it for real
            model = build(width)
    return sum(parameter.numel() for parameter in model.parameters())


def small_dense_width(build: Callable[[float], nn.Module], budget: int) -> float:
    """Return the largest width in (0, 1] for which `build(width)` has at most `budget` parameters.

    All parameters count, shared ones once. Found by bisection to 1e-7, mostly without allocating memory (the model is
    built on PyTorch's meta device where it can be). 1.0 where the full net already fits. Raises ModelError where even
    the narrowest net is over the budget, and where the count does not grow with the width.

    >>> from rarefy import models
    >>> width = models.small_dense_width(lambda width: models.build("lenet-300-100", width=width), 26_661)
    >>> sum(p.numel() for p in models.build("lenet-300-100", width=width).parameters())
    26399
    """
    if budget < 1:
        raise ModelError(f"budget is {budget} parameters; expected at least 1")
    counts = {width: _count(build, width) for width in (_NARROWEST, 1.0)}
    if counts[1.0] <= budget:
        return 1.0
    if counts[_NARROWEST] > budget:
        raise ModelError(
            f"a budget of {budget:,} parameters is below the {counts[_NARROWEST]:,} of the narrowest such net "
            f"(at width 1: {counts[1.0]:,}); ask for less sparsity"
        )
    low, high = _NARROWEST, 1.0
    while high - low > _CLOSE:
        middle = (low + high) / 2
        counts[middle] = _count(build, middle)
        low, high = (middle, high) if counts[middle] <= budget else (low, middle)
    widths = sorted(counts)
    for narrow, wide in itertools.pairwise(widths):
        if counts[narrow] > counts[wide]:
            raise ModelError(
                f"the parameter count falls from {counts[narrow]:,} at width {narrow:g} to {counts[wide]:,} at "
                f"{wide:g}; build(width) must not shrink as the width grows"
            )
    return low
