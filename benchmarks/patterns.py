"""Regular patterns and low precision beside unstructured float32 at the same sparsity, and beside dense.

    python benchmarks/patterns.py [--threads 1 2] [--shapes 1024x1024x784 ...] [--json FILE]

Times are medians of samples taken in turns; GFLOP/s are dense-equivalent: 2 M K N over the time, zeros counted. Packing
the activations is part of the time. "onednn" is PyTorch's oneDNN with packed weights; fbgemm is `torch.ops.sparse.qlinear`.
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

from rarefy import kernels
from rarefy.kernels import lowp, sparse_layers

SHAPES = ("1024x1024x128", "1024x1024x784", "512x2048x784")


def medians(ways: dict[str, Callable[[], object]], seconds: float = 0.05) -> dict[str, float]:
    """Time the ways in turns."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    end = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < end or len(next(iter(samples.values()))) < 7:
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in samples.items()}


def pattern_mask(name: str, m: int, k: int, sparsity: float) -> torch.Tensor:
    """Return a random mask [m, k] of the pattern: "unstructured", "RxC", "N:M along the inputs", "fan-in"."""
    keep = 1 - sparsity
    if name == "unstructured":
        return torch.rand(m, k) < keep
    if name == "fan-in":
        return torch.rand(m, k).argsort(1).argsort(1) < round(k * keep)
    if ":" in name:
        n, of = map(int, name.split(":"))
        return (torch.rand(m, k // of, of).argsort(2).argsort(2) < n).view(m, k)
    r, c = map(int, name.split("x"))
    return (torch.rand(m // r, k // c) < keep).repeat_interleave(r, 0).repeat_interleave(c, 1)


def fbgemm(weight: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> Callable[[], object] | None:
    """Return PyTorch's int8 1x4 block-sparse linear layer, where this build has it."""
    try:
        torch.backends.quantized.engine = "fbgemm"
        zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
        w = torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.double(), zeros, 0)
        packed = torch.ops.sparse.qlinear_prepack(w, torch.zeros(weight.shape[0]), 1, 4)
        q = torch._make_per_tensor_quantized_tensor(x, 0.05, 128)
        run = lambda: torch.ops.sparse.qlinear(q, packed, 0.1, 128)  # noqa: E731
        run()
    except Exception as error:
        print(f"fbgemm: {error}")
        return None
    return run


def table(m: int, k: int, n: int, threads: int) -> list[dict[str, object]]:
    """Measure one shape: W [m, k] times n samples."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dense, x, work = torch.randn(m, k), torch.randn(n, k), 2 * m * k * n / 1e9
    rows: list[dict[str, object]] = []
    low_w, low_x = dense.bfloat16(), x.bfloat16()
    q_x = torch.randint(0, 256, (n, k)).to(torch.uint8)
    packed = torch.ops.mkldnn._reorder_linear_weight(dense, n)
    low_packed = torch.ops.mkldnn._reorder_linear_weight(low_w, n)
    y = torch.empty(n, m)
    base = {
        "dense float32 torch": lambda: F.linear(x, dense),
        "dense float32 onednn": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        "dense bfloat16 torch": lambda: F.linear(low_x, low_w),
        "dense bfloat16 onednn": lambda: torch.ops.mkldnn._linear_pointwise(low_x, low_packed, None, "none", [], ""),
    }
    for sparsity, names in (
        (0.5, ("unstructured", "2:4", "4x1", "1x4", "fan-in")),
        (0.75, ("unstructured", "1:4", "2:8", "4x1", "16x1", "1x2", "1x4", "fan-in")),
        (0.9, ("unstructured", "4x1", "16x1", "1x2", "1x4", "4x4", "fan-in")),
        (0.95, ("unstructured", "4x1", "16x1", "1x4", "fan-in")),
    ):
        ways, layers = dict(base), []
        scale = torch.full((m,), 0.02)
        for name in names:
            weight = dense * pattern_mask(name, m, k, sparsity)
            for kind, make in (
                ("float32", sparse_layers.sparse_linear_layer),
                ("bfloat16", lowp.bfloat16_linear_layer),
            ):
                layer = make(weight, None, batch=n, threads=threads)
                layers.append(layer)
                ways[f"{name} {kind}"] = lambda layer=layer: layer.run([x.numpy()], y.numpy(), n, threads)
            if name in ("1x4", "unstructured"):
                q_w = (weight * 40).clamp(-127, 127).round().to(torch.int8)
                product = lowp.Int8Linear(q_w, scale, batch=n, threads=threads)
                ways[f"{name} int8"] = lambda product=product: product(q_x, 0.05, 128)
                if name == "1x4" and (run := fbgemm(q_w, q_x, scale)) is not None:
                    ways["1x4 int8 fbgemm"] = run
        for way, seconds in medians(ways).items():
            rows.append(
                {"threads": threads, "m": m, "k": k, "n": n, "sparsity": sparsity, "way": way, "gflops": work / seconds}
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{kernels.native_config()['isa']}, dot products: {lowp.has_dot_products()}; dense-equivalent GFLOP/s")
    rows = []
    for threads in args.threads:
        for shape in args.shapes:
            found = table(*map(int, shape.split("x")), threads)
            rows += found
            for sparsity in sorted({r["sparsity"] for r in found}):
                line = ", ".join(f"{r['way']} {r['gflops']:.0f}" for r in found if r["sparsity"] == sparsity)
                print(f"{threads} thread(s), {shape}, {sparsity:.0%}: {line}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
