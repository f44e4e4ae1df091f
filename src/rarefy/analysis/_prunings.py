"""How one layer, or layers that belong together, are pruned in place: weight by weight, or in units that they share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rarefy.coupling import Group
from rarefy.engine.selection import Target
from rarefy.errors import OptionError, PatternError, SelectionError, nearest
from rarefy.kernels import select_k
from rarefy.patterns import Pattern, Slice

Member = str | tuple[str, int]
"""A layer of a group: its name, or (name, dimension) where its units lie along another dimension than the pattern's."""

Layers = Sequence[Member] | Group
Groups = Mapping[str, Layers] | Iterable[Layers]


class Pruning:
    """One thing to prune: its weights' names and number, and how."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = list({target.name: target for target in targets}.values())
        self.names = tuple(target.name for target in self.targets)
        self.numel = sum(target.parameter.numel() for target in self.targets)

    @torch.no_grad()
    def prune(self, sparsity: float) -> tuple[int, float]:
        """Zero weights in place; return how many were not zero before, and the sparsity that all have now."""
        before = self._nonzero()
        self._zero(sparsity)
        after = self._nonzero()
        return before - after, 1 - after / self.numel

    def _nonzero(self) -> int:
        return sum(int(target.parameter.count_nonzero()) for target in self.targets)

    def _zero(self, sparsity: float) -> None:
        raise NotImplementedError


class ByPattern(Pruning):
    """Each layer for itself, to the same sparsity in the same pattern."""

    def __init__(self, targets: Sequence[Target], pattern: Pattern, scores: Mapping[str, Tensor] | None) -> None:
        super().__init__(targets)
        for target in self.targets:
            pattern.check(target.shape, target.name)
        self.pattern = pattern
        self.scores = {target.name: _score(target, scores) for target in self.targets}

    def _zero(self, sparsity: float) -> None:
        for target in self.targets:
            count = self.pattern.keep(target.shape, 1 - sparsity)
            mask = self.pattern.project(self.scores[target.name], count, target.name)
            target.parameter.masked_fill_(~mask.to(target.parameter.device), 0)


@dataclass(frozen=True)
class Place:
    """One parameter's part in a group of units: the places of each, [units, block], along a dimension."""

    parameter: nn.Parameter
    dim: int
    index: Tensor
    rows: tuple[int, int] | None = None

    def part(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


class ByUnits(Pruning):
    """Units that all members share, those of smallest score summed over the members' weights."""

    def __init__(
        self,
        places: Sequence[Place],
        targets: Sequence[Target],
        scores: Mapping[str, Tensor] | None,
    ) -> None:
        super().__init__(targets)
        self.places = places
        self.total = torch.zeros(places[0].index.shape[0], dtype=torch.float64)
        by_id = {id(target.parameter): target for target in self.targets}
        for place in places:
            if (target := by_id.get(id(place.parameter))) is not None:
                lines = place.part(_score(target, scores).double().cpu()).movedim(place.dim, 0)
                self.total += lines[place.index].flatten(1).sum(1)

    def _zero(self, sparsity: float) -> None:
        count = max(1, math.floor((1 - sparsity) * self.total.numel() + 0.5))
        dropped = ~select_k(self.total[None], count)[0]
        for place in self.places:
            at = place.index[dropped].flatten().to(place.parameter.device)
            place.part(place.parameter).index_fill_(place.dim, at, 0)


def plan(
    model: nn.Module,
    known: Mapping[str, Target],
    groups: Groups | None,
    pattern: Pattern,
    scores: Mapping[str, Tensor] | None,
) -> dict[str, Pruning]:
    """Return what to prune by its name; changes nothing. Raises SelectionError and PatternError where it cannot be done."""
    if groups is None:
        return {name: ByPattern([target], pattern, scores) for name, target in known.items()}
    named = groups if isinstance(groups, Mapping) else _titled(list(groups))
    if not named:
        raise SelectionError("groups is empty: give at least one list of layer names, or leave it out")
    found: dict[str, Pruning] = {}
    for title, group in named.items():
        if isinstance(group, str) or (isinstance(group, Sequence) and not group):
            raise SelectionError(
                f"group {title!r} must be a list of layer names, such as ['conv1', 'conv2'], not {group!r}"
            )
        if not isinstance(group, Sequence):
            found[title] = _coupled(title, group, model, known, pattern, scores)
            continue
        members = _members(title, group, known)
        targets = [target for target, _ in members]
        if isinstance(pattern, Slice):
            found[title] = ByUnits(_places(title, members, pattern.dim), targets, scores)
        elif any(dim is not None for _, dim in members):
            raise PatternError(f"{title}: (name, dimension) is for the patterns 'row' and 'column', not for {pattern}")
        else:
            found[title] = ByPattern(targets, pattern, scores)
    return found


def _coupled(
    title: str,
    group: Group,
    model: nn.Module,
    known: Mapping[str, Target],
    pattern: Pattern,
    scores: Mapping[str, Tensor] | None,
) -> ByUnits:
    if not isinstance(pattern, Slice):
        raise PatternError(f"{title}: coupled units die whole: pattern='row', not {str(pattern)!r}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    places = []
    for member in group.members:
        if member.name in buffers:
            continue  # statistics of a channel that is gone change nothing
        if member.name not in parameters:
            raise SelectionError(
                f"group {title!r}: the model has no parameter {member.name!r}{nearest(member.name, parameters)}"
            )
        places.append(Place(parameters[member.name], member.dim, member.index.cpu(), member.rows))
    mine = {id(place.parameter) for place in places}
    targets = [target for target in known.values() if id(target.parameter) in mine]
    if not targets:
        raise SelectionError(f"group {title!r} holds no weight that can be sparse")
    return ByUnits(places, targets, scores)


def _places(title: str, members: Sequence[tuple[Target, int | None]], default: int) -> list[Place]:
    """Lay the units out: as many as the shortest dimension has places, in equal runs along the others."""
    dims = [default if dim is None else dim for _, dim in members]
    for (target, _), dim in zip(members, dims, strict=True):
        if not 0 <= dim < len(target.shape):
            raise PatternError(f"{title}: {target.name} {list(target.shape)} has no dimension {dim}")
    sizes = [target.shape[dim] for (target, _), dim in zip(members, dims, strict=True)]
    units = min(sizes)
    if any(size % units for size in sizes):
        shapes = ", ".join(f"{t.name} {list(t.shape)} along {d}" for (t, _), d in zip(members, dims, strict=True))
        raise PatternError(f"{title}: its layers do not share one number of units: {shapes}. Split the group.")
    return [
        Place(target.parameter, dim, torch.arange(size).view(units, -1))
        for (target, _), dim, size in zip(members, dims, sizes, strict=True)
    ]


def _members(title: str, group: Sequence[Member], known: Mapping[str, Target]) -> list[tuple[Target, int | None]]:
    by_module = {target.module_name: target for target in known.values()}
    found: list[tuple[Target, int | None]] = []
    for member in group:
        name, dim = (member, None) if isinstance(member, str) else member
        target = known.get(name) or by_module.get(name)
        if target is None:
            raise SelectionError(f"group {title!r}: {name!r} is no layer that can be sparse{nearest(name, known)}")
        if (target.name, dim) in [(other.name, d) for other, d in found]:
            raise SelectionError(f"group {title!r} holds {target.name!r} twice")
        found.append((target, dim))
    return found


def _titled(groups: Sequence[Layers]) -> dict[str, Layers]:
    """Name each group after its members, or as it names itself; a name that comes again gets a number."""
    named: dict[str, Layers] = {}
    for group in groups:
        if isinstance(group, str):
            base = group
        elif isinstance(group, Sequence):
            base = " + ".join(m if isinstance(m, str) else f"{m[0]}@{m[1]}" for m in group)
        else:
            base = group.name
        title, number = base, 1
        while title in named:
            number += 1
            title = f"{base} ({number})"
        named[title] = group
    return named


def _score(target: Target, scores: Mapping[str, Tensor] | None) -> Tensor:
    weight = target.parameter.detach()
    if scores is None:
        return weight.abs()
    if target.name not in scores:
        raise SelectionError(f"scores holds nothing for {target.name!r}{nearest(target.name, scores)}")
    if scores[target.name].shape != weight.shape:
        raise OptionError(
            f"the scores of {target.name!r} have shape {list(scores[target.name].shape)}, the weight {list(weight.shape)}"
        )
    return scores[target.name].detach()
