"""How sparse masks or weights are: in all, per layer, and measured against a pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from rarefy.errors import OptionError
from rarefy.patterns import NM, FanIn, Pattern, TransposableNM, parse_pattern


def kept(tensor: torch.Tensor) -> int:
    """Return how many entries are kept: True in a mask, not exactly zero in a weight (-0.0 is zero, NaN is not)."""
    return int(tensor.count_nonzero())


def sparsity(tensors: torch.Tensor | Mapping[str, torch.Tensor]) -> float:
    """Return the fraction of zeros over all entries of one tensor or of a mapping of them, in [0, 1].

    Takes bool masks (False = zero) or weights (exact zeros). Each entry counts alike, so large layers weigh more.
    OptionError where there are no entries.

    >>> sparsity({"a": torch.zeros(3), "b": torch.ones(1)})
    0.75
    """
    parts = list(tensors.values()) if isinstance(tensors, Mapping) else [tensors]
    size = sum(part.numel() for part in parts)
    if size == 0:
        raise OptionError("the sparsity of nothing does not exist: give at least one tensor with entries")
    return 1 - sum(kept(part) for part in parts) / size


def layer_sparsity(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the fraction of zeros of each mask or weight, by name (see `sparsity`)."""
    return {name: sparsity(tensor) for name, tensor in tensors.items()}


class Compliance(NamedTuple):
    """How a mask stands to a pattern.

    Attributes:
        sparsity: fraction of zeros.
        obeyed: share of the pattern's parts that keep its rule. N:M: groups with at most N kept; transposable
            N:M: rows and columns of tiles with at most N kept; block, row, column:
            units that are all kept or all zero; constant fan-in: rows with the most common number kept;
            unstructured: 1.
        zero: share of units that are all zero (whole blocks, rows, columns; single weights for the other patterns).
    """

    sparsity: float
    obeyed: float
    zero: float


def compliance(mask: torch.Tensor, pattern: Pattern | str) -> Compliance:
    """Measure a mask, or a weight with exact zeros, against a pattern such as "2:4", "4x1", "row" or "fan-in".

    Raises PatternError where the shape does not fit the pattern.

    >>> compliance(torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0]]), "2:4").obeyed
    0.5
    >>> compliance(torch.tensor([[1, 0], [0, 0], [0, 0]]), "row")
    Compliance(sparsity=0.8333333333333334, obeyed=0.6666666666666666, zero=0.6666666666666666)
    """
    pattern = parse_pattern(pattern)
    pattern.check(mask.shape, "mask")
    counts = pattern.pool((mask != 0).long())  # [groups, units]
    unit = pattern.unit_size(mask.shape)
    if isinstance(pattern, NM):
        obeyed = counts.sum(1) <= pattern.n
    elif isinstance(pattern, TransposableNM):
        obeyed = pattern.lines(counts) <= pattern.n
    elif isinstance(pattern, FanIn):
        per_row = counts.sum(1)
        obeyed = per_row == per_row.mode().values
    else:
        obeyed = (counts == 0) | (counts == unit)
    return Compliance(sparsity(mask), _share(obeyed), _share(counts == 0))


def _share(flags: torch.Tensor) -> float:
    return int(flags.sum()) / flags.numel()
