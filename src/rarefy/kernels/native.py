"""The native core: its import, what it was built for, and how many threads it may use."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

try:
    from rarefy.kernels import _native as native
except ImportError as error:
    raise ImportError(
        f"rarefy's native core is missing or does not load ({error}). "
        "Build it: `make native` in a source checkout, or `pip install .` with a C++ compiler at hand."
    ) from error

__all__ = ["NativeConfig", "cpu_empty", "native", "native_config", "threads"]


class NativeConfig(TypedDict):
    """What `native_config` tells."""

    isa: str
    available: list[str]
    compiler: str
    threads: int
    version: str


def _openmp_team() -> int:
    """Return the address of `GOMP_parallel` in the OpenMP runtime that PyTorch runs on, or 0 where there is none to share.

    A runtime that is told to wait passively does not spin, so nothing is gained by sharing it, and every start would cost a
    wake-up: our own pool serves better there.
    """
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" or not hasattr(os, "RTLD_NOLOAD"):
        return 0
    try:
        library = ctypes.CDLL(
            str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), os.RTLD_NOLOAD | os.RTLD_NOW
        )
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):  # another build of PyTorch: another library, or another runtime
        return 0


native.share_threads(_openmp_team())


def threads() -> int:
    """Return how many threads the native kernels use: as many as PyTorch (`torch.set_num_threads`)."""
    return torch.get_num_threads()


def cpu_empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory for what a native kernel computes: on the CPU, whatever PyTorch's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def native_config() -> NativeConfig:
    """Return which instruction set runs, which ones this CPU has, the compiler, the threads and the version.

    The environment variable `RAREFY_ISA` (baseline, avx2, avx512), read at the first use, forces an instruction set.
    Raises ValueError when it names none, or one that this CPU lacks.
    """
    return NativeConfig(
        isa=native.isa(),
        available=native.available_isas(),
        compiler=native.compiler,
        threads=threads(),
        version=native.version,
    )
