"""The mask of a weight's largest units as an operator: exact, and one node in a compiled graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rarefy.patterns.base import Pattern
from rarefy.patterns.parsing import parse_pattern

_library = torch.library.Library("rarefy", "FRAGMENT")
_library.define("largest(Tensor weight, str pattern, SymInt keep) -> Tensor")
_library.define("largest_in_frame(Tensor weight, str patterns, Tensor frame) -> Tensor")


def largest(weight: Tensor, pattern: Pattern, keep: int) -> Tensor:
    """Return which weights belong to the `keep` units of largest summed |w| in each group; bool, in the weight's shape.

    As `pattern.project(weight.abs(), keep)`, and known to `torch.compile`. Ties go to the lowest index. A NaN
    raises OptionError on the CPU; elsewhere, where the check would wait for the device, it counts as largest.

    >>> from rarefy.patterns import NM
    >>> largest(torch.tensor([[3.0, -4.0, 1.0, 1.0]]), NM(2, 4), 2)
    tensor([[ True,  True, False, False]])
    """
    return torch.ops.rarefy.largest(weight.detach(), str(pattern), keep)


def largest_in_frame(weight: Tensor, patterns: Sequence[Pattern], frame: Tensor) -> Tensor:
    """Return the mask of largest |w| by the N:M pattern whose number is in `frame` (int64, 0-dimensional).

    The number may change without a new compilation. On another device than the CPU it is read by waiting for the device.
    """
    return torch.ops.rarefy.largest_in_frame(weight.detach(), " ".join(map(str, patterns)), frame)


_parsed = lru_cache(maxsize=256)(parse_pattern)


def _largest(weight: Tensor, pattern: str, keep: int) -> Tensor:
    cut = _parsed(pattern)
    shape = tuple(weight.shape)
    scores = cut.pool(weight.abs())
    if scores.device.type == "cpu" or cut.coupled:
        return cut.expand(cut.choose(scores, keep), shape)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return cut.expand(torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True), shape)


def _largest_in_frame(weight: Tensor, patterns: str, frame: Tensor) -> Tensor:
    pattern = patterns.split()[int(frame)]
    return _largest(weight, pattern, _parsed(pattern).keep(weight.shape))


def _fake(weight: Tensor, *_: object) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.bool, device=weight.device)


for _name, _function in (("largest", _largest), ("largest_in_frame", _largest_in_frame)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rarefy::{_name}", _fake, lib=_library)
