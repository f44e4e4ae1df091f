"""WGSEF on 8,000 MNIST digits: does the number of hidden units that are left follow k, and what does the projection cost?

    RAREFY_DATA=... python benchmarks/wgsef.py [--seeds 0 1 2] [--epochs 12] [--batch 200] [--decay]
        [--strengths 0.1 0.01 0.001] [--parts envelope lasso method]

784-200-10, groups are the rows of the first layer with their biases, plain SGD 0.2, penalised to the end, then
projected onto the k largest. The other table: a group lasso of the same scale, which has no k. The last: the method as it
comes, lambda growing, projected at three quarters, the rest fine-tuned. With --decay the learning rate falls linearly to 0
over the second half: at a constant one the last iterate is noisy, because the layer behind the penalised one grows. The
2,000 images that accuracy is measured on are not used for anything else.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.engine import Layer, Method, Sparsifier
from rarefy.methods.wgsef import group_squares, groups_left
from rarefy.patterns import Slice
from rarefy.penalties import GroupLasso

Data = tuple[Tensor, Tensor, Tensor, Tensor]
PARTS = ("envelope", "lasso", "method")


@dataclass(frozen=True, kw_only=True)
class PlainGroupLasso(Method):
    """The proximal group lasso, to compare with."""

    name: ClassVar[str] = "group-lasso"
    pattern: str = "row"
    strength: float

    def owns_bias(self) -> bool:
        return True

    def proximal(self, sparse: Sparsifier, layer: Layer) -> GroupLasso:
        return GroupLasso(Slice(0), self.strength)


def mnist() -> Data:
    """Return 8,000 training images and 2,000 test images as rows in [0, 1], with labels."""
    bundle = rarefy.data.load("mnist")

    def flat(x: Tensor) -> Tensor:
        x = x.reshape(len(x), -1)
        return x.float() / 255 if x.dtype == torch.uint8 else x.float()

    return flat(bundle.train_x[:8000]), bundle.train_y[:8000], flat(bundle.test_x[:2000]), bundle.test_y[:2000]


def accuracy(model: nn.Module, data: Data) -> float:
    """Return the test accuracy in per cent."""
    with torch.no_grad():
        return 100 * float((model(data[2]).argmax(1) == data[3]).float().mean())


def train(
    data: Data, method: Method, seed: int, args: argparse.Namespace, length: bool = False
) -> tuple[nn.Module, Sparsifier]:
    """Train one network; `length` tells the method how long the run is."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    steps = args.epochs * -(-8000 // args.batch)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, 2 * (1 - t / steps)) if args.decay else 1.0)
    sparse = rarefy.sparsify(
        model, method, include="0", optimizer=optimizer, seed=seed, total_steps=steps if length else None
    )
    for _ in range(args.epochs):
        for chosen in torch.randperm(8000).split(args.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0][chosen]), data[1][chosen]).backward()
            optimizer.step()
            fall.step()
    return model, sparse


def shown(values: list[float], digits: int = 1) -> str:
    """Return mean and range."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--decay", action="store_true", help="let the learning rate fall to 0 over the second half")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.1, 0.01, 0.001])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which of the three tables")
    args = parser.parse_args()
    data = mnist()
    dense = [accuracy(train(data, rarefy.methods.Dense(), s, args)[0], data) for s in args.seeds]
    print(f"dense: {shown(dense)} %\n")
    if "envelope" in args.parts:
        print("| lambda | k | units before projection | accuracy before | after |\n|---|---|---|---|---|")
        for strength in args.strengths:
            for k in (10, 20, 50):
                rows = []
                for seed in args.seeds:
                    method = rarefy.methods.WGSEF(sparsity=1 - k / 200, strength=strength, growth=1.0)
                    model, sparse = train(data, method, seed, args)
                    layer = sparse.layers["0.weight"]
                    left, before = int(groups_left(layer)), accuracy(model, data)
                    layer.rewire(layer.best(group_squares(layer), torch.tensor([k])))
                    rows.append((left, before, accuracy(model, data)))
                left, before, after = (list(map(float, column)) for column in zip(*rows, strict=True))
                print(f"| {strength:g} | {k} | {shown(left, 0)} | {shown(before)} | {shown(after)} |", flush=True)
    if "lasso" in args.parts:
        print("\n| group lasso: lambda | units | accuracy |\n|---|---|---|")
        for strength in (0.01, 0.02, 0.05):
            runs = [train(data, PlainGroupLasso(strength=strength), s, args) for s in args.seeds]
            left = [float(groups_left(sparse.layers["0.weight"])) for _, sparse in runs]
            print(f"| {strength:g} | {shown(left, 0)} | {shown([accuracy(m, data) for m, _ in runs])} |", flush=True)
    if "method" in args.parts:
        print("\n| wgsef as it comes: k | units before projection | at the end | accuracy |\n|---|---|---|---|")
        for k in (10, 20, 50):
            runs = [
                train(data, rarefy.methods.WGSEF(sparsity=1 - k / 200, strength=0.1), s, args, length=True)
                for s in args.seeds
            ]
            left = [float(sparse.memory["groups"]["0.weight"]) for _, sparse in runs]
            end = [float(groups_left(sparse.layers["0.weight"])) for _, sparse in runs]
            print(
                f"| {k} | {shown(left, 0)} | {shown(end, 0)} | {shown([accuracy(m, data) for m, _ in runs])} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
