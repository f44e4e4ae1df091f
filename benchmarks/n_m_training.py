"""N:M training on small data: accuracy, how often masks flip (SAD), and the noise of the gradient, side by side.

    RAREFY_DATA=... python benchmarks/n_m_training.py [--dataset mnist] [--model mlp] [--methods ste sr-ste:refine=2e-3 ...]
        [--patterns 2:8 1:16] [--seeds 0 1 2] [--epochs 8] [--json FILE]

Defaults: what the papers expect, in docs/results/n-m.md: the first 8,000 training and 2,000 test images of MNIST, an MLP
784-128-128-10 whose first two layers are sparse, SGD 0.1 with a cosine, momentum 0.9, batch 100. A method is a name and its
options, NAME:OPTION=VALUE,OPTION=VALUE; "dense" is trained once. `--model` takes any of rarefy's networks as well (its last
layer stays dense); for whole tables of them see `rarefy compare --recipe n-m`.

Columns: accuracy of the last step on the test images; SAD, all mask bits flipped from step to step, summed; bits in which the
first and the last mask differ; bits in which the mask half way and the last differ; noise, the standard deviation of the loss's
gradient on pruned weights, mean over the second half. The JSON file also holds the share of mask bits that flip in a step, for
every 100 steps; `rarefy report` draws it for runs of `rarefy compare`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy import data, models
from rarefy.analysis import MaskHistory, churn
from rarefy.engine import Sparsifier

METHODS = [
    "ste",
    "sr-ste",
    "sr-ste:refine=2e-3",
    "bdwp",
    "pgf:recipe=mdgf-linear",
    "pgf:recipe=mdgf-exponential",
    "pgf:recipe=sdgf-stepwise",
    "pgf:recipe=mdgf-linear,gradient=scaled",
    "pgf:recipe=mdgf-exponential,gradient=scaled",
]
EVERY = 100  # steps between two entries of the log, and between the masks that are kept

Images = tuple[Tensor, Tensor]


def images(name: str, train: int, test: int) -> tuple[Images, Images]:
    """The first images of each part, with the training part's mean 0 and deviation 1."""
    bundle = data.load(name, download=False)
    x, y = bundle.train_x[:train].float(), bundle.test_x[:test].float()
    mean, std = x.mean(), x.std()
    return ((x - mean) / std, bundle.train_y[:train]), ((y - mean) / std, bundle.test_y[:test])


def network(name: str, shape: torch.Size) -> nn.Module:
    if name == "mlp":
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(shape), 128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
    known = models.options(name)
    small = {"patch": 7 if shape[-1] == 28 else 8, "dim": 64, "depth": 2, "heads": 4} if name == "vit" else {}
    return models.build(name, in_channels=shape[0], image_size=shape[-1] if "image_size" in known else None, **small)


def last_layer(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        try:
            options[key] = int(value) if value.isdigit() else float(value)
        except ValueError:
            options[key] = value
    return name, options


def noise(sparse: Sparsifier) -> float:
    """Standard deviation of the loss's gradient over the weights outside the N largest of M."""
    parts = []
    for layer in sparse.layers.values():
        gradient = layer.target.parameter.grad
        keep = layer.pattern.keep(layer.shape)
        if gradient is not None:
            parts.append(gradient[~layer.pattern.project(layer.trained().abs(), keep)])
    return float(torch.cat(parts).std()) if parts else float("nan")


def train(
    model_name: str, method: str, pattern: str | None, seed: int, parts: tuple[Images, Images], args: argparse.Namespace
) -> dict[str, Any]:
    (x, y), test = parts
    torch.manual_seed(seed)
    model = network(model_name, x.shape[1:])
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
    epoch = math.ceil(len(y) / args.batch)
    steps = args.epochs * epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sparse = None
    if pattern is not None:
        name, options = parsed(method)
        sparse = rarefy.sparsify(
            model,
            name,
            pattern=f"{pattern}t" if name == "t-mask" else pattern,
            optimizer=optimizer,
            exclude=last_layer(model),
            total_steps=steps,
            seed=seed,
            **options,
        )
    history, noises = MaskHistory(), []
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % epoch == 0:
            order = torch.randperm(len(y), generator=generator)
        if sparse is not None and step % EVERY == 0:
            history.record(step, sparse.masks())
        at = order[step % epoch * args.batch :][: args.batch]
        optimizer.zero_grad()
        F.cross_entropy(model(x[at]), y[at]).backward()
        if sparse is not None and step >= steps // 2 and (step - steps // 2) % 10 == 0:
            noises.append(noise(sparse))
        optimizer.step()
        schedule.step()
    result: dict[str, Any] = {"method": method, "pattern": pattern, "seed": seed, "steps": steps}
    if sparse is not None:
        history.record(steps, sparse.masks())
        sparse.finalize()
        turns, moves = churn(sparse.events), history.moves()
        result |= {
            "sparsity": sparse.sparsity,
            "sad": sum(turn.flips for turn in turns),
            "sad_first": moves[-1].sad_first,
            "sad_half": moves[len(moves) // 2 - 1].sad_last,
            "noise": statistics.fmean(noises),
            "rate": [[t.step, t.flips / sparse.numel / ((t.step - 1) % EVERY + 1)] for t in turns],
        }
    model.eval()
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(*(t.split(500) for t in test), strict=True))
    return {**result, "accuracy": 100 * right / len(test[1])}


def row(found: list[dict[str, Any]]) -> str:
    def mean(key: str, form: str) -> str:
        return form.format(statistics.fmean(r[key] for r in found)) if key in found[0] else "-"

    accuracies = [r["accuracy"] for r in found]
    spread = f" ± {statistics.stdev(accuracies):.1f}" if len(found) > 1 else ""
    cells = [found[0]["pattern"] or "-", found[0]["method"], f"{statistics.fmean(accuracies):.1f}{spread}"]
    cells += [
        mean("sad", "{:,.0f}"),
        mean("sad_first", "{:,.0f}"),
        mean("sad_half", "{:,.0f}"),
        mean("noise", "{:.2e}"),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--patterns", nargs="+", default=["2:8", "1:16"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = images(args.dataset, args.train, args.test)
    cases: list[tuple[str, str | None]] = [("dense", None)]
    cases += [(m, p) for p in args.patterns for m in args.methods if m != "dense"]
    results: list[dict[str, Any]] = []
    print(
        "| pattern | method | accuracy, % | SAD | first to last | half way to last | noise |\n|---|---|---|---|---|---|---|"
    )
    for method, pattern in cases:
        found = [train(args.model, method, pattern, seed, parts, args) for seed in args.seeds]
        results += found
        print(row(found), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
