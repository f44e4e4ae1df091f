"""What sparsity costs and gains, counted: sparsity, FLOPs, bytes, overlap of masks, calibration, memory, statistics.

Nothing here is a measured speed-up: FLOPs and bytes are counts, and only a stopwatch tells the rest.
"""

from __future__ import annotations

from rarefy.metrics.calibration import accuracy, ece, nll
from rarefy.metrics.flops import FlopsReport, LayerFlops, NotCounted, flops
from rarefy.metrics.image import luma, psnr
from rarefy.metrics.memory import PeakMemory
from rarefy.metrics.overlap import Explored, Overlap, OverlapReport, overlap, overlap_matrix
from rarefy.metrics.size import ParameterCount, StorageBytes, csr_bytes, parameters, storage_bytes
from rarefy.metrics.sparsity import Compliance, compliance, layer_sparsity, sparsity
from rarefy.metrics.statistics import PairedTest, holm, mean, paired_t_test, sd
from rarefy.metrics.training_flops import (
    LayerCost,
    TrainingFlops,
    dense_training_flops,
    gradual_training_flops,
    rigl_training_flops,
    snfs_training_flops,
    static_training_flops,
    training_flops,
)

__all__ = [
    "Compliance",
    "Explored",
    "FlopsReport",
    "LayerCost",
    "LayerFlops",
    "NotCounted",
    "Overlap",
    "OverlapReport",
    "PairedTest",
    "ParameterCount",
    "PeakMemory",
    "StorageBytes",
    "TrainingFlops",
    "accuracy",
    "compliance",
    "csr_bytes",
    "dense_training_flops",
    "ece",
    "flops",
    "gradual_training_flops",
    "holm",
    "layer_sparsity",
    "luma",
    "mean",
    "nll",
    "overlap",
    "overlap_matrix",
    "paired_t_test",
    "parameters",
    "psnr",
    "rigl_training_flops",
    "sd",
    "snfs_training_flops",
    "sparsity",
    "static_training_flops",
    "storage_bytes",
    "training_flops",
]
