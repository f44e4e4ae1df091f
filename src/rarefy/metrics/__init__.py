"""What sparsity costs and gains: sparsity, FLOPs, bytes, overlap of masks, memory, calibration, robustness, statistics.

Nothing here is a measured speed-up: FLOPs and bytes are counts, and only a stopwatch tells the rest.
"""

from __future__ import annotations

from rarefy.metrics.adversarial import Box, adversarial_accuracy, fgsm, pgd, pixel_box
from rarefy.metrics.calibration import accuracy, ece, nll
from rarefy.metrics.diversity import Diversity, mask_diversity, sequential_diversity, transposable_masks
from rarefy.metrics.flops import FlopsReport, LayerFlops, NotCounted, flops
from rarefy.metrics.gradient_norm import gradient_norm
from rarefy.metrics.image import luma, psnr
from rarefy.metrics.memory import PeakMemory
from rarefy.metrics.out_of_distribution import auroc, ood_auroc
from rarefy.metrics.overlap import Explored, Overlap, OverlapReport, overlap, overlap_matrix
from rarefy.metrics.products import Pass, Product, Work, work
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
    "Box",
    "Compliance",
    "Diversity",
    "Explored",
    "FlopsReport",
    "LayerCost",
    "LayerFlops",
    "NotCounted",
    "Overlap",
    "OverlapReport",
    "PairedTest",
    "ParameterCount",
    "Pass",
    "PeakMemory",
    "Product",
    "StorageBytes",
    "TrainingFlops",
    "Work",
    "accuracy",
    "adversarial_accuracy",
    "auroc",
    "compliance",
    "csr_bytes",
    "dense_training_flops",
    "ece",
    "fgsm",
    "flops",
    "gradient_norm",
    "gradual_training_flops",
    "holm",
    "layer_sparsity",
    "luma",
    "mask_diversity",
    "mean",
    "nll",
    "ood_auroc",
    "overlap",
    "overlap_matrix",
    "paired_t_test",
    "parameters",
    "pgd",
    "pixel_box",
    "psnr",
    "rigl_training_flops",
    "sd",
    "sequential_diversity",
    "snfs_training_flops",
    "sparsity",
    "static_training_flops",
    "storage_bytes",
    "training_flops",
    "transposable_masks",
    "work",
]
