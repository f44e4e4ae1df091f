"""Sparse times dense, float32, beside dense and beside what people would pick instead: the table of docs/performance.md.

    make bench-peers
    python benchmarks/spmm.py [--threads 1] [--shapes 1024x1024x784 ...] [--sparsity 0.9 ...] [--json FILE]

A shape is M x K x N: W [M, K] with unstructured zeros times N columns. Up to N = 16 activations are [N, K] as linear layers
have them, above planes [K, N] as 1 x 1 convolutions have them; --linear takes [N, K] for all. Packing activations is part
of the time. Every way is checked against the dense product, and all take turns: medians; dense-equivalent GFLOP/s,
2 M K N over the time. "real" counts kept weights only, as a share of the FMA peak that is measured here too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F

from peers import Peer, installed
from rarefy.bench import ceilings
from rarefy.kernels import sparse_layers
from rarefy.kernels.native import native

SHAPES = """
64x32x12544 128x64x3136 128x128x3136 256x128x784 256x256x784 512x256x196 512x512x196 1024x512x49 1024x1024x49
512x2048x1 512x2048x16 512x2048x128 512x2048x784 512x2048x3136 1024x1024x1 1024x1024x16 1024x1024x128 1024x1024x784
1024x1024x3136 2048x512x1 2048x512x16 2048x512x128 2048x512x784 2048x512x3136
""".split()  # noqa: SIM905
SPARSITIES = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
SECONDS = 0.004  # of a sample


def timed(run: Callable[[], object], seconds: float = SECONDS) -> float:
    """Return the mean seconds of one run, over as many as fill a sample."""
    start = time.perf_counter()
    run()
    once = max(time.perf_counter() - start, 1e-7)
    times = max(1, int(seconds / once))
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


Way = tuple[Callable[[], object], Callable[[], torch.Tensor]]


def here(weight: torch.Tensor, x: torch.Tensor, form: str, threads: int) -> dict[str, Way]:
    """Return the ways that run in this process: what to time, and what gives the result."""
    m, k = weight.shape
    n = x.shape[1] if form == "planes" else x.shape[0]
    array, out = x.numpy(), torch.empty((1, m, n) if form == "planes" else (n, m))
    if form == "planes":
        layer = sparse_layers.sparse_pointwise_layer(weight, None, (1, n), threads=threads)
        image, kernel = x.view(1, k, n, 1), weight[:, :, None, None].contiguous()
        geometry = ([0, 0], [1, 1], [1, 1], 1)
        packed = torch.ops.mkldnn._reorder_convolution_weight(kernel, *geometry, [1, k, n, 1])
        conv = lambda: torch.ops.mkldnn._convolution_pointwise(image, packed, None, *geometry, "none", [], "")  # noqa: E731
        flipped = x.t().contiguous()
        linear_packed = torch.ops.mkldnn._reorder_linear_weight(weight, n)
        linear = lambda: torch.ops.mkldnn._linear_pointwise(flipped, linear_packed, None, "none", [], "")  # noqa: E731
        torch_run = lambda: weight @ x  # noqa: E731
        csr_run = lambda csr=weight.to_sparse_csr(): csr @ x  # noqa: E731
        results = {"onednn conv": lambda: conv().view(m, n), "onednn linear": lambda: linear().t()}
    else:
        layer = sparse_layers.sparse_linear_layer(weight, None, batch=n, threads=threads)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, n)
        linear = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")  # noqa: E731
        torch_run = lambda: F.linear(x, weight)  # noqa: E731
        csr_run = lambda csr=weight.to_sparse_csr(): (csr @ x.t()).t()  # noqa: E731
        conv, results = None, {"onednn linear": linear}

    def ours() -> None:
        layer.run([array], out.numpy(), 1 if form == "planes" else n, threads)

    def our_result() -> torch.Tensor:
        ours()
        return out[0] if form == "planes" else out

    ways = {"rarefy": (ours, our_result), "torch": (torch_run, torch_run), "torch CSR": (csr_run, csr_run)}
    ways["onednn linear"] = (linear, results["onednn linear"])
    if conv is not None:
        ways["onednn conv"] = (conv, results["onednn conv"])
    return ways


def cell(
    m: int, k: int, n: int, sparsity: float, form: str, threads: int, peers: list[Peer], rounds: int
) -> dict[str, float]:
    """Return seconds by way for one cell."""
    g = torch.Generator().manual_seed(0)
    kept = torch.rand(m * k, generator=g).argsort()[: round(m * k * (1 - sparsity))]
    weight = torch.zeros(m * k).index_fill_(0, kept, 1.0).view(m, k) * torch.randn(m, k, generator=g)
    x = torch.randn((k, n) if form == "planes" else (n, k), generator=g)
    expected = weight @ x if form == "planes" else F.linear(x, weight)
    ways = here(weight, x, form, threads)
    samples: dict[str, list[float]] = {}
    for name, (_, result) in ways.items():
        check(name, result(), expected)
        samples[name] = []
    taking = []
    for peer in peers:
        why = peer.matmul(weight.numpy(), x.numpy(), form)
        if why is None:
            check(peer.name, torch.from_numpy(peer.output()).reshape(expected.shape), expected)
            taking.append(peer)
            samples[peer.name] = []
    for _ in range(rounds):
        for name, (run, _) in ways.items():
            samples[name].append(timed(run))
        for peer in taking:
            samples[peer.name] += peer.samples(1, SECONDS)
    return {name: statistics.median(found) for name, found in samples.items() if found}


def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-20))
    if not error < 1e-4:
        raise SystemExit(f"{name} is wrong by {error}")


DENSE = ("torch", "onednn linear", "onednn conv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--sparsity", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--linear", action="store_true", help="[N, K] activations for every shape")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="*", default=["mkl", "scipy", "deepsparse"])
    parser.add_argument("--json", type=Path, help="append one line per cell")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [name for name in args.peers if name in installed() and not (name == "scipy" and args.threads > 1)]
    peak = ceilings(args.threads).gflops
    print(f"{native.isa()}, {args.threads} thread(s), {peak:.0f} GFLOP/s at most, peers: {', '.join(names) or 'none'}")
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer(name, args.threads)) for name in names]
        for shape in args.shapes:
            m, k, n = map(int, shape.split("x"))
            form = "linear" if n <= 16 or args.linear else "planes"
            for sparsity in args.sparsity:
                seconds = cell(m, k, n, sparsity, form, args.threads, peers, args.rounds)
                rate = {name: 2 * m * k * n / t / 1e9 for name, t in seconds.items()}
                dense = max((name for name in rate if name in DENSE), key=rate.__getitem__)
                peer = max((name for name in rate if name not in (*DENSE, "rarefy")), key=rate.__getitem__)
                real = rate["rarefy"] * (1 - sparsity)
                print(
                    f"{shape:>14} {sparsity:4.0%} rarefy {rate['rarefy']:6.0f} ({real:4.0f} real, {real / peak:4.0%} of peak)  "
                    f"best dense {rate[dense]:4.0f} {dense} -> {rate['rarefy'] / rate[dense]:5.2f}x  "
                    f"best peer {rate[peer]:5.0f} {peer} -> {rate['rarefy'] / rate[peer]:5.2f}x",
                    flush=True,
                )
                if args.json:
                    line = {
                        "threads": args.threads,
                        "form": form,
                        "m": m,
                        "k": k,
                        "n": n,
                        "sparsity": sparsity,
                        "gflops": rate,
                    }
                    with args.json.open("a") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
