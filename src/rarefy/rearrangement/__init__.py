"""Channels change places all through a network, so that a pattern keeps more of it."""

from __future__ import annotations

from rarefy.rearrangement.network import Moved, Rearrangement, rearrange

__all__ = ["Moved", "Rearrangement", "rearrange"]
