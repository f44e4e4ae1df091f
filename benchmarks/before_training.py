"""Pruning before training, on small networks: who keeps every layer alive, and how far random pruning is from dense.

    python benchmarks/before_training.py criteria [--seeds 0 1 2] [--densities 0.1 0.03 0.01 0.005] [--clip 1]
    python benchmarks/before_training.py widths [--data digits] [--widths 8 16 32 64 128 256] [--epochs 25] [--seeds 0 1 2 3]

"criteria": a ReLU MLP 64-50x8-10 without normalisation on scikit-learn's digits (He initialisation, zero biases). Kept weights
of the thinnest layer at each density, and the share of all kept weights that lie on a path from an input to an output (those
with a synaptic flow); then the gradient's norm at initialisation and the test accuracy after training at the first density,
beside the sanity ablations of each criterion: its layer densities at random positions ("shuffled"), fresh weights under its
mask ("fresh weights"), and its worst weights instead of its best ("inverted"). "widths": an MLP in-w-w-10, dense and randomly
pruned to density 0.1, evaluated as the random-pruning paper does: test accuracy, ECE, NLL, detection of foreign images (AUROC),
accuracy under FGSM and PGD at 8/255, and the gradient's norm at initialisation. Scores look at 100 training images, 10 of each
class, in two halves.

SGD, learning rate 0.1 with a cosine, Nesterov momentum 0.9, weight decay 1e-4, batches of 100: the defaults of `rarefy train`.
Nothing is chosen on the test set. Means and standard deviations over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.data import Batches, DataBundle, eval_batches, load, train_batches
from rarefy.engine import Method, dead_units
from rarefy.engine.synaptic_flow import SynapticFlow
from rarefy.methods import SNIP, GraSP, Magnitude, RandomPruning, Static, SynFlow
from rarefy.methods.snip import BeforeTraining, Scorer
from rarefy.metrics import (
    accuracy,
    adversarial_accuracy,
    ece,
    fgsm,
    gradient_norm,
    mean,
    nll,
    ood_auroc,
    pgd,
    pixel_box,
    sd,
)
from rarefy.scores import synflow

EPS = 8 / 255
Batch = tuple[Tensor, Tensor]


def mlp(widths: list[int], seed: int) -> nn.Sequential:
    """Build a ReLU MLP with He initialisation and zero biases."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(inputs, outputs)]
        reset(layers[-1])
    return nn.Sequential(*layers)


def reset(layer: nn.Module) -> None:
    """Draw a linear layer's weights anew."""
    assert isinstance(layer, nn.Linear)
    nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(layer.bias)


def calibration(bundle: DataBundle) -> list[Batch]:
    """Return 100 normalised training images, the first 10 of each class, in two halves with 5 of each."""
    places = [(bundle.train_y == c).nonzero().flatten()[:10] for c in range(bundle.num_classes)]
    halves = [torch.cat([p[:5] for p in places]), torch.cat([p[5:] for p in places])]
    scale: dict[str, Any] = dict(mean=bundle.mean, std=bundle.std)
    return [next(iter(Batches(bundle.train_x[h], bundle.train_y[h], 50, shuffle=False, **scale))) for h in halves]


def sparse_net(
    widths: list[int], method: Method, bundle: DataBundle, seed: int, fresh: bool = False
) -> tuple[nn.Sequential, Any]:
    """Build and prune a network; `fresh`: draw its weights anew under the mask."""
    net = mlp(widths, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lost layers and dead units are what the tables show
        sparse = rarefy.sparsify(net, method, calibration=calibration(bundle), seed=seed)
    if fresh:
        torch.manual_seed(1000 + seed)
        for layer in sparse.layers.values():
            reset(layer.module)
            layer.enforce()
    return net, sparse


def train(
    net: nn.Module, sparse: rarefy.Sparsifier, bundle: DataBundle, epochs: int, seed: int, clip: float | None = None
) -> None:
    """Train with the defaults of `rarefy train`, and the gradient's norm clipped where asked."""
    batches = train_batches(bundle, 100, seed, augment=None)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            sparse.step()
            schedule.step()
    assert all(not layer.weight()[~layer.mask()].any() for layer in sparse.layers.values())


@torch.no_grad()
def logits(net: nn.Module, batches: Any) -> tuple[Tensor, Tensor]:
    """Return all outputs and labels of a loader."""
    found = [(net(x), y) for x, y in batches]
    return torch.cat([out for out, _ in found]), torch.cat([y for _, y in found])


def spread(values: list[float], scale: float = 100, digits: int = 1) -> str:
    """Write mean and standard deviation."""
    around = sd(values)
    said = f"{scale * mean(values):.{digits}f}"
    return said if around is None else f"{said} ± {scale * around:.{digits}f}"


# --- which criterion keeps every layer alive ------------------------------------------------------------------------

DEEP = [64, *[50] * 8, 10]


def inverted(cls: type[BeforeTraining]) -> type[BeforeTraining]:
    """Return a criterion that keeps what the given one would remove first."""

    class Inverted(cls):  # type: ignore[misc, valid-type]
        def scorer(self, sparse: rarefy.Sparsifier) -> Scorer:
            score = super().scorer(sparse)
            return lambda: {name: -s for name, s in score().items()}

    return Inverted


def criteria(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print both tables of the criteria; return what was measured."""
    bundle, rows = load("digits"), []
    ways: dict[str, Callable[[float], Method]] = {
        "synflow, 100 rounds": lambda s: SynFlow(sparsity=s),
        "synflow, 1 round": lambda s: SynFlow(sparsity=s, rounds=1),
        "snip": lambda s: SNIP(sparsity=s),
        "snip, 100 rounds": lambda s: SNIP(sparsity=s, rounds=100),
        "grasp": lambda s: GraSP(sparsity=s),
        "magnitude": lambda s: Magnitude(sparsity=s),
        "random-pruning, uniform": lambda s: RandomPruning(sparsity=s, allocation="uniform"),
        "random-pruning, er": lambda s: RandomPruning(sparsity=s, allocation="er"),
        "static, er": lambda s: Static(sparsity=s, allocation="er"),
    }
    print("Kept weights of the thinnest layer, one number per seed; kept weights on a path, %\n")
    print(
        f"| criterion | {' | '.join(f'density {d:g}' for d in args.densities)} |\n|{'---|' * (1 + len(args.densities))}"
    )
    for name, make in ways.items():
        cells = []
        for density in args.densities:
            nets = [sparse_net(DEEP, make(1 - density), bundle, seed)[1] for seed in args.seeds]
            thinnest = [min(layer.nnz for layer in sparse.layers.values()) for sparse in nets]
            on_a_path = [reached(sparse, bundle) for sparse in nets]
            cells.append(f"{', '.join(map(str, thinnest))}; {100 * mean(on_a_path):.0f} %")
            rows.append(
                {"table": "thinnest", "criterion": name, "density": density, "kept": thinnest, "path": on_a_path}
            )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    density = args.densities[0]
    print(f"\nTest accuracy, %, at density {density:g} after {args.epochs} epochs\n")
    print("| criterion | gradient norm | as it is | shuffled | fresh weights | inverted |\n|---|---|---|---|---|---|")
    for name, make in ways.items():
        method = make(1 - density)
        runs: dict[str, tuple[Method, bool] | None] = dict.fromkeys(
            ("as it is", "shuffled", "fresh weights", "inverted")
        )
        runs["as it is"], runs["fresh weights"] = (method, False), (method, True)
        if isinstance(method, BeforeTraining):
            runs["inverted"] = inverted(type(method))(sparsity=1 - density, rounds=method.rounds), False
        if not isinstance(method, Static):
            runs["shuffled"] = method, False
        pruned = [sparse_net(DEEP, method, bundle, seed) for seed in args.seeds]
        norms = [gradient_norm(net, calibration(bundle), masks=sparse.masks()) for net, sparse in pruned]
        rows.append({"table": "gradient", "criterion": name, "norm": norms})
        cells = [f"{mean(norms):.2g}"]
        for ablation, run in runs.items():
            if run is None:
                cells.append("–")
                continue
            found = []
            for seed in args.seeds:
                net, sparse = sparse_net(DEEP, run[0], bundle, seed, fresh=run[1])
                if ablation == "shuffled":
                    net, sparse = shuffled(sparse, bundle, seed)
                train(net, sparse, bundle, args.epochs, seed, args.clip)
                found.append(accuracy(*logits(net, eval_batches(bundle))))
            cells.append(spread(found))
            rows.append({"table": "accuracy", "criterion": name, "ablation": ablation, "accuracy": found})
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return rows


def reached(sparse: rarefy.Sparsifier, bundle: DataBundle) -> float:
    """Return the share of kept weights that something flows through from the inputs to the outputs."""
    sparse.calibration = calibration(bundle)
    weights, gradient = SynapticFlow(sparse).gradients()
    return sum(int((synflow(weights[n], gradient[n]) > 0).sum()) for n in weights) / sparse.nnz


def shuffled(sparse: rarefy.Sparsifier, bundle: DataBundle, seed: int) -> tuple[nn.Sequential, Any]:
    """Prune the same first weights again, at random positions in the layer densities of a mask."""
    ratios = {name: layer.sparsity for name, layer in sparse.layers.items()}
    return sparse_net(DEEP, RandomPruning(allocation=ratios), bundle, seed)


# --- how far random pruning is from dense ---------------------------------------------------------------------------


def widths(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print one table of random pruning beside dense; return what was measured."""
    bundle = load(args.data)
    size, rows = bundle.image_size**2 * bundle.in_channels, []
    foreign = {
        "noise": torch.randint(
            0, 256, bundle.test_x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        )
    }
    for name in args.foreign:
        foreign[name] = load(name).test_x
    ways: dict[str, Method] = {
        "dense": rarefy.methods.Dense(),
        **{rule: RandomPruning(sparsity=0.9, allocation=rule) for rule in args.rules},
    }
    head = ["width", "densities", "accuracy %", "gap to dense", "ECE %", "NLL"]
    head += [f"AUROC {name} %" for name in foreign] + ["FGSM %", "PGD %", "gradient norm", "dead units %"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for width in args.widths:
        dense: list[float] = []
        for name, method in ways.items():
            found = [
                measure(method, [size, width, width, 10], bundle, foreign, args.epochs, seed) for seed in args.seeds
            ]
            rows += [
                {"width": width, "densities": name, "seed": s, **f} for s, f in zip(args.seeds, found, strict=True)
            ]
            columns = {key: [one[key] for one in found] for key in found[0]}
            dense = columns["accuracy"] if name == "dense" else dense
            gap = [a - b for a, b in zip(dense, columns["accuracy"], strict=True)]
            cells = [str(width), name, spread(columns["accuracy"]), spread(gap) if name != "dense" else "–"]
            cells += [
                spread(columns["ece"]),
                spread(columns["nll"], 1, 2),
                *(spread(columns[f"auroc {f}"]) for f in foreign),
            ]
            cells += [
                spread(columns["fgsm"]),
                spread(columns["pgd"]),
                spread(columns["gradient"], 1, 2),
                spread(columns["dead"], 100, 0),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    return rows


def measure(
    method: Method, sizes: list[int], bundle: DataBundle, foreign: dict[str, Tensor], epochs: int, seed: int
) -> dict[str, float]:
    """Prune, train and evaluate one network."""
    net, sparse = sparse_net(sizes, method, bundle, seed)
    first = gradient_norm(net, calibration(bundle), masks=sparse.masks())
    dead = sum(d.outputs for d in dead_units(sparse.layers.values())) / sum(sizes[1:])
    train(net, sparse, bundle, epochs, seed)
    inside, labels = logits(net, eval_batches(bundle))
    result = {
        "accuracy": accuracy(inside, labels),
        "ece": ece(inside, labels, logits=True),
        "nll": nll(inside, labels, logits=True),
    }
    for name, images in foreign.items():
        batches = Batches(
            images, torch.zeros(len(images), dtype=torch.int64), 500, shuffle=False, mean=bundle.mean, std=bundle.std
        )
        result[f"auroc {name}"] = ood_auroc(inside, logits(net, batches)[0])
    box = pixel_box(EPS, bundle.mean, bundle.std)
    result["fgsm"] = adversarial_accuracy(net, eval_batches(bundle), partial(fgsm, box=box))
    draw = torch.Generator().manual_seed(seed)
    result["pgd"] = adversarial_accuracy(net, eval_batches(bundle), partial(pgd, box=box, generator=draw))
    assert all(math.isfinite(value) for value in result.values())
    return {**result, "gradient": first, "dead": dead}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("criteria")
    one.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.03, 0.01, 0.005])
    one.add_argument("--epochs", type=int, default=25)
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--clip", type=float, help="clip the gradient's norm while training")
    one.set_defaults(run=criteria)
    two = parts.add_parser("widths")
    two.add_argument("--data", default="digits")
    two.add_argument("--foreign", nargs="*", default=[], help="data sets of the same image shape, beside noise")
    two.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    two.add_argument("--rules", nargs="+", default=["uniform", "er", "synflow"])
    two.add_argument("--epochs", type=int, default=25)
    two.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    two.set_defaults(run=widths)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = args.run(args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
