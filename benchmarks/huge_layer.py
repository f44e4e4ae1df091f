"""A layer of 100,000 x 100,000 at 99.99 % sparsity trains: forward, backward, Adam, growth. Dense it would be 40 GB, and
160 GB with its gradient and Adam's two moments.

    python benchmarks/huge_layer.py [--size 100000] [--sparsity 0.9999] [--batch 64] [--threads 2]

Prints seconds per step, per growth step of SET (random) and RigL (all 10^10 gradients, a few rows at a time), and the peak
resident memory of the whole process.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import rarefy
from rarefy.metrics import PeakMemory
from rarefy.nn import SparseLinear


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    start = time.perf_counter()
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000)
    parser.add_argument("--sparsity", type=float, default=0.9999)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with PeakMemory() as memory:
        start = time.perf_counter()
        model = SparseLinear(options.size, options.size, sparsity=options.sparsity)
        print(f"{model}, made in {time.perf_counter() - start:.2f} s", flush=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        x = torch.randn(options.batch, options.size)
        for name in ("set", "rigl"):
            sparse = rarefy.sparsify(
                model, name, sparsity=options.sparsity, optimizer=optimizer, storage="compressed", every=4
            )
            times = [seconds(model, optimizer, x) for _ in range(8)]
            (event, *_) = (e for e in sparse.events if e.step == 4)
            print(
                f"{name:5} step {sorted(times[1:3])[0]:6.3f} s, with growth {times[3]:6.2f} s, next {times[4]:6.3f} s; "
                f"dropped {event.dropped:,}, grown {event.grown:,} of {event.kept:,}",
                flush=True,
            )
            sparse.finalize()
    gigabytes = memory.bytes / 1e9
    print(f"peak memory of the process {gigabytes:.2f} GB ({memory.how}); dense weight {4e-9 * options.size**2:.0f} GB")


if __name__ == "__main__":
    main()
