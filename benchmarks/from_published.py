"""From the published CIFAR-10 ResNet-20: lottery jackpots, iterative pruning and soups, and pruning once, at equal budgets.

    RAREFY_DATA=... python benchmarks/from_published.py [--steps 240] [--sparsities 0.8 0.9] [--seeds 0 1] [--arms ...]
        [--phases 2] [--members 3] [--train 50000] [--test 10000] [--out runs/from-published.jsonl]

Every arm prunes all convolutions together (largest magnitudes at first; the classifier stays dense) and then takes
`--steps` gradient steps of 128 in all, from the training images with crops and flips:

not-retrained  none
jackpots       the mask is searched by training scores, all weights as published; SGD 0.1 with a cosine, momentum 0.9,
               weight decay 5e-4 on the scores (the paper's)
one-shot       one retraining; SGD 0.02 falling linearly to 0 after a tenth of warm-up, Nesterov momentum 0.9, weight decay 1e-4
imp            the sparsity is reached in `--phases` prunings, each retrained for its share of the steps, schedule anew
soups          the same, but each retraining is shared by `--members` that are averaged
soups-long     soups whose members each train as long as IMP does: `--members` times the steps

Batch norms are measured anew at the end in every arm, on the same ten batches (with crops and flips). Accuracy is that of the
last step on the test images; nothing is chosen by it. Training FLOPs are those of a sparse implementation, counted from the
masks of every step. What is in `--out` is not computed again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from cycles import table
from rarefy import models
from rarefy.engine import Sparsifier
from rarefy.engine.batch_norm import recalibrate
from rarefy.metrics import FlopsReport, flops, training_flops
from rarefy.metrics.statistics import mean, sd
from rarefy.search import Member, Workers, sparse_model_soups
from rarefy.search.recipe import Recipe
from rarefy.training.config import RunConfig
from rarefy.training.seeds import derive

NETWORK = "resnet-20-cifar10"
CLASSIFIER = "fc"


class Counted(Recipe):
    """A recipe whose retrainings count their FLOPs."""

    def retrain(self, model: nn.Module, sparse: Sparsifier, member: Member) -> dict[str, Any]:
        return {**super().retrain(model, sparse, member), "flops": self.flops_of(sparse)}

    def flops_of(self, sparse: Sparsifier) -> float:
        return training_flops(dense_flops(), sparse.training_cost(), self.config.batch_size).total


@functools.lru_cache(maxsize=1)
def dense_flops() -> FlopsReport:
    return flops(models.load_published(NETWORK).eval(), torch.zeros(1, 3, 32, 32))


def recipe(steps: int, seed: int, args: argparse.Namespace) -> Counted:
    config = RunConfig.model_validate(
        {"data": "cifar10", "model": "resnet-20", "steps": steps, "batch_size": 128, "augment": True,
         "limit_train": args.train, "limit_test": args.test, "device": "cpu", "seed": seed,
         "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
         "lr_schedule": "constant"}
    )  # fmt: skip
    return Counted(config, retrain_steps=steps, published=NETWORK)


def cycles(
    net: nn.Module, sparsity: float, seed: int, args: argparse.Namespace, *, phases: int, members: int, steps: int
) -> float:
    """Prune in phases, retrain members for `steps` each, average; returns the training FLOPs."""
    job = recipe(args.steps, seed, args)
    seen = sparse_model_soups(
        net, job.retrain, sparsity=sparsity, phases=phases, members=[{"steps": steps}] * members, exclude=CLASSIFIER,
        calibration=job.calibration()[:10], workers=Workers(args.backend, args.count), seed=seed,
    )  # fmt: skip
    return sum(float(result["flops"]) for phase in seen for result in phase.results)


def jackpots(net: nn.Module, sparsity: float, seed: int, args: argparse.Namespace) -> float:
    """Search a mask; returns the training FLOPs."""
    job = recipe(args.steps, seed, args)
    weights = {name: p.clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    sparse = rarefy.sparsify(
        net, "lottery-jackpots", sparsity=sparsity, exclude=CLASSIFIER, optimizer=optimizer, total_steps=args.steps
    )
    torch.manual_seed(derive(seed, "jackpots"))
    loader, step = job.batches(derive(seed, "jackpots")), 0
    net.train()
    while step < args.steps:
        for x, y in loader:
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 + math.cos(math.pi * step / args.steps))
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == args.steps:
                break
    cost, masks = job.flops_of(sparse), sparse.masks()
    sparse.finalize()
    for name, parameter in net.named_parameters():  # the claim: no weight was trained
        assert torch.equal(parameter, weights[name] * masks[name] if name in masks else weights[name]), name
    return cost


def arms(args: argparse.Namespace) -> dict[str, tuple[int, Callable[[nn.Module, float, int], float]]]:
    """Name -> (gradient steps in all, what prunes and trains a network)."""
    steps, phases, members = args.steps, args.phases, args.members
    whole = functools.partial(cycles, args=args)
    return {
        "not-retrained": (0, functools.partial(prune_only, args=args)),
        "jackpots": (steps, functools.partial(jackpots, args=args)),
        "one-shot": (steps, functools.partial(whole, phases=1, members=1, steps=steps)),
        "imp": (steps, functools.partial(whole, phases=phases, members=1, steps=steps // phases)),
        "soups": (steps, functools.partial(whole, phases=phases, members=members, steps=steps // (phases * members))),
        "soups-long": (
            members * steps,
            functools.partial(whole, phases=phases, members=members, steps=steps // phases),
        ),
    }


def prune_only(net: nn.Module, sparsity: float, seed: int, args: argparse.Namespace) -> float:
    rarefy.sparsify(net, "magnitude", sparsity=sparsity, exclude=CLASSIFIER).finalize()
    return 0.0


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what all arms of one table share."""
    return {
        "budget": args.steps,
        "train": args.train,
        "test": args.test,
        "phases": args.phases,
        "members": args.members,
    }


def run(arm: str, sparsity: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    job = recipe(args.steps, seed, args)
    began, net = time.perf_counter(), job.build(seed).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps, train = arms(args)[arm]
    cost = train(net, sparsity, seed)
    left = copy.deepcopy(net)
    score = job.score(recalibrate(net, job.calibration()[:10]))
    same = all(map(torch.equal, left.buffers(), net.buffers()))  # what cycles leave is measured anew already
    weights = [p for name, p in net.named_parameters() if p.ndim == 4]
    zeros = 1 - sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)
    return {
        "arm": arm, "sparsity": sparsity, "seed": seed, **settings(args), "steps": steps, "flops": cost,
        "score": score, "as_left": score if same else job.score(left), "zeros": zeros, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def shown(values: list[float]) -> str:
    spread = sd(values)
    return f"{100 * mean(values):.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def report(found: list[dict[str, Any]], args: argparse.Namespace) -> None:
    dense = recipe(args.steps, 0, args).score(models.load_published(NETWORK))
    per_step = 3 * dense_flops().dense * 128
    print(f"published, dense: {100 * dense:.2f} %; a dense step of 128: {per_step / 1e9:.2f} GFLOPs\n")
    rows = [
        (
            "zeros",
            "method",
            "gradient steps",
            "training FLOPs, of a dense step",
            "accuracy %",
            "before batch norms anew",
            "seeds",
        )
    ]
    for sparsity in args.sparsities:
        for arm in arms(args):
            some = [r for r in found if r["arm"] == arm and r["sparsity"] == sparsity]
            if some:
                rows.append(
                    (f"{100 * some[0]['zeros']:.2f} %", arm, str(some[0]["steps"]), f"{some[0]['flops'] / per_step:.1f}",
                     shown([r["score"] for r in some]), shown([r["as_left"] for r in some]), str(len(some)))
                )  # fmt: skip
    table(*rows)


def main() -> None:
    names = ["not-retrained", "jackpots", "one-shot", "imp", "soups", "soups-long"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=names, default=names)
    parser.add_argument("--phases", type=int, default=2)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument(
        "--backend", default="here", help="of the members: here, processes or ray; the numbers are the same"
    )
    parser.add_argument("--count", type=int, help="members at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/from-published.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    found = [r for r in found if settings(args).items() <= r.items()]
    done = {(r["arm"], r["sparsity"], r["seed"]) for r in found}
    for seed in args.seeds:
        for sparsity in args.sparsities:
            for arm in args.arms:
                if (arm, sparsity, seed) not in done and not (arm == "not-retrained" and seed != args.seeds[0]):
                    found.append(run(arm, sparsity, seed, args))
                    print(found[-1], flush=True)
                    with args.out.open("a") as file:
                        file.write(json.dumps(found[-1]) + "\n")
    report(found, args)


if __name__ == "__main__":
    main()
