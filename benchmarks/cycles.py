"""Lottery tickets, sparse model soups and random search against their controls.

    python benchmarks/cycles.py tickets                      # digits, under two minutes on one thread
    python benchmarks/cycles.py random                       # digits, about a minute
    python benchmarks/cycles.py soups                        # digits with noisy labels, about a minute
    python benchmarks/cycles.py backends --seeds 2           # the same search here, in processes and through Ray

Every command prints a Markdown table, and writes all numbers with --json. Nothing is chosen on the test sets: settings are
the ones below for all arms. `--backend ray` or `processes` runs members side by side; the numbers stay the same, which
"backends" shows for a whole random search and a whole soup. Soups of a published network: from_published.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rarefy.engine import Sparsifier
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
from rarefy.search.members import has_ray
from rarefy.search.recipe import Recipe
from rarefy.search.soups import average
from rarefy.training.config import RunConfig
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


# --- where members run ----------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """Return a hash of everything that was computed, to the last bit."""
    kept = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            kept.update(f"{part.dtype} {list(part.shape)}".encode())
            kept.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            for name in sorted(part):
                kept.update(name.encode())
                add(part[name])
        elif isinstance(part, list):
            for entry in part:
                add(entry)
        else:
            kept.update(repr(part).encode())

    add(value)
    return kept.hexdigest()[:16]


def whole_arm(job: Recipe, net: nn.Module, sparse: Sparsifier | None, seed: int) -> dict[str, Any]:
    """`Recipe.train`, with the weights it ends at."""
    result = job.train(net, sparse, seed)
    return {**result, "weights": {n: v.clone() for n, v in net.state_dict().items()}}


def backends(options: argparse.Namespace) -> Any:
    """One random search and one soup through every backend that is installed: the same bits?"""
    rows: list[tuple[str, ...]] = [
        ("members run in", "random search", "found / random / dense", "soup", "accuracy", "seconds")
    ]
    results: dict[str, Any] = {}
    for backend in ("here", "processes", *(["ray"] if has_ray() else [])):
        began = time.perf_counter()
        workers, job = Workers(backend, options.count), recipe(5)
        search = RandomSearch(Nodes(0.25), InitialLoss([job.search_set(10**6)]), budget=50)
        seeds = list(range(options.seeds))
        arms = compare_arms(search, job.build, partial(whole_arm, job), seeds=seeds, workers=workers)
        net = job.build(derive(0, "init"))
        job.fit(net, None, derive(0, "data"), job.rates())
        phases = sparse_model_soups(net, job.retrain, sparsity=0.95, phases=2, members=3, workers=workers)
        bits = digest(arms.runs), digest([dict(net.state_dict()), *(vars(p) for p in phases)])
        scores = " / ".join(shown(list(arms.scores(arm).values())) for arm in ("found", "random", "dense"))
        seconds = f"{time.perf_counter() - began:.0f}"
        rows.append((backend, bits[0], scores, bits[1], f"{100 * job.score(net):.1f}", seconds))
        results[backend] = bits
    table(*rows)
    same = len(set(results.values())) == 1
    print(f"\n{'The same bits' if same else 'NOT THE SAME'} in {len(results)} places.")
    if not same:
        raise SystemExit(1)
    return results


COMMANDS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "tickets": tickets, "random": random, "soups": soups, "backends": backends,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(COMMANDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--backend", default="here")
    parser.add_argument("--count", type=int, default=None, help="members at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05], help="random: kept fractions")
    options = parser.parse_args()
    options.workers = Workers(options.backend, options.count)
    torch.set_num_threads(1)
    began = time.perf_counter()
    result = COMMANDS[options.what](options)
    print(f"\n{time.perf_counter() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(result, default=lambda value: None))


if __name__ == "__main__":
    main()
