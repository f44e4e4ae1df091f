"""Peak memory of a block of code."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATUS, _CLEAR, _STATM = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/statm")


class PeakMemory:
    """Measures the most memory the process held at any moment of a `with` block.

    `bytes` is the peak of *resident* memory of the whole process (code, libraries, data and what the allocator keeps
    for reuse), not of one model; `start_bytes` is the resident memory at entry and `increase` their difference, at
    least 0. At entry garbage is collected and, with glibc, free memory given back to the system. Elsewhere memory that was
    freed before the block can be used again without any increase, so compare runs in fresh processes there. `how` tells
    how it was measured:

    - "kernel": Linux, the kernel's high-water mark (VmHWM), reset at entry: exact.
    - "sampled": Linux where the mark may not be reset: a thread reads the resident size every `interval` seconds, so a
      shorter peak can be missed.
    - "process": elsewhere, `getrusage`: the peak of the process since it started, which may lie before the block.
    - "unknown": neither is there; `bytes` is 0.

    `cuda_bytes` is the peak of memory that PyTorch held for tensors on all CUDA devices together (each device's own
    peak, summed), 0 where CUDA was not used. Entering resets PyTorch's own CUDA peak counter and the kernel's mark, so
    blocks must not be nested where the outer figure matters.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.interval = interval
        self.bytes = 0
        self.start_bytes = 0
        self.cuda_bytes = 0
        self.how = "unknown"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def increase(self) -> int:
        """Bytes by which the peak lies over the resident memory at entry."""
        return max(0, self.bytes - self.start_bytes)

    def __enter__(self) -> Self:
        _tidy()
        self.bytes = self.start_bytes = _resident()
        for device in _cuda_devices():
            torch.cuda.reset_peak_memory_stats(device)
        if _reset_kernel_mark():
            self.how = "kernel"
        elif _STATM.exists():
            self.how = "sampled"
            self._stop.clear()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        elif sys.platform != "win32":
            self.how = "process"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        if self.how == "kernel":
            self.bytes = max(self.bytes, _kernel_mark())
        elif self.how == "sampled":
            self.bytes = max(self.bytes, _resident())
        elif self.how == "process":
            self.bytes = _process_peak()
        self.cuda_bytes = sum(torch.cuda.max_memory_allocated(device) for device in _cuda_devices())

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self.bytes = max(self.bytes, _resident())


def _tidy() -> None:
    """Free what is garbage, and hand free memory back to the system, so that earlier blocks do not count in this one."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _cuda_devices() -> range:
    """Return the CUDA devices, none before anything used CUDA (asking would start it and take memory)."""
    return range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)


def _resident() -> int:
    """Return the process's resident memory in bytes now; 0 where the system does not tell."""
    try:
        import resource

        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except (OSError, ImportError, IndexError, ValueError):
        return 0


def _reset_kernel_mark() -> bool:
    """Set VmHWM back to the present size; True where that was allowed and worked."""
    try:
        _CLEAR.write_text("5")
        return _kernel_mark() > 0
    except OSError:
        return False


def _kernel_mark() -> int:
    """Return VmHWM in bytes, 0 where there is none."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _process_peak() -> int:
    """Return the peak resident memory since the process started, in bytes."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024  # macOS counts bytes, the others kilobytes
