"""N:M kernels beside dense products and our unstructured kernel, float32: the tables of docs/performance.md.

    python benchmarks/n_m.py [--threads 1 2] [--shapes 1024x1024x128 ...] [--patterns 2:4 ...] [--json FILE]
    python benchmarks/n_m.py --steps [--threads 1 2]

A shape is M x K x N: W [M, K] and N samples [N, K]. Masks of the N:M kernel are transposable; those of the unstructured one are
random, of the same sparsity. "dense" is the faster of PyTorch's own and of oneDNN with a packed weight (the gradients' products
are as large, so that is their rival too). Every result is checked; all ways take turns; medians; GFLOP/s of real work (zeros
not counted), their share of the peak measured here, and the dense time over theirs.

--steps: whole training steps of a feed-forward block 1024-4096-1024 (GELU, mean square, SGD with momentum): dense; N:M with the
weight's gradient where it is kept, and with all of it (straight through); unstructured, on kept values alone. And the method
`t-mask` through `rarefy.sparsify`, as it is, with the mask multiplied in instead of the kernels, and with new masks at every
step, of which training pays a fortieth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rarefy
from rarefy.bench import ceilings
from rarefy.kernels import n_m
from rarefy.kernels.native import native
from rarefy.patterns import TransposableNM

SHAPES = (
    "1024x1024x16",
    "1024x1024x128",
    "1024x1024x784",
    "512x2048x128",
    "2048x512x784",
    "4096x1024x256",
    "1024x4096x256",
)
PATTERNS = ("2:4", "1:4", "2:8", "4:16", "1:16")
T_MASK = ("t-mask", "t-mask, multiplied", "t-mask, new masks")
Way = Callable[[], object]


def medians(ways: dict[str, Way], rounds: int) -> dict[str, float]:
    """Return the median seconds of each way; they take turns, each long enough to be measured."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    times = {}
    for name, run in ways.items():
        run()
        start = time.perf_counter()
        run()
        times[name] = max(1, int(0.002 / max(time.perf_counter() - start, 1e-7)))
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            for _ in range(times[name]):
                run()
            samples[name].append((time.perf_counter() - start) / times[name])
    return {name: statistics.median(found) for name, found in samples.items()}


def check(name: str, found: Tensor, expected: Tensor) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < 1e-4:
        raise SystemExit(f"{name} is wrong by {error}")


def cell(m: int, k: int, n: int, pattern: str, threads: int, rounds: int) -> dict[str, float]:
    """Return seconds by way: "dense", and forward, input and values gradient of both kernels."""
    keep, of = map(int, pattern.split(":"))
    g = torch.Generator().manual_seed(0)
    dense, x, dy = (torch.randn(*shape, generator=g) for shape in ((m, k), (n, k), (n, m)))
    mask = TransposableNM(keep, of).project(dense.abs(), keep=keep * of)
    index = n_m.n_m_index(mask, keep, of, transposable=True)
    weight, values = dense * mask, n_m.n_m_gather(dense, index)
    v, i, u, steps = values.view(-1).numpy(), index.index.view(-1).numpy(), index.used.view(-1).numpy(), index.steps
    random = torch.rand(m, k, generator=g).view(-1).argsort().argsort().view(m, k) < m * k * keep // of
    other = dense * random
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), random.sum(1).cumsum(0)])
    training = native.linear_training(crow.numpy(), random.nonzero()[:, 1].int().numpy(), k, n, threads)
    kept = other[random]
    y, dx, dv, du = torch.empty(n, m), torch.empty(n, k), torch.empty(values.shape), torch.empty(kept.shape)
    a = {name: t.numpy() for name, t in dict(x=x, dy=dy, y=y, dx=dx, dv=dv.view(-1), du=du, kept=kept).items()}
    packed = torch.ops.mkldnn._reorder_linear_weight(dense, n)
    ways: dict[str, Way] = {
        "torch": lambda: F.linear(x, dense),
        "onednn": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        "n:m forward": lambda: native.n_m_forward(v, i, steps, a["x"], None, a["y"], threads),
        "n:m input": lambda: native.n_m_input_gradient(v, i, steps, a["dy"], a["dx"], threads),
        "n:m values": lambda: native.n_m_values_gradient(i, u, steps, a["x"], a["dy"], a["dv"], threads),
        "n:m gather": lambda: native.n_m_gather(dense.numpy(), i, u, steps, v, threads),
        "unstructured forward": lambda: training.forward(a["kept"], a["x"], None, a["y"], threads),
        "unstructured input": lambda: training.input_gradient(a["kept"], a["dy"], a["dx"], threads),
        "unstructured values": lambda: training.values_gradient(a["x"], a["dy"], a["du"], threads),
    }
    for name, w, found, expected in (
        ("n:m", weight, lambda: n_m.n_m_dense(dv, index), (dy.t() @ x) * mask),
        ("unstructured", other, lambda: torch.zeros(m, k).masked_scatter(random, du), (dy.t() @ x) * random),
    ):
        for part in ("forward", "input", "values"):
            ways[f"{name} {part}"]()
        check(f"{name} forward", y, F.linear(x, w))
        check(f"{name} input", dx, dy @ w)
        check(f"{name} values", found(), expected)
    seconds = medians(ways, rounds)
    seconds["dense"] = min(seconds.pop("torch"), seconds.pop("onednn"))
    return seconds


def block(kind: str, pattern: str, tokens: int) -> Way:
    """Return one whole training step of a feed-forward block."""
    keep, of = map(int, pattern.split(":"))
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))
    masks = {
        name: TransposableNM(keep, of).project(p.detach().abs(), keep=keep * of)
        for name, p in model.named_parameters()
        if name.endswith("weight")
    }
    if kind.startswith("n:m"):
        rarefy.nn.n_m_(model, masks, keep, of, gradient=kind.split(", ")[1])
    if kind == "unstructured":
        sparse = (
            rarefy.nn.SparseLinear.from_dense(model[at], torch.rand(model[at].weight.shape) < keep / of)
            for at in (0, 2)
        )
        model = nn.Sequential(next(sparse), model[1], next(sparse))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if kind.startswith("t-mask"):
        every = 1 if kind == "t-mask, new masks" else 1 << 20
        method = rarefy.methods.TMask(pattern=f"{pattern}t", sparsity=1 - keep / of, every=every)
        rarefy.sparsify(model, method, optimizer=optimizer)
        if kind == "t-mask, multiplied":
            for part in model.modules():
                if isinstance(part, rarefy.nn.TransposableMask):
                    part.WORTH = 1 << 60  # of this one only
    x, wanted = torch.randn(tokens, 1024, requires_grad=True), torch.randn(tokens, 1024)

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        F.mse_loss(model(x), wanted).backward()
        optimizer.step()

    return step


def steps(patterns: list[str], tokens: list[int], threads: int, rounds: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for n in tokens:
        for pattern in patterns:
            kinds = ("dense", "n:m, kept", "n:m, dense", "unstructured", *T_MASK)
            found = medians({kind: block(kind, pattern, n) for kind in kinds}, rounds)
            rows.append(
                {"threads": threads, "tokens": n, "pattern": pattern, "ms": {k: t * 1e3 for k, t in found.items()}}
            )
            said = ", ".join(f"{k} {t * 1e3:.1f} ms ({found['dense'] / t:.2f}x)" for k, t in found.items())
            print(f"{threads} thread(s), {n} tokens, {pattern}: {said}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", action="store_true", help="whole training steps instead of single products")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        peak = max(ceilings(threads).gflops for _ in range(5))
        print(f"{native.isa()}, {threads} thread(s), {peak:.0f} GFLOP/s at most")
        if args.steps:
            rows += steps(args.patterns, args.tokens, threads, args.rounds)
            continue
        for shape in args.shapes:
            m, k, n = map(int, shape.split("x"))
            for pattern in args.patterns:
                found = cell(m, k, n, pattern, threads, args.rounds)
                keep, of = map(int, pattern.split(":"))
                rows.append(
                    {"threads": threads, "m": m, "k": k, "n": n, "pattern": pattern, "seconds": found, "peak": peak}
                )
                dense, parts = found["dense"], []
                for part in ("forward", "input", "values"):
                    both = []
                    for kernel in ("n:m", "unstructured"):
                        rate = 2 * m * k * n * keep / of / found[f"{kernel} {part}"] / 1e9
                        both.append(
                            f"{kernel} {rate:.0f} ({rate / peak:.0%}, {dense / found[f'{kernel} {part}']:.2f}x)"
                        )
                    parts.append(f"{part}: {', '.join(both)}")
                rate = 2 * m * k * n / dense / 1e9
                print(
                    f"{shape} {pattern}: dense {rate:.0f}; {'; '.join(parts)}; gather {found['n:m gather'] * 1e3:.2f} ms",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
