"""Groups of filters that share their inputs (SparseByteNN): what they keep, what accuracy that costs, what time it saves.

    python benchmarks/group_sparsity.py accuracy --data digits --epochs 15 --tune 3 --seeds 0 1 2 3 4
    RAREFY_DATA=../shared/data python benchmarks/group_sparsity.py accuracy --data cifar10 --seeds 0 1
    python benchmarks/group_sparsity.py time [--json FILE]

accuracy: a small MobileNet is trained densely on digits or a part of CIFAR-10, then pruned at 30, 50 and 70 % in its 1 x 1
convolutions (the first layer, the depthwise layers and the classifier stay dense) as single weights, as groups of 16 filters in
the network's own order and after `rarefy.rearrange`, and as whole filters, all with the same sparsity in each layer, and
fine-tuned. Shown are the kept share of w^2 under each pattern, and test accuracy right after pruning and after fine-tuning. The
last epoch counts; nothing is chosen by test accuracy.

time: this library's kernel on 1 x 1 and 3 x 3 convolutions of MobileNet-V1's shapes, batch 1, one thread, for groups of 16 at
several sparsities, beside the same kernel with all weights kept, with unstructured zeros, and oneDNN's dense convolution. The
least of 80 samples in turns, each under a millisecond or one run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rarefy
from rarefy import data
from rarefy.kernels import sparse_layers
from rarefy.patterns import FilterGroup, parse_pattern

SPARSITIES = (0.3, 0.5, 0.7)
PATTERNS = {"unstructured": "unstructured", "group16 + rearranged": "group16", "group16": "group16", "filters": "row"}
DENSE = ["stem.*", "*.depthwise.*", "classifier*"]


# --- accuracy ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A depthwise and a pointwise convolution, each with batch norm and ReLU (MobileNet-V1)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, out, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.pointwise(F.relu(self.norm1(self.depthwise(x))))))


class SmallMobileNet(nn.Module):
    """A stem of 32 channels, and blocks of 64 to 256 at three sizes of image, the largest 16 x 16 or 8 x 8 pixels."""

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__()
        stride = 2 if image_size > 16 else 1
        self.stem = nn.Sequential(nn.Conv2d(channels, 32, 3, stride, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        sizes = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))
        self.blocks = nn.Sequential(*[Block(*size) for size in sizes])
        self.classifier = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def train(
    model: nn.Module, bundle: Any, epochs: int, lr: float, seed: int, prune: Callable[[Any], Any] | None = None
) -> None:
    batches = data.train_batches(bundle, 128, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    sparse = prune(optimizer) if prune else None
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * len(batches), pct_start=0.2)
    model.train()
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    if sparse is not None:
        sparse.finalize()


@torch.no_grad()
def accuracy(model: nn.Module, bundle: Any) -> float:
    model.eval()
    right = [int((model(x).argmax(1) == y).sum()) for x, y in data.eval_batches(bundle, 500)]
    return sum(right) / len(bundle.test_y)


def kept_share(model: nn.Module, pattern: str, sparsity: float) -> float:
    """Return the share of w^2 that the pattern can keep in the pruned layers."""
    chosen, kept, total = parse_pattern(pattern), 0.0, 0.0
    for name, p in model.named_parameters():
        if "pointwise" in name:
            score = p.detach().square()
            kept += float(score[chosen.project(score, chosen.keep(p.shape, 1 - sparsity))].sum())
            total += float(score.sum())
    return kept / total


def one_seed(bundle: Any, seed: int, epochs: int, tune: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(seed)
    dense = SmallMobileNet(bundle.in_channels, bundle.image_size)
    train(dense, bundle, epochs, 0.2, seed)
    found = {"dense": {"accuracy": accuracy(dense, bundle)}}
    print(f"seed {seed}: dense {found['dense']['accuracy']:.4f}", flush=True)
    for sparsity in SPARSITIES:
        for way, pattern in PATTERNS.items():
            model = copy.deepcopy(dense)
            if "rearranged" in way:
                rarefy.rearrange(
                    model, pattern, sparsity, example_input=bundle.test_x[:2].float(), exclude=DENSE, seed=seed
                )
            share = kept_share(model, pattern, sparsity)
            options: dict[str, Any] = dict(sparsity=sparsity, allocation="uniform", pattern=pattern, exclude=DENSE)
            pruned = copy.deepcopy(model)
            rarefy.sparsify(pruned, "magnitude", **options).finalize()
            at_once = accuracy(pruned, bundle)
            train(
                model,
                bundle,
                tune,
                0.02,
                seed,
                lambda o, m=model, k=options: rarefy.sparsify(m, "magnitude", optimizer=o, **k),
            )
            tuned = accuracy(model, bundle)
            found[f"{way} {sparsity:.0%}"] = {"kept": share, "at once": at_once, "accuracy": tuned}
            print(
                f"seed {seed}: {way:22s} {sparsity:.0%}  kept {share:.4f}  at once {at_once:.4f}  tuned {tuned:.4f}",
                flush=True,
            )
    return found


def run_accuracy(name: str, seeds: list[int], epochs: int, tune: int, samples: int, tests: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    bundle = data.load(name, download=False)
    bundle = replace(bundle, train_x=bundle.train_x[:samples], train_y=bundle.train_y[:samples])
    bundle = replace(bundle, test_x=bundle.test_x[:tests], test_y=bundle.test_y[:tests])
    print(f"{bundle.note} {len(bundle.train_y)} images to train on, {len(bundle.test_y)} to test on")
    runs = [one_seed(bundle, seed, epochs, tune) for seed in seeds]
    print(
        f"\n{'way':28s} {'kept w^2':>10s} {'at once':>16s} {'fine-tuned':>16s}   (mean and range of {len(seeds)} seeds)"
    )
    for way in runs[0]:
        cells = []
        for key in ("kept", "at once", "accuracy"):
            values = [100 * run[way][key] for run in runs if key in run[way]]
            cells.append(f"{statistics.mean(values):.2f} ({max(values) - min(values):.2f})" if values else "")
        print(f"{way:28s} {cells[0]:>14s} {cells[1]:>14s} {cells[2]:>14s}")
    return {str(seed): run for seed, run in zip(seeds, runs, strict=True)}


# --- time --------------------------------------------------------------------------------------------------------------

SHAPES = (
    (64, 32, 1, 112),
    (128, 128, 1, 56),
    (256, 256, 1, 28),
    (512, 512, 1, 14),
    (1024, 1024, 1, 7),
    (128, 128, 3, 28),
)


def in_turns(ways: dict[str, Callable[[], object]], rounds: int = 80, seconds: float = 0.0006) -> dict[str, float]:
    """Return the least time of each way over many short samples; they take turns, so that a shared machine harms none."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    count = {}
    for way, run in ways.items():
        tries = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            tries.append(time.perf_counter() - start)
        count[way] = max(1, int(seconds / min(tries)))
    for _ in range(rounds):
        for way, run in ways.items():
            start = time.perf_counter()
            for _ in range(count[way]):
                run()
            times[way].append((time.perf_counter() - start) / count[way])
    return {way: min(t) for way, t in times.items()}


def run_time() -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    g, found = torch.Generator().manual_seed(0), {}
    for rows, cols, kernel, side in SHAPES:
        dense = torch.randn(rows, cols, kernel, kernel, generator=g)
        x = torch.randn(1, cols, side, side, generator=g)
        array, out = x.numpy(), np.empty((1, rows, side, side), np.float32)
        weights = {"all kept": dense}
        for sparsity in (0.3, 0.5, 0.7, 0.9):
            pattern = FilterGroup(16)
            weights[f"group16 {sparsity:.0%}"] = dense * pattern.project(
                dense.square(), pattern.keep(dense.shape, 1 - sparsity)
            )
        for sparsity in (0.3, 0.9):
            threshold = dense.abs().flatten().kthvalue(int(sparsity * dense.numel())).values
            weights[f"unstructured {sparsity:.0%}"] = dense * (dense.abs() > threshold)
        ways: dict[str, Callable[[], object]] = {}
        for way, weight in weights.items():
            if kernel == 1:
                layer = sparse_layers.sparse_pointwise_layer(weight, None, (side, side), threads=1)
            else:
                layer = sparse_layers.sparse_conv_layer(weight, None, (side, side), padding=kernel // 2, threads=1)
            layer.run([array], out, 1, 1)
            torch.testing.assert_close(
                torch.from_numpy(out), F.conv2d(x, weight, padding=kernel // 2), rtol=1e-3, atol=1e-3
            )
            ways[way] = partial(layer.run, [array], out, 1, 1)
        geometry = ([kernel // 2] * 2, [1, 1], [1, 1], 1)
        onednn = torch.ops.mkldnn._convolution_pointwise
        packed = torch.ops.mkldnn._reorder_convolution_weight(dense, *geometry, list(x.shape))
        ways["oneDNN dense"] = partial(onednn, x, packed, None, *geometry, "none", [], "")
        times = in_turns(ways)
        found[f"{rows}x{cols} {kernel}x{kernel} {side}x{side}"] = times
        whole = times["all kept"]
        cells = "  ".join(f"{way} {t * 1e6:.0f} us ({t / whole:.2f})" for way, t in times.items())
        print(f"{rows}x{cols} {kernel}x{kernel} at {side}x{side}: {cells}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("accuracy", "time"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--data", choices=("digits", "cifar10"), default="cifar10")
    parser.add_argument("--epochs", type=int, default=8, help="of the dense training")
    parser.add_argument("--tune", type=int, default=1, help="epochs of fine-tuning")
    parser.add_argument("--samples", type=int, default=5000, help="training images, the first ones")
    parser.add_argument("--tests", type=int, default=2000, help="test images, the first ones")
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    if o.part == "time":
        found: Any = run_time()
    else:
        found = run_accuracy(o.data, o.seeds, o.epochs, o.tune, o.samples, o.tests)
    if o.json:
        o.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
