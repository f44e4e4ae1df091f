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
from rarefy.kernels import select_k
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
        rule: a name of `rarefy.allocation.RULES`, or sparsities by name.
        scores: gives weight-shaped scores; asked by "global" and "lamp" only. Weights that are dropped now rank below all
            that are kept, but with `regrow`.

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
            _check_not_negative(ranked)
            ranked = {name: lamp(values) for name, values in ranked.items()}
        if not regrow:
            ranked = {name: _dropped_last(layers[name], values) for name, values in ranked.items()}
        kept = allocation.global_counts(ranked, sparsity)
    else:
        by_name = rule if isinstance(rule, str) else _by_layer(layers, rule)
        kept = allocation.counts({name: layer.shape for name, layer in layers.items()}, sparsity, by_name)
    result = {name: _units(layer, kept[name]) for name, layer in layers.items()}
    if empty := [name for name, units in result.items() if not units.any() and layers[name].nnz]:
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


def largest_across(scores: Mapping[str, Tensor], count: int, *, each: int = 0) -> dict[str, Tensor]:
    """Mark the `count` largest scores over several layers together, but at least `each` of every layer; bool, per layer.

    Ties go to the earlier layer, then to the lower index. Scores are vectors, not negative.
    """
    device = next(iter(scores.values())).device
    flat = torch.cat([s.to(device) for s in scores.values()])
    sizes, start = [s.numel() for s in scores.values()], 0
    for part, size in zip(scores.values(), sizes, strict=True):
        flat[start : start + size].masked_fill_(select_k(part, min(each, size)).to(device), torch.inf)
        start += size
    chosen = select_k(flat, count).split(sizes)
    return {name: part.to(scores[name].device) for name, part in zip(scores, chosen, strict=True)}


def is_scored(rule: Rule) -> bool:
    """Whether the rule looks at scores, and not at shapes alone."""
    return isinstance(rule, str) and rule in allocation.SCORED


def keep_best(layers: Mapping[str, Layer], scores: Mapping[str, Tensor], sparsity: float, rule: Rule) -> None:
    """Keep in each layer the units of largest score, as many as the rule gives it; a dropped one does not come back.

    Args, errors: as `share`.
    """
    for name, counts in without_growth(layers, share(layers, sparsity, rule, lambda: scores)).items():
        layers[name].rewire(layers[name].best(_dropped_last(layers[name], scores[name]), counts))


def without_growth(layers: Mapping[str, Layer], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lower the counts to what each layer keeps now; what one layer cannot take, the next that still can gets.

    Only layers of one group trade: the others' counts are prescribed.
    """
    missing, result = 0, {}
    for name, wanted in counts.items():
        now = layers[name].counts().cpu()
        result[name] = torch.minimum(wanted, now)
        missing += int((wanted - result[name]).sum())
    for name, layer in layers.items():
        if missing and layer.groups == 1:
            extra = min(missing, int(layer.counts()) - int(result[name]))
            result[name] = result[name] + extra
            missing -= extra
    return result


def staged(rule: Rule, sparsity_at: Callable[[float], float]) -> Rule:
    """Return the rule of a stage on the way: sparsities by name become what `sparsity_at(final)` says; names stay."""
    return rule if isinstance(rule, str) else {name: sparsity_at(final) for name, final in rule.items()}


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


def _dropped_last(layer: Layer, scores: Tensor) -> Tensor:
    """Rank what is dropped now below all that is kept."""
    return scores if layer.nnz == layer.numel else scores.masked_fill(~layer.mask().to(scores.device), -math.inf)


def _check_not_negative(scores: Mapping[str, Tensor]) -> None:
    for name, values in scores.items():
        if bool((values < 0).any()):
            raise AllocationError(
                f"{name} {list(values.shape)}: its scores are of both signs, and allocation 'lamp' ranks sizes; use 'global' "
                "or a rule of shapes."
            )


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
    return layer.pattern.stage(layer.shape, 1 - sparsity)


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
