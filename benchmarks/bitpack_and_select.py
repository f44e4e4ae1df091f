"""The native kernels against PyTorch's nearest operators, side by side in one run: medians and ratios.

    python benchmarks/bitpack_and_select.py [--n 25500000] [--repeats 7] [--threads 1 2]

25.5 million is the number of weights of a ResNet-50. The floor of a line is the time in which this machine copies (or
only reads) the bytes that the operation cannot avoid touching, measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from rarefy import kernels
from rarefy.kernels.native import native


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of `call` in milliseconds, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def line(what: str, ours: float, theirs: float | None = None, floor: float | None = None) -> None:
    """Print one row of the table."""
    than = f"{theirs:9.2f} {theirs / ours:7.1f}x" if theirs is not None else " " * 18
    share = f"{ours / floor:7.2f}" if floor is not None else ""
    print(f"  {what:<44} {ours:9.2f} {than} {share}")


def bench(n: int, repeats: int) -> None:
    """Time every kernel at n entries with the current number of threads."""
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(n, generator=g) < 0.1
    scores = torch.randn(n, generator=g).abs()
    weight, bools = scores.clone(), torch.empty_like(mask)
    rows = scores[: n // 16 * 16]

    def time_of(call: Callable[[], object]) -> float:
        return median_ms(call, repeats)

    copy = time_of(lambda: bools.copy_(mask))
    read = time_of(lambda: scores.sum())
    copy_floats = time_of(lambda: weight.copy_(scores))
    topk = median_ms(lambda: torch.topk(scores, n // 10), max(repeats // 3, 1))
    print(
        f"\n{torch.get_num_threads()} thread(s); copying {n:,} bools takes {copy:.2f} ms ({n / copy / 1e6:.1f} GB/s),"
    )
    print(f"reading as many floats {read:.2f} ms ({4 * n / read / 1e6:.1f} GB/s), copying them {copy_floats:.2f} ms")
    for level in native.available_isas():
        native.set_isa(level)
        print(f"  {level:<44} {'ms':>9} {'torch ms':>9} {'gain':>8} {'x floor':>7}")
        bits = kernels.pack_mask(mask)
        line("pack_mask (floor: copy the bools)", time_of(lambda: kernels.pack_mask(mask)), None, copy)
        line("unpack_mask (floor: copy the bools)", time_of(lambda b=bits: kernels.unpack_mask(b, (n,))), None, copy)
        floor = read + copy / 2
        line("select_k, top 10 % (torch.topk)", time_of(lambda: kernels.select_k(scores, n // 10)), topk, floor)
        line("select_k, top 50 %", time_of(lambda: kernels.select_k(scores, n // 2)), None, floor)
        ties = torch.where(mask, scores, 0.0)
        line("select_k, 90 % equal, cut among them", time_of(lambda t=ties: kernels.select_k(t, n // 4)), None, floor)
        double = scores[: n // 2].double()
        line("select_k, half as many doubles", time_of(lambda d=double: kernels.select_k(d, n // 20)), None, floor)
        for width in (4, 16, 576, 4608):
            blocks = rows[: rows.numel() // width * width].view(-1, width)
            line(
                f"select_k, half of rows of {width}",
                time_of(lambda b=blocks: kernels.select_k(b, b.shape[1] // 2)),
                None,
                floor,
            )
        line("apply_mask_, nothing to change", time_of(lambda: kernels.apply_mask_(weight, mask)), None, read)
        step = time_of(lambda: weight.add_(1e-3))
        both = time_of(lambda: kernels.apply_mask_(weight.add_(1e-3), mask))
        line("apply_mask_ after a dense update", both - step, None, copy_floats)
    if n <= 30_000_000:
        few = rows.view(-1, 4)
        line("torch.topk on rows of 4", median_ms(lambda: torch.topk(few, 2, dim=1), 1))
        few = rows[: rows.numel() // 576 * 576].view(-1, 576)
        line("torch.topk on rows of 576", median_ms(lambda: torch.topk(few, 288, dim=1), 1))
    drop = ~mask
    line("weight.mul_(mask)", time_of(lambda: weight.mul_(mask)))
    line("weight.masked_fill_(~mask, 0), ~mask at hand", time_of(lambda: weight.masked_fill_(drop, 0)))


def main() -> None:
    """Read the options and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=25_500_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    args = parser.parse_args()
    for threads in args.threads:
        torch.set_num_threads(threads)
        bench(args.n, args.repeats)


if __name__ == "__main__":
    main()
