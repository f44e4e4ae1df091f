"""How much a weight matters: pure functions that give every weight of one tensor a score, higher = keep."""

from __future__ import annotations

from rarefy.scores.functions import SCORES, gradient, grasp, lamp, magnitude, random, snip, synflow

__all__ = ["SCORES", "gradient", "grasp", "lamp", "magnitude", "random", "snip", "synflow"]
