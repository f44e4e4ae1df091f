"""Where a published network can be pruned: sensitivity by layer and by coupled group, and what pruning leaves effective.

    RAREFY_DATA=... python benchmarks/sensitivity.py [--net resnet-20-cifar10] [--images 1000]
        [--parts weights channels paths] [--json FILE]

Accuracy on the first test images, without any training after the pruning. Three parts:
weights   each layer alone, smallest |w| first;
channels  (residual networks) output channels of smallest summed |w|: each convolution that writes to a residual stage
          alone, all of a stage together, and the inner channels of each block with what reads them (an exact removal);
paths     all layers together, by global magnitude and at random (ERK): sparsity, effective sparsity, dead channels, and
          the paths from input to output that are left of the dense network's.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rarefy
from rarefy import data, models
from rarefy.analysis import Member, Sensitivity, effective, path_count, sensitivity

WEIGHTS = (0.5, 0.8, 0.9, 0.95)
CHANNELS = (0.125, 0.25)
GLOBAL = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998)


def images(name: str, count: int) -> tuple[Tensor, Tensor]:
    """The first test images, prepared as the weights' publisher says."""
    entry = models.PUBLISHED[name]
    bundle = data.load(entry.dataset, download=False)
    x, y = bundle.test_x[:count].float(), bundle.test_y[:count].long()
    if entry.dataset == "mnist":
        return x / 256, y
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (x / 255 - mean) / std, y


def residual_groups(net: nn.Module) -> dict[str, list[Member]]:
    """Writers of each stage of a CIFAR ResNet, alone and together, and the inner channels of each block."""
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    stages: dict[str, list[Member]] = {}
    for name in names:
        if found := re.fullmatch(r"layer(\d)\.\d\.conv2", name):
            stages.setdefault(f"stage {found[1]}, all writers", []).append(name)
    if not stages:
        return {}
    stages["stage 1, all writers"].insert(0, "conv1")
    alone: dict[str, list[Member]] = {str(name): [name] for writers in stages.values() for name in writers}
    inner: dict[str, list[Member]] = {
        f"inside {name.removesuffix('.conv1')}": [name, (name.replace("conv1", "conv2"), 1)]
        for name in names
        if name.endswith(".conv1")
    }
    return {**stages, **alone, **inner}


def table(found: Sensitivity) -> None:
    first = next(iter(found.curves.values())).points
    print(f"\nas it is: {100 * found.baseline:.1f} %. Most sensitive first.\n")
    print(f"| layer or group | weights | {' | '.join(f'{100 * p.asked:g} %' for p in first)} |")
    print(f"|---|---|{'---|' * len(first)}")
    for name in found.order():
        cells = " | ".join(f"{100 * point.value:.1f}" for point in found.curves[name].points)
        print(f"| {name} | {found.curves[name].numel:,} | {cells} |")


def left_effective(net: nn.Module, x: Tensor, evaluate: Callable[[nn.Module], float]) -> list[dict[str, Any]]:
    rows = []
    dense = path_count(net, x[:1])
    for method, options in (("magnitude", {}), ("static", {"init": "dense"})):
        for level in GLOBAL:
            pruned = copy.deepcopy(net)
            sparse = rarefy.sparsify(pruned, method, sparsity=level, **options)
            found = effective(pruned, x[:1], sparse.masks())
            units = sum(layer.units for layer in found.layers.values())
            paths = path_count(pruned, x[:1], sparse.masks())
            rows.append({
                "method": method, "sparsity": found.sparsity, "effective sparsity": found.effective_sparsity,
                "kept": found.kept, "effective": found.effective, "dead units": found.dead, "units": units,
                "collapsed": list(found.collapsed), "log10 share of paths": math.log10(paths / dense) if paths else None,
                "accuracy": evaluate(pruned),
            })  # fmt: skip
    return rows


def show_paths(rows: list[dict[str, Any]]) -> None:
    print(
        "\n| masks | sparsity | effective sparsity | kept | effective | dead units | paths, log10 of dense | accuracy % |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        share = "none left" if row["log10 share of paths"] is None else f"{row['log10 share of paths']:.1f}"
        print(
            f"| {row['method']} | {100 * row['sparsity']:.2f} % | {100 * row['effective sparsity']:.2f} % | {row['kept']:,} | "
            f"{row['effective']:,} | {row['dead units']} of {row['units']} | {share} | {100 * row['accuracy']:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet-20-cifar10", choices=[*models.PUBLISHED])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--parts", nargs="+", default=["weights", "channels", "paths"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    net = models.load_published(args.net)
    x, y = images(args.net, args.images)

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        return sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(250), y.split(250), strict=True)) / len(
            y
        )

    result: dict[str, Any] = {}
    if "weights" in args.parts:
        weights = sensitivity(net, accuracy, sparsities=WEIGHTS)
        print("\nWeights of one layer")
        table(weights)
        result["weights"] = weights.to_dict()
    if "channels" in args.parts and (groups := residual_groups(net)):
        channels = sensitivity(net, accuracy, sparsities=CHANNELS, groups=groups, pattern="row")
        print("\nOutput channels")
        table(channels)
        result["channels"] = channels.to_dict()
    if "paths" in args.parts:
        result["paths"] = rows = left_effective(net, x, accuracy)
        show_paths(rows)
    print(f"\n{time.process_time() - start:.0f} s of one thread")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
