"""How much a weight matters: pure functions that give every weight of one tensor a score, higher = keep."""

from __future__ import annotations

from rarefy.scores.functions import SCORES, gradient, lamp, magnitude, random, snip

__all__ = ["SCORES", "gradient", "lamp", "magnitude", "random", "snip"]
