"""Layers that are sparse or small by construction (kept values and their indices only, or weights read from a shared array),
functions that rewrite a model with them, and weights that are computed from what is trained."""

from __future__ import annotations

from rarefy.nn.conv import SparseConv2d
from rarefy.nn.iso_flop import IsoFlop, iso_flop_
from rarefy.nn.iso_flop_layers import Doped, Parallel
from rarefy.nn.linear import SparseLinear
from rarefy.nn.module import SparseModule
from rarefy.nn.n_m import NMLinear, n_m_
from rarefy.nn.reparametrisation import Reparametrisation, ScoreMask, ThresholdMask, bake_
from rarefy.nn.semi_structured import SemiStructuredLinear, semi_structured_
from rarefy.nn.share import share_, unshare_
from rarefy.nn.shared_array import SharedArray
from rarefy.nn.shared_layers import SharedConv2d, SharedEmbedding, SharedLinear, SharedModule
from rarefy.nn.straight_through import FadingMask, LargestMask, TransposableMask
from rarefy.nn.two_way import TwoWayMask
from rarefy.nn.widen import widen_

__all__ = [
    "Doped",
    "FadingMask",
    "IsoFlop",
    "LargestMask",
    "NMLinear",
    "Parallel",
    "Reparametrisation",
    "ScoreMask",
    "SemiStructuredLinear",
    "SharedArray",
    "SharedConv2d",
    "SharedEmbedding",
    "SharedLinear",
    "SharedModule",
    "SparseConv2d",
    "SparseLinear",
    "SparseModule",
    "ThresholdMask",
    "TransposableMask",
    "TwoWayMask",
    "bake_",
    "iso_flop_",
    "n_m_",
    "semi_structured_",
    "share_",
    "unshare_",
    "widen_",
]
