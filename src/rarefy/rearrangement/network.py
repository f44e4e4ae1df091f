"""Whole-network rearrangement: channels change places all through a network, so that a pattern keeps more of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from rarefy.coupling import Coupling, Group, Pinned, couple
from rarefy.engine import Selector, Sparsifier, find_targets
from rarefy.engine.options import check_sparsity
from rarefy.engine.selection import check_fit
from rarefy.errors import ModelError, OptionError
from rarefy.metrics._run import arguments, left_as_it_was
from rarefy.patterns import Pattern, parse_pattern
from rarefy.rearrangement.moves import Holders, by_name, move_
from rarefy.rearrangement.search import search
from rarefy.rearrangement.weights import Weight, terms_of, touched, weights_of

_TOLERANCE = 1e-5  # of the largest output
_FAILURES = 20


@dataclass(frozen=True, eq=False)
class Moved:
    """What became of one group: unit order[i] stands at place i now; the objective of its weights before and after."""

    group: Group
    order: Tensor
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Rearrangement:
    """What `rearrange` did; `str()` of it is a table.

    Attributes:
        pattern: what the order is for.
        moved: the groups of channels that the pattern's weights depend on, moved or not.
        pinned: dimensions whose channels could not move, with the reason.
        before, after: the objective J summed over the weights.
        total: sum of all scores, so that after / total is the kept share; for zeros that are there: the weights that are not.
    """

    pattern: Pattern
    moved: tuple[Moved, ...]
    pinned: tuple[Pinned, ...]
    before: float
    after: float
    total: float

    @property
    def gain(self) -> float:
        """What was gained, as a share of all scores."""
        return (self.after - self.before) / self.total if self.total else 0.0

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict with its channels moved in the same way: of an averaged copy, or of an older checkpoint."""
        done = {name: tensor.clone() for name, tensor in state.items()}
        for name, moves in by_name([(m.group.members, m.order) for m in self.moved]).items():
            if name in done:
                move_(done[name], moves)
        return done

    def __str__(self) -> str:
        head = ("group", "units", "before", "after", "gain")
        rows = [head]
        for m in self.moved:
            rows.append(
                (m.group.name, str(m.group.units), f"{m.before:.6g}", f"{m.after:.6g}", _percent(m.before, m.after))
            )
        rows.append(("all weights", "", f"{self.before:.6g}", f"{self.after:.6g}", _percent(self.before, self.after)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        kept = (
            f"{self.pattern}: {self.before / self.total:.2%} of the scores before, {self.after / self.total:.2%} after"
        )
        if self.after < 0:
            kept = f"{-self.before / self.total:.3f} loads for each kept weight before, {-self.after / self.total:.3f} after"
        return "\n".join([kept, *lines, *(f"fixed: {p}" for p in self.pinned)])


def rearrange(
    model: nn.Module,
    pattern: str | Pattern,
    sparsity: float | None = None,
    *,
    example_input: Any,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    sparsifier: Sparsifier | None = None,
    tries: int = 100,
    seed: int = 0,
) -> Rearrangement:
    """Reorder a network's channels, in place, so that a pattern keeps more of its weights; outputs stay the same.

    A permutation pi of the channels between layers, carried through everything that reads or writes them (see
    `rarefy.coupling.couple`), changes nothing that the network computes, and costs nothing at run time. But it decides which
    weights are neighbours. For each set of channels that must move together, maximise

        J(pi) = sum over weights of what the pattern keeps:
            group16, group16-tap   sum over groups of 16 outputs of the k largest sums over the group, k as the sparsity says
            2:4, 2:4@0, N:M        sum over groups of M of the N largest
            2:4t, N:Mt             sum over tiles of what the best mask keeps
            unstructured           - (loads): with the zeros that are there, the inputs read by each 4 neighbouring outputs

    First a greedy start (groups and loads): each group is seeded with the largest row that is left and filled with the rows
    whose best entries overlap most with the seed's. Then exchanges: in each round groups meet in random pairs, all exchanges
    between two groups are valued at once, and the best is made if it gains. The start is taken only where it is better than the
    present order, so J never falls. For transposable N:M exchanges are valued by the groups of M along both dimensions, each a
    bound of what the tiles keep; a group's order is taken only where the tiles themselves keep no less.

    Do this before the first mask is chosen, with a trained network:

        rarefy.rearrange(model, "group16", 0.3, example_input=x, exclude=["conv1", "fc"])
        sparse = rarefy.sparsify(model, "gradual", pattern="group16", sparsity=0.3, exclude=["conv1", "fc"], ...)

    Args:
        model: any module that runs on the example; changed in place, on success only.
        pattern: "group16" and its like, N:M, or "unstructured".
        sparsity: fraction of zeros in each of the weights; N:M brings its own, and unstructured zeros are there already.
        example_input: one tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        include, exclude: which weights are to have the pattern, as in `sparsify`. The others are carried along.
        scores: weight-shaped scores by parameter name in place of the default: w^2 for groups, |w| for N:M.
        optimizer: the optimizers whose per-element state must follow.
        sparsifier: the sparsifier that manages the model, if any; its masks follow.
        tries: exchanges that are valued, for each channel. The search also ends after 20 rounds without a gain.
        seed: of the random pairs.

    Returns:
        A `Rearrangement`: J of each group before and after, what could not move, and `apply` for copies of the weights.

    Raises:
        ModelError: the model does not run on the example, cannot be copied, or gives other outputs on the copy that is tried
            first. PatternError: a weight does not fit the pattern, or a mask would no longer. OptionError, SelectionError: as
            `sparsify`; a layer that holds kept values only. StateError: an optimizer remembers what cannot be moved. The model
            is left untouched by all of them.

    Source: Xu et al. 2023 (SparseByteNN), arXiv 2310.19509, for the idea; objective and search are a reconstruction. For N:M:
    Pool & Yu 2021, "Channel permutations for N:M sparsity" (NeurIPS).

    >>> import rarefy
    >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    >>> done = rarefy.rearrange(net, "2:4", example_input=torch.zeros(1, 3, 8, 8), exclude="0")
    >>> done.after >= done.before
    True
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    pattern = parse_pattern(pattern)
    if sparsity is not None:
        check_sparsity(sparsity, pattern)
    if isinstance(tries, bool) or not isinstance(tries, int) or tries < 1:
        raise OptionError(f"tries={tries!r} must be a whole number of at least 1")
    holders = Holders(model, optimizer, sparsifier)
    targets, _ = find_targets(model, include, exclude)
    check_fit(pattern, targets)
    names = {id(p): name for name, p in model.named_parameters()}
    shapes = {names[id(t.parameter)]: t.shape for t in targets}
    weights = weights_of(shapes, pattern, sparsity)
    work, example, before = _copied(model, example_input)
    coupling = couple(work, example)
    tensors = dict(work.named_parameters()) | dict(work.named_buffers())
    ranked = {n: _scores(w, tensors[n].detach(), scores) for n, w in weights.items()}
    at_first = sum(w.value(ranked[n]) for n, w in weights.items())
    moved = _search(coupling, weights, tensors, ranked, tries, seed)
    _compare(model, before, _outputs(work, example))
    moves = by_name([(m.group.members, m.order) for m in moved if not _is_sorted(m.order)])
    parameters = dict(model.named_parameters())
    holders.check(parameters, moves)
    real = parameters | dict(model.named_buffers())
    for name, mine in moves.items():
        move_(real[name].detach(), mine)
        if name in parameters:
            holders.follow(parameters[name], lambda t, mine=mine: move_(t, mine))  # type: ignore[misc]
    at_last = sum(w.value(ranked[n]) for n, w in weights.items())
    return Rearrangement(
        pattern,
        moved,
        _of_interest(coupling, weights),
        at_first,
        at_last,
        sum(float(s.double().sum()) for s in ranked.values()),
    )


def _search(
    coupling: Coupling,
    weights: Mapping[str, Weight],
    tensors: Mapping[str, Tensor],
    ranked: Mapping[str, Tensor],
    tries: int,
    seed: int,
) -> tuple[Moved, ...]:
    """Order every group, one after the other, and move the channels of the copy and of the scores."""
    done = []
    generator = torch.Generator().manual_seed(seed)
    for group in coupling.groups:
        mine = touched(group, weights)
        if not mine:
            continue
        order = torch.arange(group.units)
        before = after = sum(w.value(ranked[w.name]) for w in mine)
        if group.units > 1 and terms_of(group, weights, ranked, order):
            order, _, _ = search(
                lambda o, group=group: terms_of(group, weights, ranked, o),  # type: ignore[misc]
                group.units,
                generator,
                tries * group.units,
                _FAILURES,
            )
            tried = {w.name: ranked[w.name].clone() for w in mine}
            for member in group.members:
                if member.name in tried:
                    move_(tried[member.name], [(member, order)])
            after = sum(w.value(tried[w.name]) for w in mine)
            if after < before:  # what the terms leave out has lost more than they gained
                order, after = torch.arange(group.units), before
            if not _is_sorted(order):
                for member in group.members:
                    for held in (tensors, ranked):
                        if member.name in held:
                            move_(held[member.name].detach(), [(member, order)])
        done.append(Moved(group, order, before, after))
    return tuple(done)


def _scores(weight: Weight, tensor: Tensor, given: Mapping[str, Tensor] | None) -> Tensor:
    scores = weight.default_scores(tensor.cpu())
    if given is not None:
        if weight.name not in given:
            raise OptionError(f"scores hold nothing for {weight.name}; they hold {', '.join(given)}")
        scores = given[weight.name].detach().to("cpu", torch.float32).clone()
        if tuple(scores.shape) != weight.shape:
            raise OptionError(f"{weight.name} {list(weight.shape)}: its scores have shape {list(scores.shape)}")
    if not bool(torch.isfinite(scores).all()) or bool((scores < 0).any()):
        raise OptionError(f"{weight.name} {list(weight.shape)}: scores must be finite and not negative")
    return scores


def _copied(model: nn.Module, example: Any) -> tuple[nn.Module, Any, list[Any]]:
    """Return a copy of the model to try everything on, in float64 where it runs so, with the example and its outputs."""
    try:
        work = copy.deepcopy(model)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be copied, to be tried first: {error}") from error
    try:
        wide = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, example)
        return (work := work.double()), wide, _outputs(work, wide)
    except Exception:
        work = copy.deepcopy(model)
    try:
        return work, example, _outputs(work, example)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} does not run on the example input: {error}") from error


def _outputs(model: nn.Module, example: Any) -> list[Any]:
    args, kwargs = arguments(example)
    with left_as_it_was(model), torch.no_grad():
        return [t.clone() if isinstance(t, Tensor) else t for t in tree_leaves(model(*args, **kwargs))]


def _compare(model: nn.Module, before: list[Any], after: list[Any]) -> None:
    for old, new in zip(before, after, strict=True):
        if not isinstance(old, Tensor) or not old.numel():
            continue
        gap, largest = float((old.double() - new.double()).abs().max()), float(old.double().abs().max())
        if not gap <= _TOLERANCE * largest:
            raise ModelError(
                f"{type(model).__name__} gives other outputs once its channels have moved (off by {gap:.2g}, the largest is "
                f"{largest:.2g}), so nothing was changed. Does it draw random numbers in eval mode, or hold tensors that are "
                "neither parameters nor buffers?"
            )


def _of_interest(coupling: Coupling, weights: Mapping[str, Weight]) -> tuple[Pinned, ...]:
    return tuple(p for p in coupling.pinned if p.name in weights and p.dim in weights[p.name].dims)


def _is_sorted(order: Tensor) -> bool:
    return bool((order == torch.arange(len(order))).all())


def _percent(before: float, after: float) -> str:
    return f"{(after - before) / abs(before):+.2%}" if before else ""
