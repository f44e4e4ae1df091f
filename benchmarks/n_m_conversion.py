"""N:M without training: the published CIFAR-10 ResNet-20, dense and 90 % sparse without structure, by `rarefy.convert`.

    export RAREFY_DATA=...
    python benchmarks/n_m_conversion.py prune --net sparse.pt      # makes the 90 % network: gradual magnitude, 600 steps
    python benchmarks/n_m_conversion.py convert --json dense.json
    python benchmarks/n_m_conversion.py convert --net sparse.pt --json sparse.json
    python benchmarks/n_m_conversion.py convert --per-class 100 --arms masks least-squares --json dense.json
    python benchmarks/n_m_conversion.py table dense.json sparse.json

Arms: magnitude masks alone; the two solvers; the exact one after a channel permutation; masks with batch-norm statistics
estimated anew, as the paper does, where all others let them follow the change. Calibration: `--per-class` training images of
each class, drawn by the seed. Accuracy is that on all 10,000 test images; nothing is chosen by it (settings were compared on
other training images: see docs/results/n-m.md). Every result is written at once, and a second run goes on with what is missing.
CPU seconds are of one thread.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rarefy
from rarefy import data, models
from rarefy.data import Batches, DataBundle
from rarefy.engine.batch_norm import recalibrate
from rarefy.metrics.statistics import mean, sd
from rarefy.training.evaluate import evaluate

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # what the published weights were trained with
PATTERNS = ("2:4", "4:8", "1:4", "2:4t", "4:8t", "1:4t")
ARMS: dict[str, dict[str, Any]] = {
    "masks": {"solver": None},
    "adaprune": {"solver": "adaprune"},
    "least-squares": {"solver": "least-squares"},
    "permuted, least-squares": {"solver": "least-squares", "permute": True},
    "masks, recomputed BN": {"solver": None},
    "permuted, masks": {"solver": None, "permute": True},
}
DEFAULT_ARMS = ["masks", "adaprune", "least-squares", "permuted, least-squares"]


def bundle() -> DataBundle:
    return dataclasses.replace(data.load("cifar10"), **IMAGENET)


def network(path: Path | None) -> nn.Module:
    net = models.load_published("resnet-20-cifar10")
    if path is not None:
        net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def prune(options: argparse.Namespace) -> None:
    """Prune the published net gradually to 90 % zeros in all layers but the first and the last, and train it on."""
    torch.manual_seed(0)
    given, net = bundle(), network(None)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    method = rarefy.methods.Gradual(sparsity=0.9, allocation="global", every=10, stop=7 * options.steps // 12)
    sparse = rarefy.sparsify(net, method, optimizer=optimizer, total_steps=options.steps, exclude=["conv1", "fc"])
    loader, step = data.train_batches(given, 128, 0, augment="default"), 0
    net.train()
    while step < options.steps:
        for x, y in loader:
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step == options.steps:
                break
    sparse.finalize()
    torch.save(net.state_dict(), options.net)
    print(sparse.summary())
    print(f"test accuracy {evaluate(net, data.eval_batches(given, 500))['accuracy']:.2%}")


def calibration(given: DataBundle, per_class: int, seed: int) -> list[Tensor]:
    """Return so many training images of each class, in batches of 100 at most."""
    order = torch.randperm(len(given.train_x), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[given.train_y[order] == c][:per_class] for c in range(10)])
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]
    batches = Batches(given.train_x[chosen], given.train_y[chosen], 100, shuffle=False, mean=given.mean, std=given.std)
    return [x for x, _ in batches]


def convert(options: argparse.Namespace) -> None:
    given, start = bundle(), network(options.net)
    test = data.eval_batches(given, 500)
    done: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    net_name = "90 % sparse" if options.net else "dense"

    def record(key: tuple[Any, ...], result: dict[str, Any]) -> None:
        done["|".join(map(str, key))] = result
        options.json.write_text(json.dumps(done, indent=1))
        print(*key, result, flush=True)

    if f"{net_name}|before" not in done:
        record((net_name, "before"), {"accuracy": evaluate(start, test)["accuracy"]})
    for seed in range(options.seeds):
        batches = calibration(given, options.per_class, seed)
        for pattern in options.patterns:
            for arm in options.arms:
                key = (net_name, pattern, arm, 10 * options.per_class, seed)
                if "|".join(map(str, key)) in done:
                    continue
                net, began = copy.deepcopy(start), time.process_time()
                report = rarefy.convert(net, pattern, batches, **ARMS[arm])
                if arm == "masks, recomputed BN":
                    recalibrate(net, batches)
                took = time.process_time() - began
                layers = report.layers
                result = {
                    "accuracy": evaluate(net, test)["accuracy"],
                    "kept": mean([layer.kept for layer in layers]),
                    "masked": mean([layer.masked / layer.power for layer in layers]),
                    "error": mean([layer.solved / layer.power for layer in layers]),
                    "cpu_seconds": took,
                }
                record(key, result)


def shown(results: list[dict[str, Any]], what: str, times: float = 100.0, digits: int = 2) -> str:
    values = [times * result[what] for result in results]
    spread = sd(values)
    return f"{mean(values):.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def table(options: argparse.Namespace) -> None:
    """Print one table: a row for each network, pattern, calibration size and arm; means over seeds."""
    results: dict[str, Any] = {}
    for file in options.files:
        results |= json.loads(file.read_text())
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, result in results.items():
        groups.setdefault(tuple(key.split("|")[:4]), []).append(result)
    print(
        "| network | images | pattern | arm | accuracy % | error, masks % | error, solved % | kept |w| % | CPU s |".replace(
            "|w|", "\\|w\\|"
        )
    )
    print("|" + "---|" * 9)
    for key, found in groups.items():
        if len(key) == 2:
            print(f"| {key[0]} | – | – | as it was | {shown(found, 'accuracy')} | – | – | – | – |")
            continue
        cells = [shown(found, "masked", digits=1), shown(found, "error", digits=1), shown(found, "kept", digits=1)]
        print(
            f"| {key[0]} | {key[3]} | {key[1]} | {key[2]} | {shown(found, 'accuracy')} | {' | '.join(cells)} | "
            f"{shown(found, 'cpu_seconds', 1.0, 0)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prune", "convert", "table"])
    parser.add_argument("files", nargs="*", type=Path, help="table: what convert wrote")
    parser.add_argument("--net", type=Path, help="the 90 %% sparse network; default: the published dense one")
    parser.add_argument("--json", type=Path, default=Path("n-m-conversion.json"))
    parser.add_argument("--steps", type=int, default=600, help="prune: of training")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--per-class", type=int, default=1)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--arms", nargs="+", default=DEFAULT_ARMS, choices=ARMS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"prune": prune, "convert": convert, "table": table}[options.what](options)


if __name__ == "__main__":
    main()
