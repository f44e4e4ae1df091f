"""Lottery tickets, sparse model soups and random search against their controls.

    python benchmarks/cycles.py tickets                      # digits, under two minutes on one thread
    python benchmarks/cycles.py random                       # digits, about a minute
    python benchmarks/cycles.py soups                        # digits with noisy labels, about a minute
    RAREFY_DATA=... python benchmarks/cycles.py resnet       # the published CIFAR-10 ResNet-20, short schedule
    RAREFY_DATA=... python benchmarks/cycles.py resnet --steps 3910 --train 50000 --phases 3 --members 3   # longer

Every command prints a Markdown table, and writes all numbers with --json. Nothing is chosen on the test sets: settings are
the ones below for all arms. `--backend ray` or `processes` runs members side by side; the numbers stay the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rarefy import data, models
from rarefy.engine import Sparsifier
from rarefy.engine.batch_norm import recalibrate
from rarefy.methods.lottery import LotteryTicket
from rarefy.metrics.statistics import mean, paired_t_test, sd
from rarefy.search import (
    InitialLoss,
    Member,
    Nodes,
    RandomSearch,
    Workers,
    compare_arms,
    lottery_ticket,
    retrain,
    run_members,
    shuffled,
    sparse_model_soups,
)
from rarefy.search.recipe import Recipe
from rarefy.search.soups import average
from rarefy.training.config import RunConfig
from rarefy.training.inputs import Inputs
from rarefy.training.seeds import derive

DIGITS: dict[str, Any] = {"data": "digits", "model": "lenet-300-100", "batch_size": 64, "device": "cpu"}


def recipe(epochs: int, seed: int = 0, **keys: Any) -> Recipe:
    return Recipe(RunConfig.model_validate({**DIGITS, "epochs": epochs, "seed": seed, **keys}))


def shown(values: list[float]) -> str:
    spread = sd(values)
    return f"{100 * mean(values):.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def versus(first: list[float], second: list[float]) -> str:
    test = paired_t_test(first, second)
    if test is None:
        return "–"
    return f"{100 * test.difference:+.2f} [{100 * test.low:+.2f}, {100 * test.high:+.2f}]"


def table(*rows: tuple[str, ...]) -> None:
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows[1:]:
        print("| " + " | ".join(row) + " |")


# --- lottery tickets ------------------------------------------------------------------------------------------------

LEVELS = (5, 10, 15)


def one_ticket(seed: int) -> dict[str, Any]:
    """LTH and LTR down to level 15 with 20 % a round; at some levels the two controls of the first."""
    job = recipe(15, seed)
    rounds, epoch = max(LEVELS), len(job.inputs().train)
    result: dict[str, Any] = {}
    for name, k in (("LTH", 0), ("LTR", epoch)):
        model = job.build(derive(seed, "init"))
        method = LotteryTicket(sparsity=1 - 0.8**rounds, rounds=rounds, rewind_to=k)
        found = lottery_ticket(model, job.train_round, method, exclude="fc3", seed=seed)
        result[name] = {str(ticket.round): ticket.result["score"] for ticket in found.rounds}
        if name == "LTH":
            for level in LEVELS:
                masks = found.rounds[level].masks
                new = job.build(derive(seed, "another init"))
                result.setdefault("reinit", {})[str(level)] = retrain(new, job.train_round, masks)["score"]
                same = job.build(derive(seed, "init"))
                mixed = retrain(same, job.train_round, shuffled(masks, seed), weights=found.rewound)
                result.setdefault("shuffled", {})[str(level)] = mixed["score"]
    return result


def tickets(options: argparse.Namespace) -> Any:
    seeds = list(range(options.seeds))
    runs = run_members(one_ticket, seeds, seeds, options.workers)
    rows: list[tuple[str, ...]] = [
        (
            "level",
            "kept",
            "LTH",
            "LTR, k = 1 epoch",
            "same mask, new init",
            "shuffled mask",
            "LTH - new init",
            "LTH - shuffled",
        )
    ]
    for level in ("0", *map(str, LEVELS)):
        arms = {a: [run[a][level] for run in runs] if level in runs[0][a] else [] for a in runs[0]}
        cells = [shown(arms[a]) if arms[a] else "–" for a in ("LTH", "LTR", "reinit", "shuffled")]
        gaps = [versus(arms["LTH"], arms[a]) if arms[a] else "–" for a in ("reinit", "shuffled")]
        rows.append((level, f"{100 * 0.8 ** int(level):.1f} %", *cells, *gaps))
    table(*rows)
    return runs


# --- random search --------------------------------------------------------------------------------------------------


def random(options: argparse.Namespace) -> Any:
    job, seeds, results = recipe(20), list(range(options.seeds)), {}
    batches = [job.search_set(10**6)]  # the whole training part
    rows: list[tuple[str, ...]] = [
        ("keep", "zero weights", "found", "random", "dense", "found - random", "random - dense", "initial loss: best / random",
         "epochs to 95 % of dense: found / random")
    ]  # fmt: skip
    for keep in options.keep:
        search = RandomSearch(Nodes(keep), InitialLoss(batches), budget=200)
        done = compare_arms(search, job.build, job.train, seeds=seeds, workers=options.workers)
        scores = {arm: list(done.scores(arm).values()) for arm in ("found", "random", "dense")}
        best, control = (mean([run["objectives"][k] for run in done.runs]) for k in ("best", "random"))
        epochs = ["never in all" if (e := done.epochs(arm)) is None else f"{e:.1f}" for arm in ("found", "random")]
        rows.append(
            (f"{keep:g}", f"{100 * done.runs[0]['sparsity']:.1f} %", *map(shown, scores.values()),
             versus(scores["found"], scores["random"]), versus(scores["random"], scores["dense"]),
             f"{best:.3f} / {control:.3f}", " / ".join(epochs))
        )  # fmt: skip
        results[str(keep)] = done.runs
        print(rows[-1], flush=True)
    table(*rows)
    return results


# --- soups on digits ------------------------------------------------------------------------------------------------


def noisy_fit(
    job: Recipe, noise: float, net: nn.Module, sparse: Sparsifier | None, seed: int, rates: list[float]
) -> None:
    """`Recipe.fit` with a share of the training labels drawn anew, the same ones for every member."""
    bundle = job.inputs().bundle
    generator = torch.Generator().manual_seed(derive(job.config.seed, "noise"))
    wrong = torch.rand(len(bundle.train_y), generator=generator) < noise
    labels = torch.where(wrong, torch.randint(10, bundle.train_y.shape, generator=generator), bundle.train_y)
    clean = bundle.train_y.clone()
    try:
        bundle.train_y.copy_(labels)
        job.fit(net, sparse, seed, rates)
    finally:
        bundle.train_y.copy_(clean)


def noisy_member(job: Recipe, noise: float, net: nn.Module, sparse: Sparsifier, member: Member) -> dict[str, Any]:
    schedule = job.rates() if job.config.lr_schedule.name == "constant" else None
    rates = schedule or [0.1 * (1 - t / job.steps) for t in range(job.steps)]
    noisy_fit(job, noise, net, sparse, member.seed, rates)
    return {"score": job.score(net), "state": {n: v.clone() for n, v in net.state_dict().items()}}


def one_soup(schedule: str, seed: int) -> dict[str, Any]:
    """A soup of five from one parent at 90 %, and the mean of five that were pruned apart."""
    optimizer = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0}
    job = recipe(15, seed, lr_schedule={"name": schedule}, optimizer=optimizer)
    retrain_member = partial(noisy_member, job, 0.3)
    parent = job.build(derive(seed, "init"))
    noisy_fit(job, 0.3, parent, None, derive(seed, "data"), job.rates())
    dense = job.score(parent)
    here = Workers("here")
    start = {n: v.clone() for n, v in parent.state_dict().items()}
    phase = sparse_model_soups(parent, retrain_member, phases=1, members=5, workers=here, seed=seed)[0]
    single = [result["score"] for result in phase.results]
    apart = []
    for other in range(5):
        net = job.build(derive(seed, "init"))
        if other:
            net = job.build(derive(seed, f"init {other}"))
            noisy_fit(job, 0.3, net, None, derive(seed, f"data {other}"), job.rates())
        else:
            net.load_state_dict(start)
        sparse_model_soups(net, retrain_member, phases=1, members=1, workers=here, seed=seed + 100 * other)
        apart.append({n: v.clone() for n, v in net.state_dict().items()})
    mixed = job.build(0)
    mixed.load_state_dict(average(apart))
    weights = [p for p in mixed.parameters() if p.ndim == 2]
    zeros = 1 - sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)
    return {
        "dense": dense, "soup": job.score(parent), "mean": mean(single), "best": max(single),
        "apart": job.score(mixed), "apart_sparsity": zeros,
    }  # fmt: skip


def one_cycle(seed: int) -> dict[str, Any]:
    """Clean labels, 95 % in three phases: IMP, soups of three, and IMP with three times the retraining."""
    job = Recipe(recipe(15, seed).config, retrain_steps=5 * len(recipe(15).inputs().train))
    result = {}
    for name, members, factor in (("IMP", 1, 1), ("soups of 3", 3, 1), ("IMP, 3 x retraining", 1, 3)):
        net = job.build(derive(seed, "init"))
        job.fit(net, None, derive(seed, "data"), job.rates())
        result["dense"] = job.score(net)
        given = [{"steps": factor * (job.retrain_steps or 0)}] * members
        sparse_model_soups(net, job.retrain, sparsity=0.95, phases=3, members=given, workers=Workers("here"), seed=seed)
        result[name] = job.score(net)
    return result


def soups(options: argparse.Namespace) -> Any:
    seeds = list(range(options.seeds))
    results: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = [
        ("learning rate", "dense", "soup of 5", "mean member", "best member (by test)", "soup - mean member", "soup - best",
         "mean of 5 pruned apart", "its zeros")
    ]  # fmt: skip
    for schedule, said in (("constant", "constant 0.1"), ("cosine", "linear to 0 (dense: cosine)")):
        runs = run_members(partial(one_soup, schedule), seeds, seeds, options.workers)
        by = {key: [run[key] for run in runs] for key in runs[0]}
        rows.append(
            (said, *(shown(by[k]) for k in ("dense", "soup", "mean", "best")), versus(by["soup"], by["mean"]),
             versus(by["soup"], by["best"]), shown(by["apart"]), f"{100 * mean(by['apart_sparsity']):.0f} %")
        )  # fmt: skip
        results[schedule] = runs
    table(*rows)
    print()
    runs = run_members(one_cycle, seeds, seeds, options.workers)
    by = {key: [run[key] for run in runs] for key in runs[0]}
    table(("clean labels, 95 % in 3 phases", "accuracy %", "minus IMP"),
          *((name, shown(values), versus(values, by["IMP"])) for name, values in by.items()))  # fmt: skip
    return {**results, "cycles": runs}


# --- the published ResNet-20 ----------------------------------------------------------------------------------------


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # what the published weights were trained with


class Published(Recipe):
    """A recipe whose inputs are normalised as the published weights expect."""

    def inputs(self) -> Inputs:
        return published_inputs(self.config.model_dump_json())


@functools.lru_cache(maxsize=1)
def published_inputs(config: str) -> Inputs:
    inputs = Inputs(RunConfig.model_validate_json(config))
    inputs.bundle = dataclasses.replace(inputs.bundle, **IMAGENET)
    inputs.test = data.eval_batches(inputs.bundle, 500)
    return inputs


def resnet(options: argparse.Namespace) -> Any:
    config = RunConfig.model_validate(
        {"data": "cifar10", "model": "resnet-20", "steps": options.steps, "batch_size": options.batch, "augment": True,
         "limit_train": options.train, "limit_test": options.test, "device": "cpu", "seed": 0,
         "optimizer": {"name": "sgd", "lr": options.lr, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
         "lr_schedule": "constant"}
    )  # fmt: skip
    job = Published(config, retrain_steps=options.steps)
    calibration, results = job.calibration()[:10], {}
    dense = job.score(models.load_published("resnet-20-cifar10"))
    rows: list[tuple[str, ...]] = [("sparsity", "method", "steps in all", "accuracy %", "minus one-shot", "seconds")]
    rows.append(("–", "published dense", "0", f"{100 * dense:.2f}", "–", "–"))
    for sparsity in options.sparsity:
        whole = options.phases * options.steps
        plans = [
            ("one-shot magnitude", 1, [{"steps": whole}], whole),
            (f"IMP, {options.phases} phases", options.phases, [{"steps": options.steps}], whole),
            (f"soups of {options.members}, {options.phases} phases", options.phases,
             [{"steps": options.steps}] * options.members, whole * options.members),
        ]  # fmt: skip
        for name, phases, members, steps in plans:
            began = time.perf_counter()
            place = options.folder and Path(options.folder) / f"{sparsity:g}-{phases}-{len(members)}"
            net = models.load_published("resnet-20-cifar10")
            seen = sparse_model_soups(
                net, job.retrain, sparsity=sparsity, phases=phases, members=members, calibration=calibration,
                workers=options.workers, folder=place,
            )  # fmt: skip
            score = job.score(recalibrate(net, calibration))
            results[f"{sparsity:g} {name}"] = {"score": score, "steps": steps, "spread": seen[-1].spread}
            first = results[f"{sparsity:g} one-shot magnitude"]["score"]
            took = time.perf_counter() - began
            rows.append(
                (
                    f"{100 * sparsity:g} %",
                    name,
                    str(steps),
                    f"{100 * score:.2f}",
                    f"{100 * (score - first):+.2f}",
                    f"{took:.0f}",
                )
            )
            print(rows[-1], flush=True)
    table(*rows)
    return {"dense": dense, **results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tickets", "random", "soups", "resnet"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--backend", default="here")
    parser.add_argument("--count", type=int, default=None, help="members at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05], help="random: kept fractions")
    parser.add_argument("--folder", help="resnet: keep finished members here, and go on from them")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--phases", type=int, default=2)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="resnet: of one retraining")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--train", type=int, default=20000)
    parser.add_argument("--test", type=int, default=2000)
    options = parser.parse_args()
    options.workers = Workers(options.backend, options.count)
    torch.set_num_threads(1)
    began = time.perf_counter()
    result = {"tickets": tickets, "random": random, "soups": soups, "resnet": resnet}[options.what](options)
    print(f"\n{time.perf_counter() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(result, default=lambda value: None))


if __name__ == "__main__":
    main()
