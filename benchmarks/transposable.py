"""Transposable N:M masks: how good and how fast rarefy's solvers are, beside a linear program, OR-Tools and TSENOR.

    RAREFY_DATA=... python benchmarks/transposable.py [--patterns 2:4 4:8 8:16 16:32] [--check 10000] [--threads 2]

Tiles are |w| of normal numbers, and of the convolutions of the published ResNet-20 at each kernel position. For each
solver: the share of the optimal kept sum that it misses (mean and worst tile), tiles with a short row or column, and tiles
per second. The linear program is SciPy's HiGHS (one per tile); OR-Tools' min-cost flow runs in its own environment
(`make bench-peers`); TSENOR (arXiv 2505.23949: Dykstra, rounding, repair) is written here in plain PyTorch, with
tau = 20 / max and 100 iterations. `--check` compares "exact" with OR-Tools on so many tiles of each pattern. Times are the
best of `--repeats` for the native solvers, and of one run for the others.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import rarefy
from peers import ENVIRONMENTS, HERE
from rarefy.kernels import transposable_nm
from rarefy.kernels.transposable import solve_in_torch
from rarefy.kernels.transposable_torch import repair

ORTOOLS = ENVIRONMENTS / "ortools" / "bin" / "python"
Solver = Callable[[Tensor, int], Tensor]


def normal_tiles(m: int, count: int) -> Tensor:
    return torch.randn(count, m, m, generator=torch.Generator().manual_seed(0)).abs()


def trained_tiles(m: int, count: int) -> Tensor:
    """Tiles of ResNet-20's convolutions, over (out, in) at each kernel position, spread evenly over the network."""
    model = rarefy.models.load_published("resnet-20-cifar10")
    found = []
    for weight in (p.detach() for p in model.parameters() if p.dim() == 4):
        out, into = weight.shape[:2]
        if out % m == 0 and into % m == 0:
            found.append(weight.reshape(out // m, m, into // m, m, -1).permute(0, 2, 4, 1, 3).reshape(-1, m, m).abs())
    tiles = torch.cat(found)
    return tiles[:: max(1, len(tiles) // count)][:count].contiguous()


def native(solver: str) -> Solver:
    return lambda tiles, n: transposable_nm(tiles.reshape(-1, tiles.shape[2]), n, tiles.shape[2], solver).view(
        tiles.shape
    )


def in_torch(tiles: Tensor, n: int) -> Tensor:
    return solve_in_torch(tiles.reshape(-1, tiles.shape[2]), n, tiles.shape[2]).view(tiles.shape)


def tsenor(tiles: Tensor, n: int, iterations: int = 100) -> Tensor:
    """Entropy-regularised transport with capped entries by Dykstra's projections, greedy rounding, repair."""
    count, m = tiles.shape[:2]
    x = 20 * tiles / tiles.amax((1, 2), keepdim=True)
    q, wanted = torch.zeros_like(x), math.log(n)
    for _ in range(iterations):
        x = x - x.logsumexp(2, keepdim=True) + wanted
        x = x - x.logsumexp(1, keepdim=True) + wanted
        y = x + q
        x = y.clamp(max=0)
        q = y - x
    order = x.reshape(count, m * m).argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros(count, m * m, dtype=torch.bool)
    rows, columns = torch.zeros(2, count, m, dtype=torch.int64)
    for place in order.split(1, dim=1):
        row, column = place // m, place % m
        fits = (rows.gather(1, row) < n) & (columns.gather(1, column) < n)
        kept.scatter_(1, place, fits)
        rows.scatter_add_(1, row, fits.long())
        columns.scatter_add_(1, column, fits.long())
    step = max(1, (1 << 24) // m**3)
    parts = zip(tiles.split(step), kept.view(tiles.shape).split(step), strict=True)
    return torch.cat([repair(t, k, n) for t, k in parts])


def linear_program(tiles: Tensor, n: int) -> Tensor:
    from scipy.optimize import linprog
    from scipy.sparse import lil_matrix

    m = tiles.shape[2]
    sums = lil_matrix((2 * m, m * m))
    for i in range(m):
        sums[i, i * m : (i + 1) * m] = 1
        sums[m + i, i::m] = 1
    sums = sums.tocsr()
    solved = [
        linprog(-t.double().flatten().numpy(), A_eq=sums, b_eq=np.full(2 * m, n), bounds=(0, 1), method="highs").x
        for t in tiles
    ]
    return torch.from_numpy(np.stack(solved)).round().bool().view(tiles.shape)


def ortools(tiles: Tensor, n: int) -> tuple[Tensor, float]:
    """Masks of OR-Tools, and the seconds that it took for them alone."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "tiles.npy", Path(folder) / "masks.npy"
        np.save(given, tiles.double().numpy())
        done = subprocess.run(
            [ORTOOLS, HERE / "workers" / "flow_ortools.py", given, made, str(n)],
            capture_output=True,
            text=True,
            check=True,
        )
        return torch.from_numpy(np.load(made)).bool(), float(done.stdout)


def worth(tiles: Tensor, masks: Tensor) -> Tensor:
    return (tiles.double() * masks).sum((1, 2))


def best_time(solve: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        masks = solve()
        times.append(time.perf_counter() - start)
    return masks, min(times)


def row(name: str, tiles: Tensor, masks: Tensor, seconds: float, n: int) -> None:
    best = worth(
        tiles, transposable_nm(tiles.reshape(-1, tiles.shape[2]), n, tiles.shape[2], "exact").view(tiles.shape)
    )
    missed = 100 * (1 - worth(tiles, masks) / best)
    short = ((masks.sum(1) < n) | (masks.sum(2) < n)).any(1).double().mean()
    print(
        f"| {name} | {missed.mean():.5f} % | {missed.max():.4f} % | {100 * short:.0f} % | {len(tiles) / seconds:,.0f} |",
        flush=True,
    )


def compare(tiles: Tensor, n: int, repeats: int) -> None:
    m = tiles.shape[2]
    many = tiles.repeat(max(1, (1 << 22) // tiles.numel()), 1, 1)
    some, few = tiles[: max(64, (1 << 17) // m**2)], tiles[: max(8, (1 << 11) // m**2)]
    print("\n| solver | missed, mean | missed, worst tile | short | tiles/s |\n|---|---|---|---|---|")
    for name in ("fast", "exact"):
        row(name, many, *best_time(lambda s=name: native(s)(many, n), repeats), n)
    row("approx", tiles, *best_time(lambda: native("approx")(tiles, n), repeats), n)
    row("fast, in PyTorch", some, *best_time(lambda: in_torch(some, n), 1), n)
    row("TSENOR, PyTorch", some, *best_time(lambda: tsenor(some, n), 1), n)
    try:
        row("linear program, SciPy", few, *best_time(lambda: linear_program(few, n), 1), n)
    except ImportError:
        print("| linear program | SciPy is not installed: pip install scipy | | | |")
    if ORTOOLS.exists():
        row("min-cost flow, OR-Tools", some, *ortools(some, n), n)
    else:
        print("| min-cost flow | OR-Tools is not installed: make bench-peers | | | |")


def whole_matrix(n: int, m: int, solver: str, repeats: int) -> float:
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).abs()
    return best_time(lambda: transposable_nm(weight, n, m, solver), repeats)[1]


def check(n: int, m: int, count: int) -> None:
    if not ORTOOLS.exists():
        print(f"{n}:{m}: not compared with OR-Tools, which is not installed: make bench-peers")
        return
    tiles = normal_tiles(m, count)
    theirs, _ = ortools(tiles, n)
    ours = native("exact")(tiles, n)
    equal = (ours == theirs).all(2).all(1).double().mean()
    apart = ((worth(tiles, ours) - worth(tiles, theirs)) / worth(tiles, theirs)).abs().max()
    pruned = worth(tiles, ~native("approx")(tiles, n)) / worth(tiles, ~ours)
    print(
        f"{n}:{m}, {count} tiles: the same masks on {100 * equal:.2f} %, kept sums apart by {apart:.1e} at most; "
        f"approx prunes {pruned.mean():.3f} times the least, {pruned.max():.3f} at most",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8", "8:16", "16:32"])
    parser.add_argument("--tiles", type=int, default=2048)
    parser.add_argument("--check", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} thread(s), {rarefy.kernels.native_config()['isa']}")
    for pattern in options.patterns:
        n, m = map(int, pattern.split(":"))
        if options.check:
            check(n, m, options.check)
            continue
        for name, tiles in (("normal", normal_tiles(m, options.tiles)), ("ResNet-20", trained_tiles(m, options.tiles))):
            print(f"\n{pattern}, {name}, {len(tiles)} tiles", end="")
            compare(tiles, n, options.repeats)
        for threads in sorted({1, options.threads}):
            torch.set_num_threads(threads)
            fast, exact = (1000 * whole_matrix(n, m, solver, options.repeats) for solver in ("fast", "exact"))
            print(f"\n4096 x 4096 at {pattern}, {threads} thread(s): fast {fast:.1f} ms, exact {exact:.1f} ms")


if __name__ == "__main__":
    main()
