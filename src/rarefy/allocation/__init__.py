"""How much each layer keeps: a global sparsity shared out over the layers, as densities or as exact counts."""

from __future__ import annotations

from rarefy.allocation.budget import RULES, SCORED, counts, densities, global_counts, spread

__all__ = ["RULES", "SCORED", "counts", "densities", "global_counts", "spread"]
