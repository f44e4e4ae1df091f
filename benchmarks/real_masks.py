"""The sparse products on masks of really pruned networks, and on random ones: one thread, packing apart.

    RAREFY_DATA=../shared/data python benchmarks/real_masks.py --json before.json
    RAREFY_DATA=../shared/data python benchmarks/real_masks.py --against before.json

Weights are taken as matrices [out, in * positions] times the columns that they meet in their network (224 x 224 images, batch
1): SqueezeNet of Deep Compression (33 % kept in its 3 x 3 layers), LeNet-300-100 of Dynamic Network Surgery (2 % kept; 128
samples), CIFAR-10 ResNet-20 pruned here by magnitude. To see what a change of the packing gives, run it at both commits on a
quiet machine. Each time is the least of nine samples; every product is checked against the dense one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rarefy import models
from rarefy.kernels import sparse_layers

PIXELS = {"fire2": 3025, "fire3": 3025, "fire4": 3025, "fire5": 729, "fire6": 729, "fire7": 729, "fire8": 729}
RANDOM = ((512, 512, 784), (256, 256, 784), (128, 64, 3136), (1024, 1024, 196))


def pruned(weight: Tensor, sparsity: float) -> Tensor:
    threshold = weight.abs().flatten().kthvalue(int(sparsity * weight.numel())).values
    return weight * (weight.abs() > threshold)


def cases(data: Path) -> Iterator[tuple[str, Tensor, int]]:
    """Yield a name, a weight [rows, cols] and a number of columns."""
    squeeze = np.load(data / "weights/squeezenet-deep-compression/decoded.npz")
    for name in squeeze.files:
        if squeeze[name].ndim == 4 and np.count_nonzero(squeeze[name]) < 0.9 * squeeze[name].size:
            yield (
                f"SqueezeNet {name}",
                torch.from_numpy(squeeze[name]).float().flatten(1),
                PIXELS.get(name.split("/")[0], 169),
            )
    lenet = models.load_published("lenet-300-100-mnist-pruned")
    for name, p in lenet.named_parameters():
        if p.ndim == 2:
            yield f"LeNet {name}", p.detach(), 128
    resnet = models.load_published("resnet-20-cifar10")
    for stage, pixels in (("layer1", 1024), ("layer2", 256), ("layer3", 64)):
        for sparsity in (0.8, 0.9):
            weight = resnet.get_parameter(f"{stage}.0.conv2.weight").detach().flatten(1)
            yield f"ResNet-20 {stage}.0.conv2 {sparsity:.0%}", pruned(weight, sparsity), pixels
    g = torch.Generator().manual_seed(0)
    for rows, cols, pixels in RANDOM:
        for sparsity in (0.5, 0.8, 0.9, 0.95):
            mask = torch.rand(rows, cols, generator=g) > sparsity
            yield f"random {rows}x{cols}x{pixels} {sparsity:.0%}", torch.randn(rows, cols, generator=g) * mask, pixels


def least(run: Callable[[], object], samples: int = 9, seconds: float = 0.004) -> float:
    found, times = [], 1
    for _ in range(samples + 1):
        start = time.perf_counter()
        for _ in range(times):
            run()
        found.append((time.perf_counter() - start) / times)
        times = max(1, int(seconds / found[-1]))
    return min(found[1:])


def measure(weight: Tensor, pixels: int) -> dict[str, float]:
    x = torch.randn(1, weight.shape[1], pixels)
    array, out = x.numpy(), np.empty((1, weight.shape[0], pixels), np.float32)
    made = [time.perf_counter()]
    for _ in range(3):
        layer = sparse_layers.sparse_pointwise_layer(weight, None, (1, pixels), threads=1)
        made.append(time.perf_counter())
    seconds = least(lambda: layer.run([array], out, 1, 1))
    torch.testing.assert_close(torch.from_numpy(out)[0], weight @ x[0], rtol=1e-3, atol=1e-3)
    return {
        "seconds": seconds,
        "packing": min(b - a for a, b in itertools.pairwise(made)),
        "bytes": layer.bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the times here")
    parser.add_argument(
        "--against", type=Path, nargs="+", help="times of another commit, to compare with (the least counts)"
    )
    options = parser.parse_args()
    if "RAREFY_DATA" not in os.environ:
        raise SystemExit("set RAREFY_DATA to a folder with weights/squeezenet-deep-compression and weights/dns-lenet")
    torch.set_num_threads(1)
    before = [json.loads(path.read_text()) for path in options.against or ()]
    found = {}
    for name, weight, pixels in cases(Path(os.environ["RAREFY_DATA"])):
        found[name] = measure(weight, pixels)
        mine, kept = found[name], float((weight != 0).float().mean())
        line = f"{name:34s} kept {kept:4.0%}  {mine['seconds'] * 1e6:8.1f} us  packing {mine['packing'] * 1e3:6.2f} ms"
        if before:
            old = {key: min(b[name][key] for b in before) for key in mine}
            line += f"  before {old['seconds'] * 1e6:8.1f} us ({old['seconds'] / mine['seconds']:.3f}x)"
            line += f"  {old['packing'] * 1e3:6.2f} ms  bytes {mine['bytes'] / old['bytes']:.3f}"
        print(line)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
