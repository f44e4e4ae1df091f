"""What the engine costs: a masked training step, a RigL update and bit-packing, each beside what it is compared with.

    .venv/bin/python benchmarks/engine_overhead.py [--threads N] [--rounds N] [--json FILE]

1. One training step of LeNet-300-100 (batch 100), ResNet-20 (batch 128, 32x32) and ResNet-50 (batch 4, 224x224) at 90 %
   sparsity: plain dense, masked by rarefy (`static`, so every step is an ordinary one), and `torch.nn.utils.prune` with
   the same masks.
2. One RigL update of all 25.5 M ResNet-50 weights at 90 %, beside one `torch.topk` of a tenth of the same numbers.
3. Bit-packing 25.5 M mask entries, beside copying them.

All variants of a line take turns in one process; medians over the rounds, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import rarefy
from rarefy import kernels, models


def take_turns(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Run every variant once a round, in turn; return their times in seconds. The first round is thrown away."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def report(title: str, times: dict[str, list[float]], base: str) -> dict[str, Any]:
    print(f"\n{title}")
    result: dict[str, Any] = {}
    for name, values in times.items():
        ratio = statistics.median(v / b for v, b in zip(values, times[base], strict=True))
        median = statistics.median(values)
        result[name] = {"milliseconds": median * 1e3, f"ratio to {base}": ratio}
        print(f"  {name:28s} {median * 1e3:10.2f} ms   {ratio:7.3f} x {base}")
    return result


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], None]:
    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(name: str, shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    batch = shape[0]
    x, y = torch.randn(shape), torch.randint(10, (batch,))
    variants: dict[str, Callable[[], object]] = {}
    masks: dict[str, Tensor] = {}
    for kind in ("dense", "rarefy", "torch.nn.utils.prune"):
        torch.manual_seed(0)
        model = models.build(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        if kind == "rarefy":
            masks = rarefy.sparsify(model, "static", sparsity=0.9, optimizer=optimizer).masks()
        elif kind == "torch.nn.utils.prune":
            for parameter, mask in masks.items():
                prune.custom_from_mask(model.get_submodule(parameter.removesuffix(".weight")), "weight", mask)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        variants[kind] = training_step(model, optimizer, x, y)
    return report(f"One training step, {name}, batch {batch}, 90 % sparse", take_turns(variants, rounds), "dense")


def update(rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = models.build("resnet-50")
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.9, every=1, stop=10**6)
    gradients = {name: torch.randn(layer.shape) for name, layer in sparse.layers.items()}
    flat = torch.cat([layer.weight().flatten() for layer in sparse.layers.values()])

    def rigl() -> None:
        for layer in sparse.layers.values():
            layer._gradient.total = gradients[layer.name]  # what a backward pass would have left
        sparse.method.after_step(sparse, sparse.step_count)
        sparse.step_count += 1

    sparse.step_count = 1
    times = take_turns({"torch.topk": lambda: torch.topk(flat, flat.numel() // 10), "RigL update": rigl}, rounds)
    assert any(event.grown for event in sparse.events if event.step)
    return report(f"One RigL update of {flat.numel():,} weights at 90 %", times, "torch.topk")


def packing(rounds: int) -> dict[str, Any]:
    mask = torch.rand(25_502_912) < 0.1
    copy, bits = torch.empty_like(mask), kernels.pack_mask(mask)
    variants = {
        "copy": lambda: copy.copy_(mask),
        "pack_mask": lambda: kernels.pack_mask(mask),
        "unpack_mask": lambda: kernels.unpack_mask(bits, mask.shape),
    }
    times = take_turns(variants, rounds * 5)
    result = report(f"Bit-packing {mask.numel():,} mask entries", times, "copy")
    for name, values in times.items():
        print(f"  {name:28s} {mask.numel() / statistics.median(values) / 1e9:10.2f} GB of mask a second")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}")
    print(rarefy.show_config())
    results = {
        "packing": packing(arguments.rounds),
        "update": update(arguments.rounds),
        "lenet-300-100": steps("lenet-300-100", (100, 1, 28, 28), arguments.rounds * 40),
        "resnet-20": steps("resnet-20", (128, 3, 32, 32), arguments.rounds),
        "resnet-50": steps("resnet-50", (4, 3, 224, 224), arguments.rounds),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
