"""Ask a network why: where it can be pruned, what is dead, how masks move, what files hold, how training bends its kernels."""

from __future__ import annotations

from rarefy.analysis.checkpoint import Checkpoint, inspect_checkpoint
from rarefy.analysis.detect import Found, detect
from rarefy.analysis.paths import Effective, LayerPaths, effective, path_count
from rarefy.analysis.sensitivity import Curve, Point, Sensitivity, sensitivity

__all__ = [
    "Checkpoint",
    "Curve",
    "Effective",
    "Found",
    "LayerPaths",
    "Point",
    "Sensitivity",
    "detect",
    "effective",
    "inspect_checkpoint",
    "path_count",
    "sensitivity",
]
