"""Sparse convolutions of ResNet-50 beside the dense ones: PyTorch's own, and oneDNN with a prepacked weight.

    .venv/bin/python benchmarks/conv.py [--threads 1 2] [--batch 1 16] [--sparsity 0.5 0.9] [--level avx2] [--json FILE]

Random zeros, float32; oneDNN in the faster of its two layouts. All variants of a layer take turns in one process; medians.
GFLOP/s of real work: multiplications with zeros not counted. "gain" is over the fastest dense variant. The first layers, with
3 input channels, stay dense: all indices are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.kernels.native import native, native_config

WARM_UP, BURST = 3, 5  # runs of a turn: the first ones wake the threads up


class Layer(NamedTuple):
    """A convolution with square kernel and image, padded to keep the size."""

    out: int
    inside: int
    kernel: int
    stride: int
    size: int

    def __str__(self) -> str:
        return f"{self.out}x{self.inside} {self.kernel}x{self.kernel}/{self.stride} at {self.size}x{self.size}"


LAYERS = [
    Layer(64, 64, 3, 1, 56), Layer(128, 128, 3, 2, 56), Layer(128, 128, 3, 1, 28), Layer(256, 256, 3, 2, 28),
    Layer(256, 256, 3, 1, 14), Layer(512, 512, 3, 2, 14), Layer(512, 512, 3, 1, 7), Layer(512, 256, 1, 2, 56),
    Layer(64, 3, 7, 2, 224), Layer(32, 3, 3, 2, 224),
]  # fmt: skip


def prepacked(x: Tensor, w: Tensor, stride: int, padding: int) -> Callable[[], Tensor]:
    """OneDNN's convolution as `torch.compile` calls it: the weight reordered once for this input."""
    geometry = ([padding] * 2, [stride] * 2, [1, 1], 1)
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(w.to_mkldnn(), *geometry, list(x.shape))
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, weight, None, *geometry, "none", [], "")


def ours(x: Tensor, w: Tensor, stride: int, padding: int, threads: int) -> tuple[Callable[[], object], Tensor]:
    """The native convolution with the weight's nonzeros, and where its result goes."""
    flat = w.flatten(1)
    kept = flat != 0
    crow, col, values = F.pad(kept.sum(1).cumsum(0), (1, 0)), kept.nonzero()[:, 1].int(), flat[kept]
    pairs = ([stride] * 2, [padding] * 2, [1, 1])
    conv = native.conv(
        crow.numpy(), col.numpy(), values.numpy(), list(w.shape), list(x.shape[2:]), *pairs, 1, len(x), threads
    )
    y = torch.empty_like(F.conv2d(x, w, None, stride, padding))
    inside, outside = x.numpy(), y.numpy()
    return lambda: conv.run(inside, outside, None, None, "none", threads), y


def take_turns(ways: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Run every way in turn, a few times in a row, until the time is over; return the medians of their times."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 7:
        for name, run in ways.items():
            for i in range(WARM_UP + BURST):
                start = time.perf_counter()
                run()
                if i >= WARM_UP:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def measure(layer: Layer, sparsities: list[float], batch: int, threads: int, seconds: float) -> dict[str, float]:
    """Return the median time of every variant of a layer."""
    padding = layer.kernel // 2
    x = torch.randn(batch, layer.inside, layer.size, layer.size)
    dense = torch.randn(layer.out, layer.inside, layer.kernel, layer.kernel)
    ways: dict[str, Callable[[], object]] = {
        "torch": lambda: F.conv2d(x, dense, None, layer.stride, padding),
        "onednn": prepacked(x, dense, layer.stride, padding),
        "onednn_nhwc": prepacked(x.to(memory_format=torch.channels_last), dense, layer.stride, padding),
    }
    for sparsity in [0.0] if layer.inside == 3 else sparsities:
        w = dense * (torch.rand(dense.shape) >= sparsity)
        ways[f"{sparsity:g}"], y = ours(x, w, layer.stride, padding, threads)
        ways[f"{sparsity:g}"]()
        expected = F.conv2d(x, w, None, layer.stride, padding)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    return take_turns(ways, seconds)


def show(layer: Layer, times: dict[str, float], batch: int) -> str:
    """Return a line of the table."""
    size = (layer.size - 1) // layer.stride + 1
    work = 2e-9 * batch * layer.out * layer.inside * layer.kernel**2 * size**2
    dense = [times["torch"], min(times["onednn"], times["onednn_nhwc"])]
    cells = [f"{1e3 * t:.2f} ms ({work / t:.0f})" for t in dense]
    for name, t in times.items():
        if name[0].isdigit():
            cells.append(f"{1e3 * t:.3f} ms ({work * (1 - float(name)) / t:.0f}, {min(dense) / t:.1f}x)")
    return " | ".join(["", str(layer), *cells, ""]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each layer")
    parser.add_argument("--level", help="an instruction set, instead of the best")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if args.level:
        native.set_isa(args.level)
    results = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.batch:
            names = [f"{100 * s:g} %: time (real GFLOP/s, gain)" for s in args.sparsity]
            print(f"\n{threads} thread(s), batch {batch}, {native_config()['isa']}\n")
            print(" | ".join(["| layer", "torch: time (GFLOP/s)", "oneDNN prepacked", *names]), "|")
            print("|---" * (3 + len(names)) + "|", flush=True)
            for layer in LAYERS:
                times = measure(layer, args.sparsity, batch, threads, args.seconds)
                print(show(layer, times, batch), flush=True)
                results.append({"threads": threads, "batch": batch, **layer._asdict(), "seconds": times})
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
