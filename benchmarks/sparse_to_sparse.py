"""Methods that train sparse networks from the first step on, side by side on MNIST digits: accuracy, cost, weights tried.

    RAREFY_DATA=... .venv/bin/python benchmarks/sparse_to_sparse.py [--seeds 3] [--sparsities 0.95 0.98 0.99]
        [--methods set rigl ...] [--storage masked] [--epochs 15] [--json FILE]

The first 8,000 training and all test images; 784-300-100-10, ERK, SGD with learning rate 0.1 (no momentum, no weight decay),
batches of 100, updates every 25 steps (`deep-r`: at every step); all other options are the methods' defaults. One seed gives
the weights, the masks and the order of the batches; all methods of a seed begin with the same dense weights. Accuracy is
that of the last step. "moved" is the share of the last mask that was not in the first one; R_s the share of all weights
that were ever kept; training FLOPs are counted from the real masks, relative to dense training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.metrics import flops, training_flops

BATCH, EVERY = 100, 25
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "small-dense": ("small-dense", {}),
    "static": ("static", {}),
    "deep-r": ("deep-r", {}),
    "dsr": ("dsr", {"every": EVERY}),
    "set": ("set", {"every": EVERY}),
    "itop (random)": ("itop", {"every": EVERY}),
    "rigl": ("rigl", {"every": EVERY}),
    "itop (gradient)": ("itop", {"every": EVERY, "growth": "gradient"}),
    "srigl": ("srigl", {"every": EVERY}),
    "gse": ("gse", {"every": EVERY}),
    "gse (grabo)": ("gse", {"every": EVERY, "by": "grabo"}),
    "gse (uniform)": ("gse", {"every": EVERY, "by": "uniform"}),
    "top-kast": ("top-kast", {"every": EVERY}),
    "snfs": ("snfs", {"every": EVERY}),
}


def digits(count: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = rarefy.data.load("mnist", download=False)
    x, test_x = ((t.float() / 255 - data.mean[0]) / data.std[0] for t in (data.train_x[:count], data.test_x[:test]))
    return x, data.train_y[:count], test_x, data.test_y[:test]


def run(
    method: str,
    options: dict[str, Any],
    sparsity: float,
    seed: int,
    epochs: int,
    storage: str,
    data: tuple[Tensor, ...],
) -> dict[str, float]:
    x, y, test_x, test_y = data

    def build(width: float) -> nn.Module:
        torch.manual_seed(seed)
        return rarefy.models.build("lenet-300-100", width=width)

    if method != "dense":
        options = {**options, "sparsity": sparsity}
    made = rarefy.methods.make(method, **options)
    model = made.model(build)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = epochs * (len(x) // BATCH)
    own = {"storage": storage} if method not in ("dense", "small-dense") else {}
    sparse = rarefy.sparsify(model, made, optimizer=optimizer, total_steps=steps, seed=seed, **own)
    first, order = sparse.masks(), torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    seconds = time.perf_counter() - start
    last, cost, explored = sparse.masks(), sparse.training_cost(), sparse.explored()
    sparse.finalize()
    with torch.no_grad():
        accuracy = float((model.eval()(test_x).argmax(1) == test_y).double().mean())
    whole = 3 * flops(build(1.0), test_x[:1]).dense * steps * BATCH
    spent = training_flops(flops(model, test_x[:1]), cost, BATCH, steps=steps).total
    kept = sum(int(mask.sum()) for mask in last.values())
    return {
        "accuracy": 100 * accuracy,
        "sparsity": 1 - kept / sum(mask.numel() for mask in last.values()),
        "moved": sum(int((last[name] & ~first[name]).sum()) for name in last) / kept,
        "explored": explored,
        "training FLOPs": spent / whole,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.95, 0.98, 0.99])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--storage", choices=["masked", "compressed"], default="masked")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--test", type=int, default=10000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = digits(args.train, args.test)
    rows = []
    print("| sparsity | method | accuracy % | moved | R_s | training FLOPs | seconds |\n|---|---|---|---|---|---|---|")
    for sparsity in args.sparsities:
        for label in args.methods:
            method, options = METHODS[label]
            if method == "dense" and sparsity != args.sparsities[0]:
                continue
            runs = [run(method, options, sparsity, seed, args.epochs, args.storage, data) for seed in range(args.seeds)]
            rows.append({"method": label, "asked": sparsity, "runs": runs})
            mean = {key: statistics.mean(r[key] for r in runs) for key in runs[0]}
            spread = statistics.stdev(r["accuracy"] for r in runs) if len(runs) > 1 else 0.0
            level = "–" if method == "dense" else f"{100 * sparsity:g} %"
            print(
                f"| {level} | {label} | {mean['accuracy']:.2f} ± {spread:.2f} | {mean['moved']:.2f} | "
                f"{mean['explored']:.3f} | {mean['training FLOPs']:.4f} | {mean['seconds']:.1f} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(
            json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
