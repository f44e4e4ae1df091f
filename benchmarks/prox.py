"""The proximal operator of the group sparse envelope: time against the number of groups, beside sorting.

    python benchmarks/prox.py [--groups 100000 1000000 10000000] [--repeats 5] [--threads 1]

Columns: the kernel (`capped_simplex`, from norms to shares), the whole prox of singleton groups (norms, shares, scaling), the
whole prox of rows of 8 weights, and the sort-based reference of the kernel in PyTorch. Medians in milliseconds: of CPU time
with one thread, so that what else runs on the machine does not count; of the clock on the wall with more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from rarefy import kernels
from rarefy.kernels import reference
from rarefy.patterns import Slice, Unstructured
from rarefy.penalties import GroupEnvelope


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of `call` in milliseconds, after one call to warm up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.median(times) * 1e3


def bench(m: int, repeats: int) -> None:
    """Print the line of m groups."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(m, generator=g)
    rows = torch.randn(m, 8, generator=g) if m <= 1_000_000 else None  # the intermediates take 20 bytes a weight
    norms, cost = weight.abs(), torch.rand(m, generator=g)
    for share in (0.01, 0.1, 0.5):
        k = int(share * m)
        single, grouped = GroupEnvelope(Unstructured(), k, 0.1), GroupEnvelope(Slice(0), k, 0.1)
        found = [
            median_ms(lambda k=k: kernels.capped_simplex(norms, cost, k), repeats),
            median_ms(lambda p=single: p.prox(weight[:, None], 0.1), repeats),
            median_ms(lambda p=grouped: p.prox(rows, 0.1), max(1, repeats // 2)) if rows is not None else float("nan"),
        ]
        count = torch.tensor([k])
        sort = (
            median_ms(lambda c=count: reference.capped_simplex(norms[None], cost[None], c), 1) if share == 0.1 else None
        )
        cells = "".join(f"{t:14.1f}" if t == t else " " * 13 + "-" for t in found)
        print(f"{m:>12,} {share:>6.0%} {cells} " + (f"{sort:14.1f}" if sort is not None else ""), flush=True)


def main() -> None:
    """Read the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} thread(s), {kernels.native_config()['isa']}")
    print(f"{'groups':>12} {'kept':>6} {'kernel':>14}{'prox, 1':>14}{'prox, rows of 8':>16}{'sorting':>14}")
    for m in args.groups:
        bench(m, args.repeats)


if __name__ == "__main__":
    main()
