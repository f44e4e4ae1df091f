"""Sparse-IFT beside the dense network at equal FLOPs: every transformation, at every sparsity.

    RAREFY_DATA=... python benchmarks/sparse_ift.py networks [--data cifar10] [--model resnet-20] [--width 0.5]
        [--epochs 100] [--batch 100] [--limit-train N] [--sparsities 0.5 0.75 0.9] [--kinds wide parallel factorized doped]
        [--masks rigl] [--every 100] [--seeds 3] [--augment] [--out runs/sparse-ift] [--threads 1]
    RAREFY_DATA=... python benchmarks/sparse_ift.py perceptron [--hidden 8] [--epochs 10] [--seeds 4]

"networks" trains a narrow network through the training room, with the hyperparameters of the dense one for all. "perceptron"
trains 784-H-H-10 with batch norms on 8,000 images of MNIST, tested on 2,000, with static, SET and RigL masks on its wide
form. Both print accuracy, FLOPs as counted from the final masks, and seconds: equal FLOPs are not equal seconds, for masked
weights are computed densely. Nothing is chosen by the test set.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from parameter_sharing import results, spread
from rarefy import data
from rarefy.methods import SparseIFT
from rarefy.metrics import flops
from rarefy.nn.iso_flop import KINDS
from rarefy.training.compare import compare
from rarefy.training.plan import CompareConfig

HEAD = (
    "| sparsity | network | accuracy % | FLOPs of dense | weights kept | weights held | seconds |\n" + "|---" * 7 + "|"
)


def networks(args: argparse.Namespace) -> None:
    """Compare whole networks through the training room."""
    options = {"masks": args.masks}
    if args.masks in ("rigl", "set"):
        options["mask_options"] = {"every": args.every}
    config = CompareConfig.model_validate(
        {
            "methods": ["dense", *({"method": "sparse-ift", "label": kind} for kind in args.kinds)],
            "sparsities": args.sparsities,
            "seeds": args.seeds,
            "base": {
                "data": args.data,
                "model": args.model,
                "width": args.width,
                "model_options": {"shortcut": "conv"} if args.model.startswith("resnet-") else {},
                "epochs": args.epochs,
                "augment": args.augment,
                "batch_size": args.batch,
                "limit_train": args.limit_train,
                "eval_every": 0,
                "device": args.device,
                "optimizer": {"name": "sgd", "lr": args.lr, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
            },
            "overrides": {kind: {"method_options": {"kind": kind, **options}} for kind in args.kinds},
        }
    )
    outcome = compare(config, args.out, threads=args.threads)
    for name, why in outcome.failed.items():
        print(f"{name} failed: {why.splitlines()[-1]}")
    found = results(args.out)
    print(HEAD)
    for level in [0.0, *args.sparsities]:
        for label in args.kinds if level else ["dense"]:
            rows = [r for r in found if r["label"] == label and (r["sparsity_asked"] or 0.0) == level]
            if rows:
                print_row(
                    level,
                    label,
                    [r["accuracy"] for r in rows],
                    [r["flops"] / r["flops_dense"] for r in rows],
                    sum(layer["kept"] for layer in rows[0]["layers"]),
                    sum(layer["numel"] for layer in rows[0]["layers"]),
                    [r["seconds"] for r in rows],
                )


def print_row(
    level: float, label: str, accuracy: list[float], ratio: list[float], kept: int, held: int, seconds: list[float]
) -> None:
    """Print one line of the table."""
    print(
        f"| {level:g} | {label} | {spread(accuracy)} | {100 * statistics.mean(ratio):.2f} % | {kept:,} | {held:,} "
        f"| {statistics.mean(seconds):.1f} |",
        flush=True,
    )


def perceptron(args: argparse.Namespace) -> None:
    """Train the narrow perceptron and its wide forms."""
    torch.set_num_threads(args.threads)
    bundle = data.load("mnist")
    x = (bundle.train_x.float().flatten(1) / 255 - 0.1307) / 0.3081
    train, test = (x[:8000], bundle.train_y[:8000]), (x[8000:10_000], bundle.train_y[8000:10_000])
    print(HEAD)
    plans: list[tuple[str, SparseIFT | None]] = [("dense", None)]
    for sparsity in args.sparsities:
        plans += [
            (
                f"wide, {m}",
                SparseIFT(kind="wide", sparsity=sparsity, masks=m, mask_options=_updates(m), dense_stem=False),
            )
            for m in ("static", "set", "rigl")
        ]
        plans += [
            (f"{kind}, rigl", SparseIFT(kind=kind, sparsity=sparsity, mask_options=_updates("rigl"), dense_stem=False))
            for kind in KINDS[1:]
        ]
    for label, method in plans:
        runs = [one_perceptron(method, args.hidden, args.epochs, seed, train, test) for seed in range(args.seeds)]
        accuracy, ratio, kept, held, seconds = map(list, zip(*runs, strict=True))
        print_row(0.0 if method is None else method.sparsity, label, accuracy, ratio, kept[0], held[0], seconds)


def _updates(masks: str) -> dict[str, Any]:
    return {} if masks == "static" else {"every": 25}


def one_perceptron(
    method: SparseIFT | None,
    hidden: int,
    epochs: int,
    seed: int,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
) -> tuple[float, float, int, int, float]:
    """Train one; returns accuracy, FLOPs over the dense network's, weights kept, weights held, seconds."""

    def build(width: float) -> nn.Module:
        torch.manual_seed(seed)
        h = int(hidden * width)
        return nn.Sequential(
            nn.Linear(784, h), nn.BatchNorm1d(h), nn.ReLU(),
            nn.Linear(h, h), nn.BatchNorm1d(h), nn.ReLU(), nn.Linear(h, 10),
        )  # fmt: skip

    example = torch.zeros(1, 784)
    model = build(1.0) if method is None else method.model(build, example)
    steps, batch = epochs * (len(train[0]) // 100), 100
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sparse = rarefy.sparsify(model, method or "dense", optimizer=optimizer, total_steps=steps, seed=seed)
    order = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    for _ in range(epochs):
        for places in torch.randperm(len(train[0]), generator=order).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][places]), train[1][places]).backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - begin
    sparse.finalize().eval()
    with torch.no_grad():
        accuracy = float((model(test[0]).argmax(1) == test[1]).float().mean())
    ratio = flops(model, example, sparse.masks()).sparse / flops(build(1.0), example).dense
    return accuracy, ratio, sparse.nnz, sparse.numel, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for run in (networks, perceptron):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9])
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--epochs", type=int, default=100 if run is networks else 10)
        command.add_argument("--seeds", type=int, default=3 if run is networks else 4)
        if run is perceptron:
            command.add_argument("--hidden", type=int, default=8)
            continue
        command.add_argument("--data", default="cifar10")
        command.add_argument("--model", default="resnet-20")
        command.add_argument("--width", type=float, default=0.5)
        command.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
        command.add_argument("--masks", default="rigl")
        command.add_argument("--every", type=int, default=100)
        command.add_argument("--batch", type=int, default=100)
        command.add_argument("--lr", type=float, default=0.1)
        command.add_argument("--augment", action="store_true")
        command.add_argument("--limit-train", type=int)
        command.add_argument("--device", default="cpu")
        command.add_argument("--out", type=Path, default=Path("runs/sparse-ift"))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
