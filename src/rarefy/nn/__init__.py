"""Layers that are sparse by construction (only kept values exist), and weights computed from what is trained."""

from __future__ import annotations

from rarefy.nn.conv import SparseConv2d
from rarefy.nn.linear import SparseLinear
from rarefy.nn.module import SparseModule
from rarefy.nn.reparametrisation import Reparametrisation, ScoreMask, ThresholdMask, bake_

__all__ = [
    "Reparametrisation",
    "ScoreMask",
    "SparseConv2d",
    "SparseLinear",
    "SparseModule",
    "ThresholdMask",
    "bake_",
]
