"""Average what was trained from one sparse parent: soups of models that share a mask."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import OptionError, StateError

State = Mapping[str, Tensor]


def average(states: Sequence[State]) -> dict[str, Tensor]:
    """Return the mean of state dicts of one network: the uniform soup.

    Floating-point tensors are summed in float64 in an order that does not depend on the members', so that a soup of
    equal members is that member, and any order gives the same bits. Integers (a batch norm's count of batches) are the
    first member's: a mean of counts is no count.

    Raises OptionError for no states, StateError where they are of different networks.
    """
    if not states:
        raise OptionError("a soup needs at least one member.")
    for number, state in enumerate(states[1:], 1):
        odd = [
            n
            for n in {**states[0], **state}
            if n not in state or n not in states[0] or not _alike(states[0][n], state[n])
        ]
        if odd:
            raise StateError(f"member {number} is of another network than member 0: {', '.join(odd[:5])} differ.")
    result = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            result[name] = first.clone()
            continue
        stacked = torch.stack([state[name].detach().double() for state in states])
        ordered = stacked.sort(dim=0).values
        result[name] = (ordered[0] + (ordered - ordered[0]).sum(dim=0) / len(states)).to(first.dtype)
    return result


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def check_same_masks(masks: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise StateError unless all members keep exactly the same weights: only then is their mean as sparse as they are."""
    for number, other in enumerate(masks[1:], 1):
        for name, mask in masks[0].items():
            if name not in other or not torch.equal(mask, other[name]):
                raise StateError(
                    f"member {number} has another mask than member 0 at {name}: their mean would be denser."
                )


def greedy(states: Sequence[State], scores: Sequence[float], score: Callable[[dict[str, Tensor]], float]) -> list[int]:
    """Choose the members of a greedy soup: from the best on, each one that does not make the mean worse.

    Wortsman et al. 2022, "Model soups" (arXiv 2203.05482, recipe 1).

    Args:
        states: the members' state dicts.
        scores: the members' scores on validation data, higher = better; ties go to the earlier member.
        score: of an averaged state dict, in the same unit and on the same data.

    Returns:
        The chosen members' numbers, in the order in which they were taken. The score of their mean is never below that of
        the best member.
    """
    if len(states) != len(scores):
        raise OptionError(f"{len(states)} members and {len(scores)} scores: give each its own.")
    order = sorted(range(len(states)), key=lambda i: -scores[i])
    chosen, best = [order[0]], scores[order[0]]
    for candidate in order[1:]:
        found = score(average([states[i] for i in [*chosen, candidate]]))
        if found >= best:
            chosen.append(candidate)
            best = found
    return chosen


def with_state(model: nn.Module, state: State) -> nn.Module:
    """Return a copy of the model that holds a state."""
    other = copy.deepcopy(model)
    other.load_state_dict(dict(state))
    return other


def between(first: State, second: State, share: float) -> dict[str, Tensor]:
    """Return (1 - share) first + share second, share in [0, 1]; integers are the first's."""
    if not 0 <= share <= 1:
        raise OptionError(f"share={share} must lie in [0, 1].")
    mixed = {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            mixed[name] = tensor.clone()
        else:
            mixed[name] = ((1 - share) * tensor.double() + share * second[name].double()).to(tensor.dtype)
    return mixed


def barrier(first: State, second: State, error: Callable[[dict[str, Tensor]], float], points: int = 11) -> float:
    """Return how much worse networks on the line between two are than the two are on average, at the worst of them.

    max over a in [0, 1] of error((1 - a) first + a second) - (error(first) + error(second)) / 2, a on an even grid with both
    ends. About 0: the two lie in one basin, and their average is worth as much. With copies trained from one w_k on data in
    different order it tells whether training is stable from step k on. Frankle, Dziugaite, Roy & Carbin 2020
    (arXiv 1912.05671, linear mode connectivity).

    Args:
        error: of a state dict, lower = better; recalibrate batch norms there (`engine.batch_norm.recalibrate`).
        points: of the grid, at least 3.
    """
    if points < 3:
        raise OptionError(f"points={points}: a line needs at least one point between its ends.")
    errors = [error(between(first, second, i / (points - 1))) for i in range(points)]
    return max(errors) - (errors[0] + errors[-1]) / 2


def spread(states: Sequence[State], names: Sequence[str]) -> dict[str, Any]:
    """Return how far apart members are, over the named tensors taken as one vector each.

    Returns:
        "distance": largest L2 distance between two; "angle": largest angle between two, in degrees; "radius": largest
        distance to their mean. All 0 for one member.
    """
    vectors = torch.stack([torch.cat([state[name].reshape(-1).double() for name in names]) for state in states])
    lengths = vectors.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    cosines = ((vectors / lengths) @ (vectors / lengths).T).clamp(-1, 1)
    distances = torch.cdist(vectors[None], vectors[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
    cosines.fill_diagonal_(1.0)
    return {
        "distance": float(distances.max()),
        "angle": float(torch.rad2deg(torch.arccos(cosines.min()))),
        "radius": float((vectors - vectors.mean(dim=0)).norm(dim=1).max()),
    }
