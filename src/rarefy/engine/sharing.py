"""Share a sparsity out over layers: an allocation rule's weights, turned into units of each layer's pattern."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from glob import escape

import torch
from torch import Tensor

from rarefy import allocation
from rarefy.engine.layer import Layer
from rarefy.errors import AllocationError, SelectionError
from rarefy.scores import lamp

Rule = str | Mapping[str, float]
"""A rule's name (`rarefy.allocation.RULES`), or sparsities by name glob: of layers ("fc?") or of parameters ("fc1.weight")."""


def share(
    layers: Mapping[str, Layer],
    sparsity: float,
    rule: Rule,
    scores: Callable[[], Mapping[str, Tensor]] | None = None,
    *,
    regrow: bool = False,
) -> dict[str, Tensor]:
    """Return how many units each layer keeps in each of its groups: name -> int64 [groups].

    Args:
        layers: the sparse layers, in the model's order.
        sparsity: fraction of zeros over all these layers together. Where a pattern prescribes its own (N:M), sparsities
            below that are stages on the way to it.
        rule: "uniform", "uniform+", "er", "erk", "global", "lamp", or sparsities by name.
        scores: gives weight-shaped scores, not negative; asked by "global" and "lamp" only. Weights that are dropped now
            rank below all that are kept, but with `regrow`, where scores may be negative too.

    Raises AllocationError when a shape-based rule leaves a layer empty; a score-based one may (with a warning).
    """
    if all(layer.pattern.fixed_sparsity is not None for layer in layers.values()):
        if not isinstance(rule, str):
            _check_fixed(layers, rule)
        return {name: _full(layer, _stage(layer, sparsity)) for name, layer in layers.items()}
    if is_scored(rule):
        assert scores is not None, f"{rule} needs scores"
        given = scores()
        ranked = {name: _per_weight(layer, given[name]) for name, layer in layers.items()}
        if rule == "lamp":
            ranked = {name: lamp(values) for name, values in ranked.items()}
        if not regrow:
            ranked = {
                n: r.masked_fill(~layers[n].mask(), -1) if layers[n].nnz < r.numel() else r for n, r in ranked.items()
            }
        kept = allocation.global_counts(ranked, sparsity)
    else:
        by_name = rule if isinstance(rule, str) else _by_layer(layers, rule)
        kept = allocation.counts({name: layer.shape for name, layer in layers.items()}, sparsity, by_name)
    result = {name: _units(layer, kept[name]) for name, layer in layers.items()}
    if empty := [name for name, units in result.items() if not units.any()]:
        if not is_scored(rule):
            name = empty[0]
            raise AllocationError(
                f"{name} {list(layers[name].shape)}: its share of {kept[name]} weights is less than one unit of pattern "
                f"{layers[name].pattern}. Lower the sparsity, or exclude this layer."
            )
        warnings.warn(
            f"These layers keep no weight at all, so nothing passes through them: {', '.join(empty)}.", stacklevel=3
        )
    return result


def staged(rule: Rule, stage: Callable[[float], float]) -> Rule:
    """Return the rule on the way to its end: each sparsity that is given by name becomes `stage(sparsity)`."""
    return {name: stage(s) for name, s in rule.items()} if isinstance(rule, Mapping) else rule


def is_scored(rule: Rule) -> bool:
    """Whether the rule looks at scores, and not at shapes alone."""
    return isinstance(rule, str) and rule in allocation.SCORED


def _by_layer(layers: Mapping[str, Layer], rule: Mapping[str, float]) -> dict[str, float]:
    """Turn globs over parameter or module names into one sparsity for each layer; the first glob that fits counts."""
    chosen: dict[str, str] = {}
    for name, layer in layers.items():
        fitting = (g for g in rule if any(fnmatchcase(n, g) for n in (name, layer.target.module_name)))
        if (glob := next(fitting, None)) is not None:
            chosen[name] = glob
    idle = [glob for glob in rule if glob not in chosen.values()]
    bare = [f"{name} {list(layer.shape)}" for name, layer in layers.items() if name not in chosen]
    if idle or bare:
        problems = [f"{glob!r} fits no layer that an earlier one leaves" for glob in idle] + [
            f"none fits {b}" for b in bare
        ]
        raise SelectionError(f"sparsities by layer name: {'; '.join(problems)}. Layers: {', '.join(layers)}.")
    return {escape(name): rule[glob] for name, glob in chosen.items()}


def _check_fixed(layers: Mapping[str, Layer], rule: Mapping[str, float]) -> None:
    for name, sparsity in _by_layer(layers, rule).items():
        fixed = next(iter(layers.values())).pattern.fixed_sparsity or 0.0
        if abs(sparsity - fixed) > 1e-9:
            raise AllocationError(
                f"{name}: the pattern makes {fixed:g} of its weights zero, and the allocation asks for {sparsity:g}. "
                "Exclude a layer that should stay dense."
            )


def _stage(layer: Layer, sparsity: float) -> int:
    fixed = layer.pattern.fixed_sparsity
    if fixed is None or sparsity >= fixed - 1e-9:
        return layer.pattern.keep(layer.shape)
    return math.floor((1 - sparsity) * layer.units_per_group + 0.5)


def _units(layer: Layer, weights: int) -> Tensor:
    if layer.pattern.fixed_sparsity is not None:
        return _full(layer, layer.pattern.keep(layer.shape))
    return _full(layer, math.floor(weights / layer.numel * layer.units_per_group + 0.5))


def _full(layer: Layer, units: int) -> Tensor:
    return torch.full((layer.groups,), units, dtype=torch.int64)


def _per_weight(layer: Layer, scores: Tensor) -> Tensor:
    """Give every weight its unit's mean score, so that units of different sizes compare."""
    size = layer.pattern.unit_size(layer.shape)
    return scores if size == 1 else layer.pattern.expand(layer.pattern.pool(scores) / size, layer.shape)
