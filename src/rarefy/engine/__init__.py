"""The engine: finds the layers, holds masks and storage, hooks the optimizer, saves and resumes."""

from __future__ import annotations

from rarefy.engine.compressed import CompressedLayer
from rarefy.engine.dead_units import DeadUnits, dead_units
from rarefy.engine.events import Cost, Event
from rarefy.engine.layer import Change, Layer
from rarefy.engine.masked import MaskedLayer
from rarefy.engine.method import Method, check_fraction
from rarefy.engine.selection import LeftOut, Selector, Target, find_targets
from rarefy.engine.sparsifier import Loss, Sparsifier
from rarefy.engine.summary import Row, Summary
from rarefy.engine.taxonomy import FAMILIES, Family

__all__ = [
    "FAMILIES",
    "Change",
    "CompressedLayer",
    "Cost",
    "DeadUnits",
    "Event",
    "Family",
    "Layer",
    "LeftOut",
    "Loss",
    "MaskedLayer",
    "Method",
    "Row",
    "Selector",
    "Sparsifier",
    "Summary",
    "Target",
    "check_fraction",
    "dead_units",
    "find_targets",
]
