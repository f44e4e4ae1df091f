"""Densities and exact counts per layer, by any rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType

import torch
from torch import Tensor

from rarefy.allocation.shares import SHAPE_RULES, Shapes
from rarefy.errors import AllocationError, OptionError, SelectionError, nearest
from rarefy.kernels import select_k

RULES: Mapping[str, str] = MappingProxyType(
    {
        "uniform": "the same density in every layer",
        "uniform+": "first layer dense, last layer at least 0.2 dense, one density for the others",
        "er": "more in layers with few inputs and outputs (Erdos-Renyi)",
        "erk": "more in small layers, kernel size included (Erdos-Renyi-Kernel)",
        "erk+": "last layer dense, erk for the others",
        "global": "the largest scores of all layers together",
        "lamp": "the largest LAMP scores of all layers together",
    }
)
"""Name -> one line, for every rule."""

SCORED: frozenset[str] = frozenset({"global", "lamp"})
"""The rules that need scores of the weights, not only shapes: see `global_counts`."""

Rule = str | Mapping[str, float]


def densities(shapes: Shapes, sparsity: float | None, rule: Rule) -> dict[str, float]:
    """Share a sparsity out over the layers: the kept fraction of each, from the shapes alone.

    Args:
        shapes: layer name -> weight shape, in the order of the layers (uniform+ and erk+ take the first and last of it).
        sparsity: fraction of zeros over all layers together, in [0, 1). Not used where `rule` is a mapping.
        rule: "uniform", "uniform+", "er", "erk" or "erk+"; or the user's own mapping of layer-name glob -> sparsity of the
            layer, of which the first that fits a layer counts.

    Returns:
        Layer name -> density in (0, 1], real numbers. For named rules sum(d_l N_l) = (1 - sparsity) sum(N_l).

    Raises:
        OptionError: sparsity outside [0, 1), or an unknown rule.
        AllocationError: the rule cannot keep this budget, or there are no layers.
        SelectionError: a layer that no glob fits, or a glob that decides no layer; all of them in one message.

    Source: see `rarefy.allocation.shares`, one function per rule.

    Example:
        >>> from rarefy.allocation import densities
        >>> shapes = {"fc1": [300, 784], "fc2": [100, 300], "fc3": [10, 100]}
        >>> {name: round(d, 4) for name, d in densities(shapes, 0.9, "erk").items()}
        {'fc1': 0.0796, 'fc2': 0.2302, 'fc3': 1.0}
        >>> densities(shapes, None, {"fc3": 0.0, "*": 0.75})
        {'fc1': 0.25, 'fc2': 0.25, 'fc3': 1.0}
    """
    _check_layers(shapes)
    if isinstance(rule, Mapping):
        return _by_user(shapes, rule)
    _check_sparsity(sparsity, "sparsity")
    if rule in SCORED:
        raise OptionError(f"allocation {rule!r} needs scores of the weights; pass them to global_counts()")
    if rule not in SHAPE_RULES:
        raise OptionError(
            f"unknown allocation {rule!r}{nearest(str(rule), RULES)}; use one of {', '.join(SHAPE_RULES)}"
        )
    if not sparsity:
        return dict.fromkeys(shapes, 1.0)
    return SHAPE_RULES[rule](shapes, 1.0 - sparsity)


def counts(shapes: Shapes, sparsity: float | None, rule: Rule) -> dict[str, int]:
    """Share a sparsity out over the layers: the exact number of weights kept in each.

    With d_l from `densities`, "uniform" and the user's own mapping keep floor(d_l N_l + 1/2) of every layer. The
    other rules keep floor((1 - sparsity) sum(N) + 1/2) weights in total: every layer gets floor(d_l N_l), and those
    with the largest remainders one more (ties: the earlier layer), none above its size.

    Args, errors: as `densities`.

    Raises:
        AllocationError: also where a layer would keep no weight at all; names all such layers.

    Example:
        >>> from rarefy.allocation import counts
        >>> counts({"fc1": [300, 784], "fc2": [100, 300], "fc3": [10, 100]}, 0.9, "erk")
        {'fc1': 18714, 'fc2': 6906, 'fc3': 1000}
    """
    shares = densities(shapes, sparsity, rule)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if rule == "uniform" or isinstance(rule, Mapping):
        kept = {name: math.floor(d * sizes[name] + 0.5) for name, d in shares.items()}
    else:
        kept = _largest_remainder(shares, sizes, _total(sizes, float(sparsity or 0.0)))
    empty = [f"{name} {list(shapes[name])} (density {shares[name]:.3g})" for name, k in kept.items() if k == 0]
    if empty:
        raise AllocationError(f"no weight would be left in {', '.join(empty)}; lower the sparsity or exclude the layer")
    return kept


def global_counts(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Count how many weights each layer keeps when the best scores of all layers together are kept.

    Keeps floor((1 - sparsity) sum(N) + 1/2) weights in total; ties go to the earlier layer, then to the lower index.
    A layer may keep none. With magnitudes as scores this is global magnitude pruning; with `rarefy.scores.lamp` of
    each layer it is LAMP.

    Args:
        scores: layer name -> scores, any shapes, floating point, no NaN; on several devices they meet on the first.
        sparsity: fraction of zeros over all layers together, in [0, 1).

    Returns:
        Layer name -> number of weights kept; `Unstructured().project(scores[name], count)` is the mask.

    Raises:
        OptionError: sparsity outside [0, 1), or NaN scores (names the layers).
        AllocationError: no layers, or no weight would be left.

    Source: Lee et al. 2021 (LAMP), arXiv 2010.07611, for both uses.

    Example:
        >>> import torch
        >>> from rarefy.allocation import global_counts
        >>> global_counts({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[2.0, 4.0]])}, 0.5)
        {'a': 1, 'b': 1}
    """
    _check_layers({name: t.shape for name, t in scores.items()})
    _check_sparsity(sparsity, "sparsity")
    sizes = {name: t.numel() for name, t in scores.items()}
    total = _total(sizes, sparsity)
    if total == 0:
        raise AllocationError(f"sparsity {sparsity} leaves none of {sum(sizes.values())} weights; lower it")
    undefined = [f"{name} {list(t.shape)}" for name, t in scores.items() if t.isnan().any()]
    if undefined:
        raise OptionError(f"scores hold NaN in {', '.join(undefined)}; look for a loss or weights that are not finite")
    device = next(iter(scores.values())).device
    chosen = select_k(torch.cat([t.detach().reshape(-1).to(device) for t in scores.values()]), total)
    return {name: int(part.sum()) for name, part in zip(sizes, torch.split(chosen, list(sizes.values())), strict=True)}


def spread(total: int, shares: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """Share out a whole number in proportion, none getting more than it has room for: exactly `total` in all.

    What is over where there is no room goes to the others in the same proportion, and where all shares are 0, to all
    alike. Parts of one go to the largest remainders (ties: the earlier name).

    Args:
        total: how many there are, at most the sum of `room`.
        shares: name -> weight, not negative, at least one of them finite and above 0 or all 0.
        room: name -> the most it can take.

    Raises:
        AllocationError: there is not room for all.

    Example:
        >>> from rarefy.allocation import spread
        >>> spread(10, {"a": 3.0, "b": 1.0, "c": 1.0}, {"a": 4, "b": 9, "c": 9})
        {'a': 4, 'b': 3, 'c': 3}
    """
    if total > sum(room.values()):
        raise AllocationError(f"there is room for {sum(room.values())} weights, not for {total}")
    given = dict.fromkeys(shares, 0)
    open_names = [name for name in shares if room[name] > 0]
    while (left := total - sum(given.values())) > 0:
        weight = sum(shares[name] for name in open_names)
        exact = {n: left * (shares[n] / weight if weight > 0 else 1 / len(open_names)) for n in open_names}
        full = [name for name in open_names if exact[name] >= room[name] - given[name]]
        if not full:
            limits = {name: room[name] - given[name] for name in open_names}
            rounded = {name: min(math.floor(x), limits[name]) for name, x in exact.items()}
            by_remainder = sorted(open_names, key=lambda name: rounded[name] - exact[name])
            for name in by_remainder[: left - sum(rounded.values())]:
                rounded[name] += 1
            return given | {name: given[name] + count for name, count in rounded.items()}
        for name in full:
            given[name] = room[name]
        open_names = [name for name in open_names if name not in full]
    return given


def _total(sizes: Mapping[str, int], sparsity: float) -> int:
    return math.floor((1.0 - sparsity) * sum(sizes.values()) + 0.5)


def _largest_remainder(shares: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Round d_l N_l to integers that add up to `total`."""
    exact = {name: d * sizes[name] for name, d in shares.items()}
    kept = {name: min(math.floor(x), sizes[name]) for name, x in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: kept[name] - exact[name])  # stable: ties keep the layers' order
    open_layers = [name for name in by_remainder if kept[name] < sizes[name]]
    for name in open_layers[: total - sum(kept.values())]:
        kept[name] += 1
    return kept


def _by_user(shapes: Shapes, rule: Mapping[str, float]) -> dict[str, float]:
    for glob, value in rule.items():
        _check_sparsity(value, f"sparsity of {glob!r}")
    first_fit = {name: next((glob for glob in rule if fnmatchcase(name, glob)), None) for name in shapes}
    problems = [f"no glob fits layer {name} {list(shapes[name])}" for name, glob in first_fit.items() if glob is None]
    for glob in rule:
        if not any(fnmatchcase(name, glob) for name in shapes):
            problems.append(f"glob {glob!r} fits no layer{nearest(glob, shapes)}")
        elif glob not in first_fit.values():
            problems.append(f"glob {glob!r} decides nothing, earlier globs take all its layers (move it up)")
    if problems:
        raise SelectionError(f"sparsity per layer: {'; '.join(problems)}. Layers: {', '.join(shapes)}")
    return {name: 1.0 - rule[glob] for name, glob in first_fit.items() if glob is not None}


def _check_layers(shapes: Mapping[str, Sequence[int]]) -> None:
    if not shapes:
        raise AllocationError("there are no layers to share a sparsity out over; select at least one")
    empty = [f"{name} {list(shape)}" for name, shape in shapes.items() if math.prod(shape) == 0]
    if empty:
        raise AllocationError(f"layers without weights: {', '.join(empty)}; exclude them")


def _check_sparsity(sparsity: float | None, what: str) -> None:
    if sparsity is None:
        raise OptionError(f"{what} is missing; give the fraction of zeros, in [0, 1)")
    if not 0.0 <= sparsity < 1.0:
        raise OptionError(f"{what} is {sparsity}; it is the fraction of zeros and must lie in [0, 1)")
