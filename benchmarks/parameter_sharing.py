"""STABLE-RPS beside pruned and narrower networks at equal numbers of weights, and the effect of its gradient scaler.

    RAREFY_DATA=... python benchmarks/parameter_sharing.py memory [--data mnist] [--model lenet-300-100] [--epochs 5]
        [--compressions 4 16 64] [--seeds 3] [--out runs/parameter-sharing] [--threads 1]
    python benchmarks/parameter_sharing.py scale [--data digits] [--epochs 25] [--compression 10] [--seeds 3]

"memory" trains every method with 1/4, 1/16 and 1/64 of the weights and prints accuracy, trained numbers, and the bytes of
the smallest file format: a pruned network pays for its mask, a shared or narrow one does not. Hyperparameters are the
training room's defaults for all, and nothing is chosen by the test set. "scale" trains STABLE-RPS at several scales C of
its array, with the scaler and without. Run again, both go on where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rarefy.training.compare import compare
from rarefy.training.plan import CompareConfig

METHODS = ("dense", "small-dense", "static", "snip", "magnitude", "gradual", "stable-rps", "roast")


def results(folder: Path) -> list[dict[str, Any]]:
    """Return every finished run's result.json."""
    found = []
    for file in sorted(folder.glob("*/result.json")):
        result = json.loads(file.read_text())
        if result["status"] == "finished":
            found.append(result)
    return found


def spread(values: Sequence[float]) -> str:
    """Return "mean ± sample standard deviation" in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation}"


def memory(args: argparse.Namespace) -> None:
    """Compare at equal numbers of weights."""
    entries = [{"method": "stable-rps", "label": "roast"} if m == "roast" else {"method": m} for m in args.methods]
    config = CompareConfig.model_validate(
        {
            "methods": entries,
            "sparsities": [1 - 1 / c for c in args.compressions],
            "seeds": args.seeds,
            "base": {
                "data": args.data,
                "model": args.model,
                "epochs": args.epochs,
                "limit_train": args.limit_train,
                "eval_every": 0,
                "device": args.device,
            },
            "overrides": {
                label: {"method_options": options}
                for label, options in {
                    "magnitude": {"start": 0.5},  # prune a half-trained network, train the rest of it
                    "roast": {"mapping": "tile", "tile": args.tile},
                }.items()
                if label in args.methods
            },
        }
    )
    outcome = compare(config, args.out, threads=args.threads)
    for name, why in outcome.failed.items():
        print(f"{name} failed: {why.splitlines()[-1]}")
    found = results(args.out)
    levels = sorted({r["sparsity_asked"] or 0.0 for r in found})
    print("| weights | method | accuracy % | parameters | smallest file | forward FLOPs of dense | seconds |")
    print("|---|---|---|---|---|---|---|")
    for level in levels:
        for method in args.methods:
            rows = [r for r in found if r["label"] == method and (r["sparsity_asked"] or 0.0) == level]
            if not rows:
                continue
            size = statistics.mean(min(r["storage_bytes"][k] for k in ("bitmask", "csr")) for r in rows)
            print(
                f"| {'all' if level == 0 else f'1/{1 / (1 - level):.0f}'} | {method} | {spread([r['accuracy'] for r in rows])} "
                f"| {statistics.mean(r['parameters'] for r in rows):,.0f} | {size / 1000:,.1f} kB "
                f"| {100 * statistics.mean(r['flops'] / r['flops_dense'] for r in rows):.1f} % "
                f"| {statistics.mean(r['seconds'] for r in rows):.1f} |"
            )


def scale(args: argparse.Namespace) -> None:
    """Train at several scales of the array."""
    scales, scalers = (0.001, 0.01, 0.04, 0.4, 4.0), ("none", "v1", "v5")
    labels = {f"{scaler} C={c:g}": {"scaler": scaler, "init_std": c} for scaler in scalers for c in scales}
    config = CompareConfig.model_validate(
        {
            "methods": [{"method": "stable-rps", "label": label} for label in labels],
            "sparsities": [1 - 1 / args.compression],
            "seeds": args.seeds,
            "base": {
                "data": args.data,
                "model": args.model,
                "epochs": args.epochs,
                "eval_every": 0,
                "device": args.device,
                "lr_schedule": "constant",
                "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0},
            },
            "overrides": {label: {"method_options": options} for label, options in labels.items()},
        }
    )
    outcome = compare(config, args.out, threads=args.threads)
    found = results(args.out)
    print("| scaler | " + " | ".join(f"C = {c:g}" for c in scales) + " |")
    print("|---" * (1 + len(scales)) + "|")
    for scaler in scalers:
        cells = []
        for c in scales:
            label = f"{scaler} C={c:g}"
            rows = [r["accuracy"] for r in found if r["label"] == label]
            lost = sum(name.startswith(label) for name in outcome.failed)
            cells.append((spread(rows) if rows else "-") + (f" ({lost} diverged)" if lost else ""))
        print(f"| {scaler} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for run, data, epochs in ((memory, "mnist", 5), (scale, "digits", 25)):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--data", default=data)
        command.add_argument("--model", default="lenet-300-100")
        command.add_argument("--epochs", type=int, default=epochs)
        command.add_argument("--seeds", type=int, default=3)
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--device", default="cpu")
        command.add_argument("--out", type=Path, default=Path("runs") / f"parameter-sharing-{run.__name__}")
        if run is memory:
            command.add_argument("--compressions", type=float, nargs="+", default=[4, 16, 64])
            command.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
            command.add_argument("--limit-train", type=int)
            command.add_argument("--tile", type=int, default=16)
        else:
            command.add_argument("--compression", type=float, default=10)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
