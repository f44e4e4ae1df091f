"""How much each layer keeps, from the layers' shapes alone: uniform, uniform+, ER, ERK, ERK+."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rarefy.errors import AllocationError

Shapes = Mapping[str, Sequence[int]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """Give every layer the same density: d_l = d.

    Example:
        >>> from rarefy.allocation.shares import uniform
        >>> uniform({"fc1": [300, 784], "fc2": [10, 300]}, 0.1)
        {'fc1': 0.1, 'fc2': 0.1}
    """
    return dict.fromkeys(shapes, density)


LAST_LAYER_DENSITY = 0.2
"""The least density of the last layer under uniform+."""


def uniform_plus(shapes: Shapes, density: float) -> dict[str, float]:
    """Keep the first layer dense and the last at 0.2 or more; the others share one density, so that the total is right.

    The last layer shares that density too where it is 0.2 or more. In numbers: d_first = 1; d_l = x with
    x = (d sum N - N_first) / (sum N - N_first); if x < 0.2: d_last = 0.2 and
    x = (d sum N - N_first - 0.2 N_last) / (sum N - N_first - N_last) for those between.

    Source: Liu et al. 2022, arXiv 2202.02643 (uniform+), in the version that keeps the whole budget exactly.

    Raises:
        AllocationError: the first and last layer alone are over the budget.

    Example:
        >>> from rarefy.allocation.shares import uniform_plus
        >>> uniform_plus({"conv": [8, 1, 3, 3], "fc1": [64, 72], "fc2": [10, 64]}, 0.1)["fc2"]
        0.2
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    first, *others = sizes
    budget = density * sum(sizes.values())
    fixed = {first: 1.0}
    if others and _shared(sizes, budget, fixed) < LAST_LAYER_DENSITY:
        fixed[others[-1]] = LAST_LAYER_DENSITY
    shared = _shared(sizes, budget, fixed)
    if shared <= 0.0:
        total, least = sum(sizes.values()), sum(d * sizes[name] for name, d in fixed.items())
        given = " and ".join(f"{name} {list(shapes[name])} at density {d:g}" for name, d in fixed.items())
        raise AllocationError(
            f"uniform+ cannot keep {density:g} of {total} weights ({budget:.0f}): {given} alone keep "
            f"{least:.0f}; ask for a sparsity below {1 - least / total:.4f} or use 'erk' or 'uniform'"
        )
    return {name: fixed.get(name, shared) for name in sizes}


def _shared(sizes: Mapping[str, int], budget: float, fixed: Mapping[str, float]) -> float:
    """The one density of all layers that are not fixed; -inf where there are none."""
    rest = sum(size for name, size in sizes.items() if name not in fixed)
    return (budget - sum(d * sizes[name] for name, d in fixed.items())) / rest if rest else -math.inf


def er(shapes: Shapes, density: float) -> dict[str, float]:
    """Keep more of the layers with few inputs and outputs (Erdos-Renyi): d_l = eps (n_out + n_in) / (n_out n_in).

    Kernel dimensions do not count. Layers that would go over 1 are dense; see `erk` for how eps is found.

    Source: Mocanu et al. 2018 (SET), arXiv 1707.04780; capping as in Liu et al. 2022, arXiv 2202.02643.

    Raises:
        AllocationError: a layer has fewer than two dimensions.

    Example:
        >>> from rarefy.allocation.shares import er
        >>> d = er({"fc1": [300, 784], "fc2": [100, 300], "fc3": [10, 100]}, 0.1)
        >>> {name: round(x, 6) for name, x in d.items()}
        {'fc1': 0.079568, 'fc2': 0.230189, 'fc3': 1.0}
    """
    flat = [f"{name} {list(shape)}" for name, shape in shapes.items() if len(shape) < 2]
    if flat:
        raise AllocationError(
            f"er needs an input and an output dimension: {', '.join(flat)}; exclude, or use 'uniform'"
        )
    return _scaled(shapes, density, {name: (s[0] + s[1]) / (s[0] * s[1]) for name, s in shapes.items()})


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Keep more of the small layers, kernel size included (Erdos-Renyi-Kernel): d_l = eps sum(shape_l) / prod(shape_l).

    eps makes the total exact, sum d_l N_l = d sum N_l. While the layer with the largest raw ratio would go over 1, it
    (with all its equals) is made dense and eps is solved again over the rest. For linear layers ERK is ER.

    Source: Evci et al. 2020 (RigL), arXiv 1911.11134; capping as in Liu et al. 2022, arXiv 2202.02643.

    Example:
        >>> from rarefy.allocation.shares import erk
        >>> d = erk({"conv": [16, 3, 3, 3], "fc": [10, 16]}, 0.5)
        >>> {name: round(x, 6) for name, x in d.items()}
        {'conv': 0.335875, 'fc': 0.943137}
    """
    return _scaled(shapes, density, {name: sum(s) / math.prod(s) for name, s in shapes.items()})


def erk_plus(shapes: Shapes, density: float, last: float = 1.0) -> dict[str, float]:
    """Give the last layer (the classifier) a density of its own, and share the rest of the budget by ERK.

    In numbers: d_last = `last` (1: dense), and ERK at d' = (d sum N - last N_last) / (sum N - N_last) for the others.

    Source: Liu et al. 2022, arXiv 2202.02643 (ERK+).

    Raises:
        AllocationError: the last layer alone is over the budget.

    Example:
        >>> from rarefy.allocation.shares import erk_plus
        >>> d = erk_plus({"conv1": [16, 3, 3, 3], "conv2": [32, 16, 3, 3], "fc": [10, 32]}, 0.2)
        >>> {name: round(x, 6) for name, x in d.items()}
        {'conv1': 0.550867, 'conv2': 0.111551, 'fc': 1.0}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    *others, classifier = sizes
    budget, rest = density * sum(sizes.values()) - last * sizes[classifier], sum(sizes[name] for name in others)
    if not others or budget <= 0.0:
        total = sum(sizes.values())
        raise AllocationError(
            f"erk+ cannot keep {density:g} of {total} weights ({density * total:.0f}): {classifier} "
            f"{list(shapes[classifier])} at density {last:g} alone keeps {last * sizes[classifier]:.0f}; ask for a sparsity "
            f"below {1 - last * sizes[classifier] / total:.4f} or use 'erk' or 'uniform'"
        )
    return {**erk({name: shapes[name] for name in others}, budget / rest), classifier: last}


def _scaled(shapes: Shapes, density: float, raw: Mapping[str, float]) -> dict[str, float]:
    """d_l = min(1, eps r_l) with the eps that keeps the budget (the dense-capping loop)."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    free = dict(raw)  # the layers that are not dense
    while free:
        budget = density * sum(sizes.values()) - sum(size for name, size in sizes.items() if name not in free)
        eps = budget / sum(ratio * sizes[name] for name, ratio in free.items())
        largest = max(free.values())
        if eps * largest <= 1.0:
            break
        free = {name: ratio for name, ratio in free.items() if ratio < largest}
    return {name: eps * free[name] if name in free else 1.0 for name in sizes}


SHAPE_RULES: dict[str, Callable[[Shapes, float], dict[str, float]]] = {
    "uniform": uniform,
    "uniform+": uniform_plus,
    "er": er,
    "erk": erk,
    "erk+": erk_plus,
}
