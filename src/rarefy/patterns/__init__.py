"""Which zeros are allowed: patterns of sparsity, each with its best mask for a score and its validity check."""

from __future__ import annotations

from rarefy.patterns.base import Pattern
from rarefy.patterns.choice import nm_for
from rarefy.patterns.kinds import NM, Block, FanIn, FilterGroup, Slice, Unstructured
from rarefy.patterns.parsing import PATTERNS, parse_pattern
from rarefy.patterns.transposable import TransposableNM, transposable_mask

__all__ = [
    "NM",
    "PATTERNS",
    "Block",
    "FanIn",
    "FilterGroup",
    "Pattern",
    "Slice",
    "TransposableNM",
    "Unstructured",
    "nm_for",
    "parse_pattern",
    "transposable_mask",
]
