"""Operators on tensors: each with a naive reference in PyTorch and a native, multi-threaded version for the CPU."""

from __future__ import annotations

from rarefy.kernels.bitpack import pack_mask, unpack_mask
from rarefy.kernels.conv import spconv2d
from rarefy.kernels.lowp_ops import sparse_linear_bfloat16, sparse_linear_int8
from rarefy.kernels.native import native_config, threads
from rarefy.kernels.ops import sparse_conv2d, sparse_linear
from rarefy.kernels.select import select_k
from rarefy.kernels.simplex import capped_simplex
from rarefy.kernels.transposable import transposable_nm
from rarefy.kernels.zero import apply_mask_

__all__ = [
    "apply_mask_",
    "capped_simplex",
    "native_config",
    "pack_mask",
    "select_k",
    "sparse_conv2d",
    "sparse_linear",
    "sparse_linear_bfloat16",
    "sparse_linear_int8",
    "spconv2d",
    "threads",
    "transposable_nm",
    "unpack_mask",
]
