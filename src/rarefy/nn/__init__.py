"""Layers that are sparse by construction: only the kept values and their indices exist."""

from __future__ import annotations

from rarefy.nn.conv import SparseConv2d
from rarefy.nn.linear import SparseLinear
from rarefy.nn.module import SparseModule

__all__ = ["SparseConv2d", "SparseLinear", "SparseModule"]
