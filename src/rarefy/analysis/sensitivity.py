"""What a network loses when one layer, or one group of layers that belong together, is pruned and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.analysis._prunings import Groups, plan
from rarefy.analysis._table import aligned
from rarefy.engine.options import check_fraction
from rarefy.engine.selection import Selector, find_targets
from rarefy.errors import OptionError, SelectionError
from rarefy.nn import SparseModule
from rarefy.patterns import Pattern, parse_pattern

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
    groups: Groups | None = None,
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
        groups: coupled layers: groups by their names, or a list of groups. A group is a list of weight or layer names and
            (name, dimension) pairs, or a group of `rarefy.coupling.couple(model, example)`, whose result may be given as
            it is: units that are dropped are then zero in every member, biases and norms too. Default: each layer alone.
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
    prunings = plan(model, {target.name: target for target in targets}, groups, pattern, scores)
    with _put_back(model) as put_back:
        baseline = _number(evaluate(model))
        curves = {}
        for name, pruning in prunings.items():
            points = []
            for level in levels:
                put_back()
                zeroed, sparsity = pruning.prune(level)
                points.append(Point(level, sparsity, zeroed, _number(evaluate(model))))
            curves[name] = Curve(pruning.names, pruning.numel, tuple(points))
    return Sensitivity(baseline, curves, higher_is_better)


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
