"""WHAT is added to the loss to make weights zero: penalties by their value and proximal operator, as functions of tensors."""

from __future__ import annotations

from rarefy.penalties.envelope import GroupEnvelope
from rarefy.penalties.prescribed import Search, separable_strength
from rarefy.penalties.proximal import L1, GroupLasso, Proximal

__all__ = ["L1", "GroupEnvelope", "GroupLasso", "Proximal", "Search", "separable_strength"]
