"""The SAT simulator's tables: BDWP training on the accelerator of arXiv 2309.13015, against that paper's figures.

    python benchmarks/sat.py networks      # five networks of the paper and CIFAR's ResNet-18, four patterns; half a minute
    python benchmarks/sat.py prototype     # the method sheet's own prototype, figure by figure
    python benchmarks/sat.py sensitivity   # what each assumption does to the average at 2:8

Every command prints a Markdown table, and writes all numbers with --json. No random numbers, nothing is measured; the same
on every machine. Nothing here was chosen to meet a published figure: parameters are the defaults, batch 128.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy import models
from rarefy.systems.sat import Accelerator, Comparison, Mapping, compare, cycles
from rarefy.systems.sat.report import to_dict

# name -> (network, side of its images, options); the first five are the paper's, by their published data sets
NETWORKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ResNet-9, CIFAR-10": ("resnet-9", 32, {}),
    "ViT, CIFAR-100": ("vit", 32, {"num_classes": 100}),
    "VGG-19, CIFAR-100": ("vgg-19-bn", 32, {"num_classes": 100}),
    "ResNet-18, Tiny ImageNet": ("resnet-18", 64, {"num_classes": 200, "stem": "small"}),
    "ResNet-50, ImageNet": ("resnet-50", 224, {}),
    "ResNet-18, CIFAR-10": ("resnet-18", 32, {"num_classes": 10, "stem": "small"}),
}
PAPER = tuple(NETWORKS)[:5]
PATTERNS = ("2:4", "2:8", "1:4", "1:8")
PUBLISHED, PUBLISHED_SAVED = 1.75, 0.48


def network(name: str, batch: int = 128) -> tuple[nn.Module, Tensor]:
    kind, side, options = NETWORKS[name]
    with torch.device("meta"):
        if kind == "vit":
            options = {**options, "image_size": side}
        return models.build(kind, **options), torch.empty(batch, 3, side, side)


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> None:
    head = list(head)
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")


def line(found: Comparison) -> list[str]:
    run = found.sparse
    others = (found.forward_only, found.no_pregeneration, found.no_interleaving)
    ratios = [other.cycles / run.cycles for other in others]
    return [
        f"{found.speedup:.2f}", f"{found.product_speedup:.2f}", f"{found.bound:.2f}", *(f"{r:.2f}" for r in ratios),
        f"{1 - 1 / found.bound:.1%}", f"{run.seconds:.3f}", f"{run.utilisation:.0%} / {found.dense.utilisation:.0%}",
        f"{run.gflops:.0f} / {found.dense.gflops:.0f}", f"{found.dense.energy / run.energy:.2f}",
    ]  # fmt: skip


HEAD = ("network", "pattern", "x dense", "x dense, passes hidden", "by multiply-adds", "x FF only", "x no pre-gen.",
        "x no interl.", "multiply-adds saved", "s a step", "used, sparse / dense", "GFLOP/s, sparse / dense",
        "energy, x less")  # fmt: skip


def networks(args: argparse.Namespace) -> list[Any]:
    found = {(name, p): compare(*network(name, args.batch), p) for name in NETWORKS for p in PATTERNS}
    table(HEAD, ([name, pattern, *line(c)] for (name, pattern), c in found.items()))
    ours = [found[name, "2:8"] for name in PAPER]
    mean = sum(c.speedup for c in ours) / len(ours)
    hidden = sum(c.product_speedup for c in ours) / len(ours)
    saved = sum(1 - 1 / c.bound for c in ours) / len(ours)
    print(f"\nAverage of the paper's five at 2:8: {mean:.2f}x ({mean / PUBLISHED - 1:+.1%} of the published {PUBLISHED}x), "
          f"{hidden:.2f}x with passes hidden ({hidden / PUBLISHED - 1:+.1%}); multiply-adds saved {saved:.1%} "
          f"(published about {PUBLISHED_SAVED:.0%}).")  # fmt: skip
    return [{"network": name, **to_dict(c)} for (name, _), c in found.items()]


def output_only(found: Comparison, depth: int) -> int:
    """Cycles of all products output-stationary, at one interleaving, memory left out."""
    array = found.sparse.array
    return sum(cycles(gemm, Mapping("output", depth), array) for layer in found.sparse.layers for gemm in layer.gemms)


def prototype(args: argparse.Namespace) -> list[Any]:
    def run(pattern: str = "2:8", batch: int = 128, bandwidth: float = 25.6) -> Comparison:
        array = Accelerator(bandwidth=bandwidth, elementwise=False)
        return compare(*network("ResNet-18, CIFAR-10", batch), pattern, array)

    base, small, lines = run(), run(batch=8, bandwidth=3.2), []

    def add(name: str, said: float, found: Comparison, fast: str = "sparse", slow: str = "dense") -> None:
        one, other = getattr(found, fast), getattr(found, slow)
        lines.append((name, said, other.product_cycles / one.product_cycles, other.cycles / one.cycles))

    add("2:8, 25.6 GB/s", 1.99, base)
    add("2:8, 12.8 GB/s", 1.98, run(bandwidth=12.8))
    add("2:8, 3.2 GB/s", 1.76, run(bandwidth=3.2))
    add("2:4, 25.6 GB/s", 1.50, run("2:4"))
    add("SR-STE 2:8", 1.33, base, "forward_only")
    add("2:8, batch 8, 3.2 GB/s", 1.36, small)
    add("the same without pre-generation", 1.20, small, "no_pregeneration")
    add("I = 1 against I = 4, as scheduled", 4.0, base, slow="no_interleaving")
    only = output_only(base, 1) / output_only(base, 4)
    lines.append(("I = 1 against I = 4, all output-stationary", 4.0, only, only))
    head = ("", "sheet's prototype", "products alone", "with updates", "deviation")
    table(head, ([n, f"{s:.2f}", f"{got:.2f}", f"{whole:.2f}", f"{whole / s - 1:+.1%}"] for n, s, got, whole in lines))
    return [
        {"case": name, "prototype": said, "products": got, "with_updates": whole} for name, said, got, whole in lines
    ]


def sensitivity(args: argparse.Namespace) -> list[Any]:
    cases: list[tuple[str, dict[str, Any], int]] = [("defaults", {}, 128)]
    cases += [(f"bandwidth {b} GB/s", {"bandwidth": b}, 128) for b in (3.2, 6.4, 12.8, 51.2)]
    cases += [(f"{v} vector lanes", {"lanes": v}, 128) for v in (16, 64, 128)]
    cases += [
        (f"buffers of {k} KiB", dict.fromkeys(("row_buffer", "column_buffer", "output_buffer"), k), 128)
        for k in (128, 8192)
    ]
    cases += [(f"{r} x {r} PEs", {"rows": r, "columns": r}, 128) for r in (16, 64)]
    cases += [(f"batch {b}", {}, b) for b in (8, 32, 512)]
    lines = []
    for name, fields, batch in cases:
        found = [compare(*network(net, batch), "2:8", Accelerator(**fields)) for net in PAPER]
        lines.append((name, *(sum(values) / len(found) for values in (
            [c.speedup for c in found], [c.product_speedup for c in found],
            [c.no_pregeneration.cycles / c.sparse.cycles for c in found],
            [c.no_interleaving.cycles / c.sparse.cycles for c in found],
        ))))  # fmt: skip
    table(("", "x dense", "x dense, passes hidden", "x no pre-gen.", "x no interl."),
          ([name, *(f"{value:.2f}" for value in values)] for name, *values in lines))  # fmt: skip
    return [
        dict(zip(("case", "speedup", "hidden", "no_pregeneration", "no_interleaving"), x, strict=True)) for x in lines
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("networks", "prototype", "sensitivity"))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    done = {"networks": networks, "prototype": prototype, "sensitivity": sensitivity}[args.what](args)
    if args.json:
        args.json.write_text(json.dumps(done, indent=1) + "\n")
