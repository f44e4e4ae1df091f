"""The public call: a trained network becomes N:M sparse, without training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import nn

from rarefy.engine import LeftOut, Selector, Target, find_targets
from rarefy.engine.batch_norm import arguments_of, follow_change
from rarefy.engine.loading import check_free
from rarefy.engine.selection import check_fit, list_weights, unwrapped
from rarefy.errors import ModelError, OptionError, PatternError, SelectionError
from rarefy.metrics._run import random_state_kept
from rarefy.patterns import NM, Pattern, TransposableNM, parse_pattern
from rarefy.rearrangement import Rearrangement, rearrange
from rarefy.reconstruction.moments import LinearLayer, Moments
from rarefy.reconstruction.result import Conversion, Converted
from rarefy.reconstruction.solvers import Solver, parse_solver
from rarefy.reconstruction.watch import moments_of, uses

_ENDS = "stays dense as in the paper; name it with include to convert it too"


def convert(
    model: nn.Module,
    pattern: str | Pattern,
    batches: Iterable[Any],
    *,
    solver: str | Solver | None = "least-squares",
    permute: bool = False,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    seed: int = 0,
) -> Conversion:
    """Make a trained network N:M sparse without training, in place: dense, or pruned without structure.

    For each Linear and convolution layer, with x and y its inputs and outputs in the network as it is, on the batches:
    1. mask by magnitude, N of every M along the inputs (tiles of M x M, for transposable patterns);
    2. bring its outputs back: min ||y - x (w * mask)^T||^2 over the kept weights and the bias, by the solver;
    and when all layers are done, batch-norm statistics follow the change (`rarefy.engine.batch_norm.follow_change`; the paper
    estimates them anew, for which a few images are too few).

        report = rarefy.convert(model, "2:4", [images])      # a few hundred training images, or one of each class
        print(report)
        fast = rarefy.accelerate(model, example_input)       # a plain model with exact zeros

    Before fine-tuning, make the optimizer after this call; `rarefy.search.hold(model, report.masks)` holds the zeros.

    Args:
        model: any module that runs on the batches; changed in place, on success only.
        pattern: N:M ("2:4", "1:4@0") or transposable ("4:8t"). For a network pruned without structure, see
            `rarefy.patterns.nm_for`.
        batches: of the training data: inputs, pairs whose first part is the input, or mappings of keyword arguments. Labels are
            not used. All are held in memory.
        solver: "least-squares" (default: the exact minimum, damped), "adaprune" (the paper's: 1000 steps of Adam), a
            `rarefy.reconstruction.Solver` with options of its own, or None for masks alone.
        permute: first reorder channels all through the network, so that the pattern keeps more magnitude (`rarefy.rearrange`).
            Outputs stay the same, but parameters have another order than in older checkpoints.
        include, exclude: which layers, as in `sparsify`. Without include these stay dense: the first and the last layer that is
            called, depthwise convolutions, weights that several modules share or that `nn.MultiheadAttention` reads itself, and
            what is not a Linear or convolution that computes as PyTorch's own.
        seed: of the permutation search.

    Returns:
        A `Conversion`: mask, kept magnitude and error of each layer, what stayed dense and why.

    Raises:
        PatternError: not an N:M pattern, N = M, or M does not divide a weight's dimension. OptionError: no calibration
            data, NaN in weights or activations, an unknown solver. SelectionError: as `sparsify`; a layer that the batches
            never reach, one that cannot be converted but is included, or one that a sparsifier manages. ModelError: the
            model does not run on the batches, or cannot be copied. The model is left untouched by all of them.

    Source: Hubara et al. 2021, arXiv 2102.08124 (AdaPrune); exact least squares on the support: as in layer-wise pruning since
    Hassibi & Stork 1992; permutation: Pool & Yu 2021 (NeurIPS).

    >>> import rarefy
    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> report = rarefy.convert(net, "2:4", [torch.randn(64, 8)])
    >>> [(layer.name, layer.solved <= layer.masked, int(layer.mask.sum())) for layer in report.layers]
    [('2.weight', True, 128)]
    """
    model = unwrapped(model)
    pattern = _checked(pattern)
    solver = parse_solver(solver)
    held = [] if batches is None else list(batches)
    if not held:
        raise OptionError("convert needs at least one batch of training data to calibrate on; there is none")
    check_free(list_weights(model)[0])
    targets, dense = _choose(model, include, exclude, held[0])
    check_fit(pattern, targets)
    for target in targets:
        if not bool(torch.isfinite(target.parameter).all()):
            raise OptionError(
                f"{target.name} {list(target.shape)}: the weight holds NaN or infinity; mend or exclude it"
            )
    with random_state_kept(model):
        teacher = _copy(model)
        moved = _permuted(teacher, pattern, targets, held[0], seed) if permute else None
        student = _copy(teacher)
        layers = _convert(teacher, student, targets, pattern, solver, held)
        follow_change(student, teacher, held)
    new = dict(student.named_parameters()) | dict(student.named_buffers())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not torch.equal(tensor, new[name]):
                tensor.copy_(new[name])
    return Conversion(pattern, solver, layers, dense, moved)


def _checked(pattern: str | Pattern) -> NM | TransposableNM:
    pattern = parse_pattern(pattern)
    if not isinstance(pattern, NM | TransposableNM):
        raise PatternError(f"{pattern} is not N:M; convert to a pattern such as '2:4' or '4:8t'")
    if pattern.n == pattern.m:
        raise PatternError(
            f"{pattern} keeps every weight: N must be less than M, such as '{max(1, pattern.m // 2)}:{pattern.m}'"
        )
    return pattern


def _choose(
    model: nn.Module,
    include: Selector | Sequence[Selector] | None,
    exclude: Selector | Sequence[Selector] | None,
    batch: Any,
) -> tuple[list[Target], tuple[LeftOut, ...]]:
    """Return the weights to convert, in the order in which a batch calls them, and what stays dense and why."""
    targets, left = find_targets(model, include, exclude)
    able = [target for target in list_weights(model)[0] if _why_not(model, target) is None]
    place = uses(model, [target.module for target in able], batch)
    ends = {}
    if include is None and place:
        order = list(place)
        ends = {order[-1]: f"the last layer {_ENDS}", order[0]: f"the first layer {_ENDS}"}
    chosen = []
    for target in targets:
        reason = _why_not(model, target) or ends.get(target.module)
        if reason is None:
            chosen.append(target)
        elif include is not None:
            raise SelectionError(f"{target.name} {list(target.shape)} cannot be converted: {reason}. Exclude it.")
        else:
            left.append(LeftOut(target.name, target.shape, reason))
    if not chosen:
        reasons = "; ".join(f"{item.name} {list(item.shape)}: {item.reason}" for item in left if len(item.shape) > 1)
        raise SelectionError(f"No layer is left to convert: {reasons}.")
    if idle := [target.name for target in chosen if target.module not in place]:
        raise SelectionError(
            f"{', '.join(idle)}: never called on the first calibration batch, so its inputs are not known. Leave it dense: "
            f"exclude={idle}."
        )
    chosen.sort(key=lambda target: place[target.module])
    return chosen, tuple(item for item in left if len(item.shape) > 1)


def _why_not(model: nn.Module, target: Target) -> str | None:
    """Say why a weight is never converted; None if it can be."""
    module = target.module
    if not isinstance(module, LinearLayer):
        return f"a {type(module).__name__} is not a Linear or convolution"
    stock = next(kind for kind in get_args(LinearLayer) if isinstance(module, kind))
    own = getattr(module.forward, "__func__", None) is not stock.forward
    if own or getattr(type(module), "_conv_forward", None) is not getattr(stock, "_conv_forward", None):
        return f"a {type(module).__name__} with a forward pass of its own, which may compute with another weight or padding"
    sharing = {id(m) for m in model.modules() for p in m._parameters.values() if p is target.parameter}
    if len(sharing) > 1:
        return f"{len(sharing)} modules share it ({', '.join((target.name, *target.aliases))})"
    if any(isinstance(m, nn.MultiheadAttention) and m.out_proj is module for m in model.modules()):
        return "nn.MultiheadAttention reads it itself, so its inputs are not seen"
    if not isinstance(module, nn.Linear) and module.groups > 1 and module.weight.shape[1] == 1:
        return "a depthwise convolution, whose outputs read one channel each: there is none to leave out"
    return None


def _layers(model: nn.Module) -> Iterator[tuple[str, LinearLayer]]:
    """Yield the layers that may be converted, by the names of their weights (without what torch.compile puts before names)."""
    for target in list_weights(model)[0]:
        if isinstance(target.module, LinearLayer):
            yield target.name, target.module


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be copied, to be converted first: {error}") from error


def _permuted(model: nn.Module, pattern: Pattern, targets: Sequence[Target], batch: Any, seed: int) -> Rearrangement:
    names = {target.name for target in targets}
    args, kwargs = arguments_of(batch, targets[0].parameter.device)
    example = kwargs or args
    return rearrange(model, pattern, example_input=example, include=lambda name, _: name in names, seed=seed)


def _convert(
    teacher: nn.Module,
    student: nn.Module,
    targets: Sequence[Target],
    pattern: NM | TransposableNM,
    solver: Solver | None,
    batches: Sequence[Any],
) -> tuple[Converted, ...]:
    """Convert every layer of the student, with inputs and outputs of the teacher."""
    theirs, mine = (dict(_layers(model)) for model in (teacher, student))
    layers = {target.name: theirs[target.name] for target in targets}
    done = []
    for name, moments in moments_of(teacher, layers, batches):
        scores = moments.layer.weight.detach().abs()
        mask = pattern.project(scores.float(), pattern.keep(scores.shape), name)
        masked = moments.joined() * moments.free(mask)
        solved = masked if solver is None else solver.solve(moments, mask, pattern.m)
        moments.write(mine[name], solved)
        done.append(_converted(name, scores, mask, moments, masked, moments.joined(mine[name])))  # rounded to its dtype
    return tuple(done)


def _converted(
    name: str, scores: torch.Tensor, mask: torch.Tensor, moments: Moments, masked: torch.Tensor, solved: torch.Tensor
) -> Converted:
    total = float(scores.sum(dtype=torch.float64))
    return Converted(
        name=name,
        shape=tuple(scores.shape),
        mask=mask,
        kept=float(scores[mask].sum(dtype=torch.float64)) / total if total else 1.0,
        masked=moments.mean(moments.errors(masked)),
        solved=moments.mean(moments.errors(solved)),
        power=moments.mean(moments.power),
    )
