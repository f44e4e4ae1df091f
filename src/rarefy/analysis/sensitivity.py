"""What a network loses when one layer, or one group of layers that belong together, is pruned and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.analysis._table import aligned
from rarefy.engine.options import check_fraction
from rarefy.engine.selection import Selector, Target, find_targets
from rarefy.errors import OptionError, PatternError, SelectionError, nearest
from rarefy.kernels import select_k
from rarefy.nn import SparseModule
from rarefy.patterns import Pattern, Slice, parse_pattern

Member = str | tuple[str, int]
"""A layer of a coupled group: its name, or (name, dimension) where its units lie along another dimension than 0."""

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Point:
    """One pruning: the sparsity asked, the one that its layers have then, weights that it zeroed, and the value measured."""

    asked: float
    sparsity: float
    zeroed: int
    value: float


@dataclass(frozen=True)
class Curve:
    """The points of one layer or group, by rising sparsity; `layers` are its weights' names."""

    layers: tuple[str, ...]
    numel: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Sensitivity:
    """Curves by layer or group name, and the value of the network as it is.

    `higher_is_better` says whether a value is like an accuracy or like a loss; `harm` is positive where pruning hurts.
    """

    baseline: float
    curves: dict[str, Curve]
    higher_is_better: bool = True

    def harm(self, name: str) -> tuple[float, ...]:
        """Return by how much each point of a curve is worse than the network as it is, in the value's own units."""
        sign = 1.0 if self.higher_is_better else -1.0
        return tuple(sign * (self.baseline - point.value) for point in self.curves[name].points)

    def order(self) -> list[str]:
        """Return the names, most sensitive first: by the mean harm over the sparsities; NaN counts as the worst."""
        return sorted(self.curves, key=lambda name: -_worst_if_nan(sum(self.harm(name)) / len(self.harm(name))))

    def untouched(self) -> list[str]:
        """Return the names whose every point zeroed nothing: their flat curves say nothing."""
        return [name for name, curve in self.curves.items() if not any(point.zeroed for point in curve.points)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        asked = [point.asked for point in next(iter(self.curves.values())).points]
        head = ["", "weights", *(f"{sparsity:.4g}" for sparsity in asked)]
        rows = [
            [name, f"{self.curves[name].numel:,}", *(f"{point.value:.4g}" for point in self.curves[name].points)]
            for name in self.order()
        ]
        lines = [f"as it is: {self.baseline:.4g}; most sensitive first, by sparsity of the one layer or group:"]
        lines += aligned(head, rows)
        if self.untouched():
            lines.append(f"nothing was pruned in: {', '.join(self.untouched())}")
        return "\n".join(lines)


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    sparsities: Sequence[float] = SPARSITIES,
    groups: Mapping[str, Sequence[Member]] | Sequence[Sequence[Member]] | None = None,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    pattern: str | Pattern = "unstructured",
    scores: Mapping[str, Tensor] | None = None,
    higher_is_better: bool = True,
) -> Sensitivity:
    """Prune one layer (or one group) at a time to several sparsities, evaluate, and put everything back.

    At the end, and after any error, every parameter, buffer, gradient, training flag and torch's CPU random state are bit for
    bit what they were; every evaluation starts from that same state, in eval mode. `evaluate` may do what it likes with
    the model, even train it a little.

    A layer keeps its weights of largest score. With a channel pattern ("row", "column"), the layers of a group lose the
    *same* units: those of smallest score summed over all members. This is what channel surgery removes: pruning one
    member of a residual stage alone measures something that cannot be done. Name the layers that read the channels too, as
    (name, 1): a channel is then gone, bias and norm included. Where a dimension is r times as long as the
    group's shortest (a Linear behind a flattened image), r neighbours belong to one unit.

    Args:
        model: any module with layers that can be sparse, on any device.
        evaluate: `evaluate(model) -> number`, an accuracy or a loss.
        sparsities: fractions of zeros, in [0, 1).
        groups: coupled layers: a list of lists of weight or layer names, or these by the group's name. Default: each
            layer alone.
        include, exclude: which layers, as in `sparsify`; not with `groups`.
        pattern: "unstructured", "row", "column", "4x1", "2:4", ...; a pattern of one sparsity (2:4) takes that one.
        scores: what a weight matters, weight-shaped, by name; default |w|.
        higher_is_better: False where `evaluate` gives a loss.

    Returns:
        The curves. A point also says how many weights it zeroed: 0 where the layer was as sparse before.

    Raises:
        SelectionError: a name that is no layer, a layer twice in a group, compressed layers.
        PatternError: a layer does not fit the pattern, or a group's layers have different numbers of units.
        OptionError: a sparsity outside [0, 1), or `evaluate` gives no number.

    Source: Li et al. 2017, "Pruning filters for efficient ConvNets" (arXiv 1608.08710, section 3.2), per layer.

    >>> net = nn.Linear(2, 2, bias=False)
    >>> net.weight.data = torch.tensor([[1.0, 4.0], [2.0, 3.0]])
    >>> found = sensitivity(net, lambda m: float(m.weight.detach().sum()), sparsities=[0.5, 0.75])
    >>> found.baseline, [point.value for point in found.curves["weight"].points]
    (10.0, [7.0, 4.0])
    """
    pattern = parse_pattern(pattern)
    levels = [pattern.fixed_sparsity] if pattern.fixed_sparsity is not None else sorted(set(sparsities))
    if not levels:
        raise OptionError("sparsities is empty: give at least one fraction of zeros")
    for level in levels:
        check_fraction("sparsities", level)
    if groups is not None and (include is not None or exclude is not None):
        raise OptionError("give groups, which name their layers, or include and exclude; not both")
    targets, _ = find_targets(model, include, exclude)
    compressed = [target.name for target in targets if isinstance(target.module, SparseModule)]
    if compressed:
        raise SelectionError(
            f"{', '.join(compressed[:4])}: compressed layers hold no dense weight; call finalize() first."
        )
    known = {target.name: target for target in targets}
    members = _members(groups, known)
    plans = {name: _Plan(name, group, pattern, known, scores) for name, group in members.items()}
    with _put_back(model) as put_back:
        baseline = _number(evaluate(model))
        curves = {}
        for name, plan in plans.items():
            points = []
            for level in levels:
                put_back()
                zeroed, sparsity = plan.prune(level)
                points.append(Point(level, sparsity, zeroed, _number(evaluate(model))))
            curves[name] = Curve(plan.names, plan.numel, tuple(points))
    return Sensitivity(baseline, curves, higher_is_better)


class _Plan:
    """How one group is pruned: which units its members share, and their scores, taken from the untouched weights."""

    def __init__(
        self,
        name: str,
        group: Sequence[tuple[Target, int | None]],
        pattern: Pattern,
        known: Mapping[str, Target],
        scores: Mapping[str, Tensor] | None,
    ) -> None:
        self.targets = [target for target, _ in group]
        self.names = tuple(dict.fromkeys(target.name for target in self.targets))
        self.numel = sum(known[n].parameter.numel() for n in self.names)
        self.pattern = pattern
        for target in self.targets:
            pattern.check(target.shape, target.name)
        self.scores = {t.name: _score(t, scores) for t in self.targets}
        self.dims: list[int] | None = None
        if isinstance(pattern, Slice):
            self.dims = [pattern.dim if dim is None else dim for _, dim in group]
            self._total = _shared_scores(name, self.targets, self.dims, self.scores)
        elif any(dim is not None for _, dim in group):
            raise PatternError(f"{name}: (name, dimension) is for the patterns 'row' and 'column', not for {pattern}")

    @torch.no_grad()
    def prune(self, sparsity: float) -> tuple[int, float]:
        """Zero weights in place; return how many were not zero before, and the members' sparsity now."""
        before = sum(int(target.parameter.count_nonzero()) for target in self._once())
        if self.dims is not None:
            units = self._total.numel()
            keep = select_k(self._total[None], max(1, math.floor((1 - sparsity) * units + 0.5)))[0]
            for target, dim in zip(self.targets, self.dims, strict=True):
                weight = target.parameter
                along = keep.repeat_interleave(weight.shape[dim] // units).to(weight.device)
                weight.mul_(along.view([-1 if d == dim else 1 for d in range(weight.dim())]))
        else:
            for target in self.targets:
                count = self.pattern.keep(target.shape, 1 - sparsity)
                mask = self.pattern.project(self.scores[target.name], count, target.name)
                target.parameter.masked_fill_(~mask.to(target.parameter.device), 0)
        after = sum(int(target.parameter.count_nonzero()) for target in self._once())
        return before - after, 1 - after / self.numel

    def _once(self) -> list[Target]:
        return list({target.name: target for target in self.targets}.values())


def _shared_scores(name: str, targets: Sequence[Target], dims: Sequence[int], scores: Mapping[str, Tensor]) -> Tensor:
    """Sum the members' scores over everything but the units that they share; float64 [units]."""
    for target, dim in zip(targets, dims, strict=True):
        if not 0 <= dim < len(target.shape):
            raise PatternError(f"{name}: {target.name} {list(target.shape)} has no dimension {dim}")
    sizes = [target.shape[dim] for target, dim in zip(targets, dims, strict=True)]
    units = min(sizes)
    if any(size % units for size in sizes):
        shapes = ", ".join(f"{t.name} {list(t.shape)} along {d}" for t, d in zip(targets, dims, strict=True))
        raise PatternError(f"{name}: its layers do not share one number of units: {shapes}. Split the group.")
    total = torch.zeros(units, dtype=torch.float64)
    for target, dim in zip(targets, dims, strict=True):
        lines = scores[target.name].double().movedim(dim, 0).reshape(units, -1)
        total += lines.sum(1).cpu()
    return total


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


def _members(
    groups: Mapping[str, Sequence[Member]] | Sequence[Sequence[Member]] | None, known: Mapping[str, Target]
) -> dict[str, list[tuple[Target, int | None]]]:
    """Return each group's targets with the dimension of their units, by the group's name."""
    if groups is None:
        return {name: [(target, None)] for name, target in known.items()}
    by_module = {target.module_name: target for target in known.values()}
    named = groups if isinstance(groups, Mapping) else {_title(group): group for group in groups}
    if not named or len(named) < len(groups):
        raise SelectionError("groups is empty, or holds a group twice")
    found: dict[str, list[tuple[Target, int | None]]] = {}
    for title, group in named.items():
        if isinstance(group, str) or not group:
            raise SelectionError(
                f"group {title!r} must be a list of layer names, such as ['conv1', 'conv2'], not {group!r}"
            )
        found[title] = []
        for member in group:
            name, dim = (member, None) if isinstance(member, str) else member
            target = known.get(name) or by_module.get(name)
            if target is None:
                raise SelectionError(f"group {title!r}: {name!r} is no layer that can be sparse{nearest(name, known)}")
            if (target.name, dim) in [(other.name, d) for other, d in found[title]]:
                raise SelectionError(f"group {title!r} holds {target.name!r} twice")
            found[title].append((target, dim))
    return found


def _title(group: Sequence[Member]) -> str:
    return " + ".join(member if isinstance(member, str) else f"{member[0]}@{member[1]}" for member in group)


def _number(value: Any) -> float:
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"evaluate must return one number, not {type(value).__name__}") from error


def _worst_if_nan(harm: float) -> float:
    return math.inf if math.isnan(harm) else harm


@contextmanager
def _put_back(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Yield a function that puts the model back, in eval mode; at the end it is put back as it was, whatever happened."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    grads = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    flags = [(module, module.training) for module in model.modules()]
    random = torch.get_rng_state()

    @torch.no_grad()
    def put_back() -> None:
        for module, own in buffers:
            module._buffers.update(own)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
        for parameter, _, wanted in grads:
            parameter.grad = None
            parameter.requires_grad_(wanted)
        for module, _ in flags:
            module.training = False
        torch.set_rng_state(random)

    try:
        put_back()
        yield put_back
    finally:
        put_back()
        for parameter, grad, _ in grads:
            parameter.grad = grad
        for module, training in flags:
            module.training = training
