"""rarefy: make PyTorch networks sparse before, during and after training, and prove what it cost and gained."""

from __future__ import annotations

__version__ = "0.1.0"
