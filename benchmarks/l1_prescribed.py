"""l1 with prescribed counts on the 8x8 digits: how many solves each target takes, and what one lambda for all layers cannot do.

    python benchmarks/l1_prescribed.py [--seed 0] [--every 1500] [--solves 12] [--refit 1500]

64-32-10, full batches, SGD 0.5. Targets are shares of each layer's weights. "On support" is the median of |g| / lambda there, 1
at a solution; the residual is the largest departure from the condition |g| = lambda on the support and <= lambda off it, in
units of lambda. Kept: non-zeros after the refit. Accuracy on 500 digits: of the solution, after the exact number is kept, and
after a refit without the penalty. The last line: the published update rule alone, unguarded.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.engine import Method, Sparsifier
from rarefy.engine.calibration import mean_gradients
from rarefy.engine.rewinding import rewind, snapshot, start_afresh
from rarefy.penalties import L1

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def digits() -> Data:
    """Return training and test digits as rows in [0, 1], with labels."""
    bundle = rarefy.data.load("digits")
    train, test = (x.flatten(1).float() / x.max() for x in (bundle.train_x, bundle.test_x))
    return train, bundle.train_y, test, bundle.test_y


def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the first network."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.5)


def accuracy(model: nn.Module, data: Data) -> float:
    """Return the test accuracy."""
    with torch.no_grad():
        return float((model(data[2]).argmax(1) == data[3]).float().mean())


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, count: int) -> None:
    """Train on full batches."""
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()


def on_support(sparse: Sparsifier) -> float:
    """Return the median of |g| / lambda where weights are not zero: 1 where the solve has converged."""
    gradients = mean_gradients(sparse)
    ratios = [
        gradients[name].abs()[layer.weight() != 0] / sparse.memory["strength"][name]
        for name, layer in sparse.layers.items()
    ]
    return float(torch.cat(ratios).median()) if any(r.numel() for r in ratios) else 1.0


def prescribed(data: Data, args: Any, **options: Any) -> str:
    """Run the method and return a line of the table."""
    model, optimizer = start(args.seed)
    sparse = rarefy.sparsify(
        model,
        "l1-prescribed",
        optimizer=optimizer,
        calibration=[data[:2]],
        every=args.every,
        solves=args.solves,
        **options,
    )
    before = time.perf_counter()
    solved = ratio = 0.0
    while "search" in sparse.memory:
        steps(model, optimizer, data, args.every - 1)
        solved, ratio = accuracy(model, data), on_support(sparse)
        steps(model, optimizer, data, 1)
    exact, seconds = accuracy(model, data), time.perf_counter() - before
    steps(model, optimizer, data, args.refit)
    kept = {name: int(layer.weight().count_nonzero()) for name, layer in sparse.layers.items()}
    target, last = list(sparse.memory["target"].values()), list(sparse.memory["solves"][-1].values())
    residual = max(sparse.memory["residual"].values())
    strengths = ", ".join(f"{s:.4f}" for s in dict.fromkeys(sparse.memory["strength"].values()))
    return (
        f"| {target} | {len(sparse.memory['solves'])} | {last} | {list(kept.values())} | {strengths} | "
        f"{ratio:.2f} | {residual:.2f} | "
        f"{solved:.3f} | {exact:.3f} | {accuracy(model, data):.3f} | {seconds:.0f} |"
    )


class Verbatim(Method):
    """Soft thresholding with strengths that are set from outside."""

    name = "verbatim"

    def proximal(self, sparse: Sparsifier, layer: Any) -> L1:
        return L1(sparse.memory[layer.name])


def verbatim(data: Data, args: Any, targets: list[int], strength: float) -> list[list[int]]:
    """Solve again and again with the published rule (per layer, no brackets) and return the counts."""
    model, optimizer = start(args.seed)
    sparse = rarefy.sparsify(model, Verbatim(), optimizer=optimizer, calibration=[data[:2]])
    sparse.calibration = [data[:2]]
    first, counts = snapshot(sparse), []
    layers = dict(zip(sparse.layers, targets, strict=True))
    sparse.memory |= dict.fromkeys(layers, strength)
    past = {name: torch.zeros(0) for name in layers}
    slack, limit = dict.fromkeys(layers, 0), dict.fromkeys(layers, strength)
    for _ in range(args.solves):
        rewind(sparse, first)
        start_afresh(sparse)
        steps(model, optimizer, data, args.every)
        gradients = mean_gradients(sparse)
        found = {name: int(layer.weight().count_nonzero()) for name, layer in sparse.layers.items()}
        counts.append(list(found.values()))
        for name, target in layers.items():
            if found[name] == target:
                continue
            if found[name] < target:
                past[name] = gradients[name].abs().flatten().sort().values
                below = past[name][past[name] < sparse.memory[name]]
                limit[name], slack[name] = float(below.max()), 0
            else:
                slack[name] += found[name] - target
            if past[name].numel():
                place = min(past[name].numel() - target + slack[name], past[name].numel() - 1)
                sparse.memory[name] = max(min(float(past[name][place]), limit[name]), 1e-8)
    return counts


def main() -> None:
    """Print the table and the counts of the published rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1500)
    parser.add_argument("--solves", type=int, default=12)
    parser.add_argument("--refit", type=int, default=1500)
    args = parser.parse_args()
    data = digits()
    model, optimizer = start(args.seed)
    steps(model, optimizer, data, args.every)
    print(f"dense: {accuracy(model, data):.3f}\n")
    print("| targets | solves | last solve | kept | lambda | on support | residual | solved | exact | refit | s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for density in (0.5, 0.2, 0.1):
        print(prescribed(data, args, sparsity=1 - density), flush=True)
    uneven = {"0": 1 - 300 / 2048, "2": 1 - 100 / 320}
    print(prescribed(data, args, allocation=uneven), flush=True)
    print(prescribed(data, args, allocation=uneven, parameters="one") + " one lambda", flush=True)
    print(f"\nthe published rule alone, targets [300, 100]: {verbatim(data, args, [300, 100], 0.02)}")


if __name__ == "__main__":
    main()
