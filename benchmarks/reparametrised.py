"""Methods whose network computes with other weights than it trains: the small experiments of docs/results/reparametrised.md.

    RAREFY_DATA=... python benchmarks/reparametrised.py PART [--seeds 0 1 2] [--json FILE]

thresholds   trainable thresholds on MNIST (8,000 training, 2,000 test images): LeNet-300-100, SGD 0.01, momentum 0.9,
             batch 64, 10 epochs; accuracy, kept share and resets over alpha, with the kept share of each layer.
digits       lottery jackpots on scikit-learn's digits: an MLP 64-300-100-10 trained 30 epochs, then a mask searched for 20
             at 90, 95 and 98 %, with and without the short restriction, beside one-shot magnitude pruning.
resnet       lottery jackpots from the published ResNet-20 on CIFAR-10, at 80 and 90 %: `--steps` batches of 128 from the
             training images there, no augmentation; beside one-shot magnitude pruning of the same layers, as it is and with
             batch-norm statistics measured anew on as many batches. Convolutions only: the classifier stays dense.
movement     magnitude and movement from one trained LeNet-300-100 (the same MNIST images, 10 epochs more), and gradual and
             AC/DC from scratch (20 epochs), at 90, 95 and 98 %.

Accuracy is that of the last step, on the test images; nothing is chosen by it. One thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy import data, models

Images = tuple[Tensor, Tensor]


def images(name: str, train: int, test: int, mean: list[float], std: list[float]) -> tuple[Images, Images]:
    bundle = data.load(name, download=False)
    m, s = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    cut = lambda x, n: (x[:n].float() / 255 - m) / s  # noqa: E731
    return (cut(bundle.train_x, train), bundle.train_y[:train]), (cut(bundle.test_x, test), bundle.test_y[:test])


@torch.no_grad()
def accuracy(model: nn.Module, test: Images) -> float:
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(test[0].split(500), test[1].split(500), strict=True)
    )
    model.train()
    return 100 * right / len(test[1])


def batches(images: Images, size: int, generator: torch.Generator) -> list[Images]:
    order = torch.randperm(len(images[1]), generator=generator)
    return [(images[0][i], images[1][i]) for i in order.split(size)]


def fit(
    model: nn.Module,
    train: Images,
    epochs: int,
    *,
    lr: float,
    batch: int,
    seed: int,
    method: str | None = None,
    cosine: bool = True,
    weight_decay: float = 0.0,
    **options: Any,
) -> rarefy.Sparsifier | None:
    """Train with SGD and momentum 0.9; the mask's options go to `sparsify`."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    total = epochs * -(-len(train[1]) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total) if cosine else None
    sparse = None
    if method is not None:
        sparse = rarefy.sparsify(model, method, optimizer=optimizer, total_steps=total, seed=seed, **options)
    model.train()
    for _ in range(epochs):
        for x, y in batches(train, batch, generator):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
    return sparse


def lenet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("lenet-300-100")


def thresholds(seeds: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    train, test = images("mnist", 8000, 2000, [0.0], [1.0])
    rows = []
    for alpha in (0.0, 2e-4, 5e-4, 2e-3, 1e-2):
        for seed in seeds:
            model = lenet(seed)
            sparse = fit(model, train, 10, lr=0.01, batch=64, seed=seed, method="dst", cosine=False, alpha=alpha)
            assert sparse is not None
            kept = {name: round(layer.density, 4) for name, layer in sparse.layers.items()}
            resets = sum(sparse.memory.get("resets", {}).values())
            row = {"alpha": alpha, "seed": seed, "accuracy": accuracy(model, test), "kept": 1 - sparse.sparsity}
            rows.append({**row, "resets": resets, "layers": kept})
            print(rows[-1], flush=True)
    return rows


def digits(seeds: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    train, test = images("digits", 10**6, 10**6, [0.0], [1.0])
    rows = []
    for seed in seeds:
        torch.manual_seed(seed)
        trained = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )
        fit(trained, train, 30, lr=0.05, batch=64, seed=seed)
        dense = accuracy(trained, test)
        for sparsity in args.sparsities:
            row: dict[str, Any] = {"seed": seed, "sparsity": sparsity, "dense": dense}
            model = copy.deepcopy(trained)
            rarefy.sparsify(model, "magnitude", sparsity=sparsity).finalize()
            row["one-shot"] = accuracy(model, test)
            one_shot = {name: p != 0 for name, p in model.named_parameters() if p.dim() == 2}
            for restriction in ("constant", "power"):
                model = copy.deepcopy(trained)
                search: dict[str, Any] = dict(method="lottery-jackpots", sparsity=sparsity, restriction=restriction)
                sparse = fit(model, train, 20, lr=0.1, batch=64, seed=seed, weight_decay=5e-4, **search)
                assert sparse is not None
                row[restriction] = accuracy(model, test)
                shared = sum(int((m & one_shot[name]).sum()) for name, m in sparse.masks().items())
                row[f"{restriction} overlap"] = shared / sparse.nnz
                row[f"{restriction} swaps"] = _swaps(sparse)
            rows.append(row)
            print(row, flush=True)
    return rows


def _swaps(sparse: rarefy.Sparsifier) -> int:
    sparse.finalize()
    return sum(event.grown for event in sparse.events)


def resnet(seeds: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    train, test = images("cifar10", 20_000, args.test_images, mean, std)
    published = models.load_published("resnet-20-cifar10")
    rows = [{"dense": accuracy(published, test)}]
    print(rows[-1], flush=True)
    for sparsity in (0.8, 0.9):
        pruned = copy.deepcopy(published)
        rarefy.sparsify(pruned, "magnitude", sparsity=sparsity, exclude="fc").finalize()
        one_shot = accuracy(pruned, test)
        for seed in seeds:
            some = batches(train, 128, torch.Generator().manual_seed(seed))[: args.steps]
            recalibrated = copy.deepcopy(pruned)
            _measure_statistics(recalibrated, some)
            model = copy.deepcopy(published)
            part = (torch.cat([x for x, _ in some]), torch.cat([y for _, y in some]))
            start = time.perf_counter()
            search: dict[str, Any] = dict(method="lottery-jackpots", sparsity=sparsity, exclude="fc")
            sparse = fit(model, part, 1, lr=0.1, batch=128, seed=seed, weight_decay=5e-4, **search)
            seconds = time.perf_counter() - start
            assert sparse is not None
            found = accuracy(model, test)
            mine, theirs = sparse.masks(), {n: p != 0 for n, p in pruned.named_parameters()}
            overlap = sum(int((m & theirs[n]).sum()) for n, m in mine.items()) / sparse.nnz
            sparse.finalize()
            _check_untouched(model, published, mine)
            _measure_statistics(model, some)
            row = {"sparsity": sparse.sparsity, "seed": seed, "one-shot": one_shot, "searched": found}
            row |= {"one-shot, statistics anew": accuracy(recalibrated, test), "overlap": overlap, "seconds": seconds}
            rows.append(row | {"searched, statistics anew": accuracy(model, test), "swaps": _swaps(sparse)})
            print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def _measure_statistics(model: nn.Module, some: list[Images]) -> None:
    """Average batch norm's statistics over these batches, weights untouched."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    for x, _ in some:
        model(x)


def _check_untouched(model: nn.Module, published: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, parameter in published.named_parameters():
        mine = model.get_parameter(name)
        same = torch.equal(mine, parameter.masked_fill(~masks[name], 0) if name in masks else parameter)
        assert same, f"{name} was changed"


def movement(seeds: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    train, test = images("mnist", 8000, 2000, [0.1307], [0.3081])
    rows = []
    common: dict[str, Any] = dict(batch=64, weight_decay=1e-4)
    for seed in seeds:
        trained = lenet(seed)
        fit(trained, train, 10, lr=0.05, seed=seed, **common)
        long = lenet(seed)
        fit(long, train, 20, lr=0.05, seed=seed, **common)
        rows.append(
            {"seed": seed, "dense, 10 epochs": accuracy(trained, test), "dense, 20 epochs": accuracy(long, test)}
        )
        print(rows[-1], flush=True)
        for sparsity in args.sparsities:
            row: dict[str, Any] = {"seed": seed, "sparsity": sparsity}
            for method, start, epochs in [
                ("magnitude", trained, 10),
                ("gradual", trained, 10),
                ("movement", trained, 10),
                ("gradual", None, 20),
                ("ac-dc", None, 20),
            ]:
                model = copy.deepcopy(start) if start is not None else lenet(seed)
                lr = 0.05 if start is None else 0.02
                sparse = fit(model, train, epochs, lr=lr, seed=seed, method=method, sparsity=sparsity, **common)
                assert sparse is not None and abs(sparse.sparsity - sparsity) < 1e-3
                row[f"{method} from {'scratch' if start is None else 'trained'}"] = accuracy(model, test)
            rows.append(row)
            print(row, flush=True)
    return rows


def summarise(rows: list[dict[str, Any]]) -> None:
    """Print means and standard deviations over seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in ("alpha", "sparsity")), []).append(row)
    for key, members in groups.items():
        print(" ".join(str(k) for k in key if k is not None))
        for name in members[0]:
            values = [row[name] for row in members if isinstance(row[name], int | float)]
            if name not in ("seed", "alpha", "sparsity") and values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                print(f"    {name:28s} {statistics.mean(values):10.3f} ± {spread:.3f}")


PARTS = {"thresholds": thresholds, "digits": digits, "resnet": resnet, "movement": movement}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80, help="of the search in `resnet`")
    parser.add_argument("--test-images", type=int, default=10_000, help="how many `resnet` is measured on")
    parser.add_argument(
        "--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98], help="of `digits`, `movement`"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*begin again at 0")
    start = time.perf_counter()
    rows = PARTS[args.part](args.seeds, args)
    print(f"{time.perf_counter() - start:.0f} s")
    summarise(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
