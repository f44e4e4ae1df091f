"""Ask a network why: where it can be pruned, what is dead, how masks move, what files hold, how training bends its kernels."""

from __future__ import annotations

from rarefy.analysis._prunings import Member
from rarefy.analysis.checkpoint import Checkpoint, inspect_checkpoint
from rarefy.analysis.churn import MaskHistory, Move, Turn, churn, run_events, run_masks
from rarefy.analysis.detect import Found, detect
from rarefy.analysis.dynamics import (
    KernelMoment,
    KernelReport,
    KernelTrack,
    balance,
    kernel_report,
    loss_and_energy,
    ridge_fit,
)
from rarefy.analysis.kernels import KernelRegression, Kernels, KernelStats, kernel_stats, kernels
from rarefy.analysis.paths import Effective, LayerPaths, effective, path_count
from rarefy.analysis.sensitivity import Curve, Point, Sensitivity, sensitivity

__all__ = [
    "Checkpoint",
    "Curve",
    "Effective",
    "Found",
    "KernelMoment",
    "KernelRegression",
    "KernelReport",
    "KernelStats",
    "KernelTrack",
    "Kernels",
    "LayerPaths",
    "MaskHistory",
    "Member",
    "Move",
    "Point",
    "Sensitivity",
    "Turn",
    "balance",
    "churn",
    "detect",
    "effective",
    "inspect_checkpoint",
    "kernel_report",
    "kernel_stats",
    "kernels",
    "loss_and_energy",
    "path_count",
    "ridge_fit",
    "run_events",
    "run_masks",
    "sensitivity",
]
