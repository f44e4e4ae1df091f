"""What rules are made of: labels that are compared, bound and kept apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.coupling.atoms import FIXED
from rarefy.coupling.follow import Follower, Unknown, still

_MOST_SLICES = 64  # label slices along other dimensions that a layer binds together, before it gives up


def varying(label: Tensor) -> list[int]:
    return [d for d, size in enumerate(label.shape) if size > 1]


def compact(label: Tensor) -> Tensor:
    for dim in range(label.ndim):
        if label.shape[dim] > 1 and bool((label == label.narrow(dim, 0, 1)).all()):
            label = label.narrow(dim, 0, 1)
    return label.contiguous()


def full(label: Tensor, shape: Sequence[int]) -> Tensor:
    return label.expand(tuple(shape)).contiguous()


def along(f: Follower, x: Tensor, dim: int, reason: str) -> Tensor:
    """Return labels [size] along one dimension, after binding those that differ at other places."""
    dim %= x.ndim
    rows = f.label(x).movedim(dim, 0).flatten(1) if x.ndim > 1 else f.label(x)[:, None]
    slices = rows.unique(dim=1) if rows.shape[1] > 1 else rows
    if slices.shape[1] > _MOST_SLICES:
        raise Unknown(f"{reason} of channels that change from place to place is not understood")
    first = rows[:, 0]
    for other in slices.unbind(1):
        f.atoms.bind(first, other, f"{reason} of channels that are mixed")
    return first.expand(x.shape[dim])


def elementwise(f: Follower, tensors: Sequence[Tensor], out: Tensor, reason: str) -> Tensor:
    """Bind the terms of an operation that treats all entries alike, with broadcasting."""
    n = out.ndim
    terms = [t for t in tensors if f.known(t) or t.numel() > 1]
    values = [t for t in terms if f.followed(t)] or [t for t in terms if f.known(t)][:1]
    moving = {d + n - t.ndim for t in values for d in varying(f.label(t))}
    labels: list[tuple[Tensor, tuple[int, ...]]] = []
    for t in terms:
        shift = n - t.ndim
        if f.name(t) is None or any(t is v for v in values):
            label = f.label(t)
        else:  # a parameter moves along the dimension that the others move along
            mine = [d for d, size in enumerate(t.shape) if size > 1 and d + shift in moving]
            label = f.of_parameter(t, mine[-1] if mine else None)
        labels.append((label.reshape([1] * shift + list(label.shape)), (1,) * shift + tuple(t.shape)))
    kept: list[Tensor] = []
    for i, (label, real) in enumerate(labels):
        others = {d for j, (other, _) in enumerate(labels) if j != i for d in varying(other)}
        if others and all(real[d] == 1 for d in others):  # the same for all channels: it must stay, and they may move
            f.atoms.pin(label, f"{reason} with many channels")
        elif math.prod(real) > 1 or bool((label != FIXED).any()):
            kept.append(label)
    if not kept:
        return still(out)
    for other in kept[1:]:
        f.atoms.bind(kept[0], other, f"{reason} with values that do not move")
    return torch.broadcast_tensors(*kept)[0].contiguous()


def separate(f: Follower, label: Tensor, dims: Sequence[int]) -> None:
    """Forbid exchanges between the places along some dimensions."""
    mine = [d for d in dims if label.shape[d] > 1]
    if mine and bool((label != FIXED).any()):
        sizes = [label.shape[d] if d in mine else 1 for d in range(label.ndim)]
        f.atoms.separate(label, torch.arange(math.prod(sizes)).reshape(sizes))


def dims_of(x: Tensor, dim: Any) -> list[int]:
    if dim is None or isinstance(dim, bool) or (isinstance(dim, Sequence) and len(dim) == 0):
        return list(range(x.ndim))
    return [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)]


def bind_vectors(f: Follower, channels: Tensor, *vectors: Tensor | None) -> None:
    for vector in vectors:
        if vector is not None:
            f.atoms.bind(f.dim(vector, 0), channels, "is added to values that do not move")
