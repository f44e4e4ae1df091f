"""Where a method stands among the others: when it chooses its masks, and whether a dense network is ever trained."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Family = Literal[
    "before training", "sparse to sparse", "dense to sparse", "after training", "parameter sharing", "baseline"
]

FAMILIES: Mapping[Family, str] = MappingProxyType(
    {
        "before training": "masks are chosen before training and never change",
        "sparse to sparse": "masks are rewired while training, and the network is never dense",
        "dense to sparse": "every weight is trained for a time, then fewer and fewer",
        "after training": "a dense network that was trained is made sparse",
        "parameter sharing": "fewer parameters than weights, and no zeros",
        "baseline": "what the others are compared with",
    }
)
"""Every family and what its methods have in common, in the order in which they are listed (docs/taxonomy.md)."""

DENSE_IS_TRAINED: frozenset[Family] = frozenset({"dense to sparse", "after training"})
"""Families whose methods train every weight at some time: neither their peak memory nor their cost is the sparse one."""
