"""What this machine can do at most."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rarefy.kernels.native import native


@dataclass(frozen=True)
class Ceilings:
    """Measured maxima with a number of threads: multiply-adds from registers, reading from each level of memory.

    `gflops` counts two operations a multiply-add; `bandwidth` is in GB/s, by the name of what the data lies in.
    """

    threads: int
    gflops: float
    bandwidth: dict[str, float]


# Kilobytes a thread reads again and again: what fits well inside each level on common machines.
SIZES = {"L1": 16, "L2": 384, "L3": 4096, "DRAM": 131072}


def ceilings(threads: int, seconds: float = 0.02, repeats: int = 5) -> Ceilings:
    """Measure, each number as the best of `repeats` tries of about `seconds`."""
    rounds = max(1, int(seconds * native.probe_flops(100_000, threads) / threads / 400))
    gflops = max(native.probe_flops(rounds, threads) for _ in range(repeats)) / 1e9
    bandwidth = {}
    for name, kilobytes in SIZES.items():
        x = torch.ones(kilobytes * 256 * threads).numpy()
        times = max(1, int(seconds * native.probe_bandwidth(x, 1, threads) / x.nbytes))
        bandwidth[name] = max(native.probe_bandwidth(x, times, threads) for _ in range(repeats)) / 1e9
    return Ceilings(threads, gflops, bandwidth)
