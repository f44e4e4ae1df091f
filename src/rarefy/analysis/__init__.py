"""Ask a network why: where it can be pruned, what is dead, how masks move, what files hold, how training bends its kernels."""

from __future__ import annotations

from rarefy.analysis.paths import Effective, LayerPaths, effective, path_count
from rarefy.analysis.sensitivity import Curve, Point, Sensitivity, sensitivity

__all__ = ["Curve", "Effective", "LayerPaths", "Point", "Sensitivity", "effective", "path_count", "sensitivity"]
