"""Layers that are sparse or small by construction: kept values and their indices only, or weights read from a shared array."""

from __future__ import annotations

from rarefy.nn.conv import SparseConv2d
from rarefy.nn.linear import SparseLinear
from rarefy.nn.module import SparseModule
from rarefy.nn.share import share_, unshare_
from rarefy.nn.shared_array import SharedArray
from rarefy.nn.shared_layers import SharedConv2d, SharedEmbedding, SharedLinear, SharedModule

__all__ = [
    "SharedArray",
    "SharedConv2d",
    "SharedEmbedding",
    "SharedLinear",
    "SharedModule",
    "SparseConv2d",
    "SparseLinear",
    "SparseModule",
    "share_",
    "unshare_",
]
