"""`rarefy search`: many trainings that make one result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli import app
from rarefy.cli.show import WIDE

Text = str | None
Config = Annotated[Path | None, typer.Argument(help="A YAML file with a run's keys. Flags override it.")]
Data = Annotated[Text, typer.Option(help="Data set, such as digits, mnist, cifar10.")]
Model = Annotated[Text, typer.Option(help="Network, such as lenet-300-100, resnet-20.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training data of one whole training.")]
Lr = Annotated[float | None, typer.Option(help="Learning rate (optimizer.lr).")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any other key of a run. May be repeated.")]
Out = Annotated[Path, typer.Option(help="Folder of the results; the same command goes on from what is there.")]
Backend = Annotated[str, typer.Option(help="auto (Ray where it is installed, else processes), ray, processes or here.")]
Jobs = Annotated[int | None, typer.Option(help="Members at a time; by default one for each core.")]
Threads = Annotated[int, typer.Option(help="torch threads of each member.")]

search = typer.Typer(
    name="search",
    help="Search with many trainings side by side: random search at initialisation, sparse model soups. "
    "(Lottery tickets are a method: rarefy train --method lottery-ticket.)",
    no_args_is_help=True,
)
app.add_typer(search)


def _run(config: Path | None, flags: dict[str, Any], set_: list[str] | None, defaults: dict[str, Any]) -> Any:
    from rarefy.errors import ConfigError
    from rarefy.training.config import RunConfig
    from rarefy.training.reading import assignments, merge, read_mapping, validate

    read = read_mapping(config) if config is not None else {}
    given = {key: value for key, value in flags.items() if value is not None}
    if "epochs" in given:
        read = {key: value for key, value in read.items() if key != "steps"}
    source = config.name if config is not None else "the flags"
    run = validate(RunConfig, merge(merge(merge(defaults, read), assignments(set_ or [])), given), source)
    for key, plain in (("method", "dense"), ("precision", "32"), ("accumulate", 1)):
        if getattr(run, key) != plain:
            raise ConfigError(f"{source}: a search trains plainly: leave out {key} (now {getattr(run, key)!r})")
    return run


@search.command("random")
def random_(
    config: Config = None,
    data: Data = None,
    model: Model = None,
    keep: Annotated[
        list[float] | None, typer.Option(help="Fraction of hidden nodes kept; may be repeated. Default 0.5, 0.25, 0.1.")
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="Instead of --keep: random weights at this sparsity, ERK; may be repeated."),
    ] = None,
    objective: Annotated[
        str, typer.Option(help="loss (at initialisation), gradient-norm, synflow, or loss-after:STEPS.")
    ] = "loss",
    budget: Annotated[int, typer.Option(help="Forward passes of a search; with one batch, candidates.")] = 200,
    samples: Annotated[int, typer.Option(help="Training samples of the search set.")] = 1000,
    seeds: Annotated[int, typer.Option(help="How many; at least 5 for a conclusion.")] = 5,
    epochs: Epochs = None,
    lr: Lr = None,
    set_: Set = None,
    out: Out = Path("runs/random-search"),
    backend: Backend = "auto",
    jobs: Jobs = None,
    threads: Threads = 1,
) -> None:
    """Search random sparse networks at initialisation, and train the best beside a random one and the dense parent.

    No weight is updated while searching (but with loss-after). The three arms share initial weights, data order and settings;
    the differences are paired by seed, with 95 % intervals, and a search helped only if its interval lies above 0.
    """
    from rich.console import Console
    from rich.table import Table

    from rarefy.errors import OptionError
    from rarefy.metrics.statistics import mean
    from rarefy.search import Edges, Nodes, RandomSearch, Workers, compare_arms
    from rarefy.search.recipe import Recipe
    from rarefy.training.folder import write_json

    if keep and sparsity:
        raise OptionError("--keep is for nodes and --sparsity for single weights: give one of them")
    flags = {"data": data, "model": model, "epochs": epochs, "optimizer": None if lr is None else {"lr": lr}}
    recipe = Recipe(_run(config, flags, set_, {"epochs": 20}))
    workers = Workers(backend, jobs, threads)
    samplers: dict[str, Any] = {f"sparsity {s:g}": Edges(s) for s in sparsity or ()}
    samplers = samplers or {f"keep {k:g}": Nodes(k) for k in keep or (0.5, 0.25, 0.1)}
    goal = _objective(objective, recipe, samples)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=WIDE)  # into a file or a log: nothing has to be left out
    table = Table(
        "",
        "zero weights",
        "found %",
        "random %",
        "dense %",
        "found - random",
        "random - dense",
        "objective: best / random",
        box=None,
    )
    results = {}
    for name, sampler in samplers.items():
        found = RandomSearch(sampler, goal, budget)
        place = out / name.replace(" ", "-")
        done = compare_arms(
            found, recipe.build, recipe.train, seeds=range(seeds), workers=workers, folder=place,
            same={"config": recipe.config.identity(), "objective": objective, "budget": budget, "samples": samples},
        )  # fmt: skip
        scores = [f"{100 * mean(list(done.scores(arm).values())):.2f}" for arm in ("found", "random", "dense")]
        seen = [mean([run["objectives"][key] for run in done.runs]) for key in ("best", "random")]
        gaps = [_gap(done.difference(*pair)) for pair in (("found", "random"), ("random", "dense"))]
        table.add_row(name, f"{done.runs[0]['sparsity']:.1%}", *scores, *gaps, f"{seen[0]:.4g} / {seen[1]:.4g}")
        results[name] = {"helps": done.helps, "runs": done.runs}
    write_json(out / "result.json", {"config": recipe.config.dump(), "objective": objective, "results": results})
    console.print(table)
    console.print(f"{out / 'result.json'}\ndata: {recipe.inputs().note}", highlight=False, soft_wrap=True)


def _objective(name: str, recipe: Any, samples: int) -> Any:
    from rarefy.errors import OptionError, nearest
    from rarefy.search import GradientNorm, InitialLoss, LossAfter, SynFlow

    kind, _, number = name.partition(":")
    known = ("loss", "gradient-norm", "synflow", "loss-after")
    if kind not in known or (kind == "loss-after") != number.isdecimal():
        raise OptionError(
            f"--objective {name!r} is not known{nearest(kind, known)}: loss, gradient-norm, synflow, loss-after:10"
        )
    if kind == "synflow":
        return SynFlow(tuple(recipe.inputs().example.shape[1:]))
    batches = [recipe.search_set(samples)]
    if kind == "loss-after":
        return LossAfter(batches, int(number), recipe.config.optimizer.lr)
    return InitialLoss(batches) if kind == "loss" else GradientNorm(batches)


def _gap(test: Any) -> str:
    return "–" if test is None else f"{100 * test.difference:+.2f} [{100 * test.low:+.2f}, {100 * test.high:+.2f}]"


@search.command()
def soups(
    config: Config = None,
    data: Data = None,
    model: Model = None,
    sparsity: Annotated[float, typer.Option(help="Fraction of zeros in the end, in [0, 1).")] = 0.9,
    phases: Annotated[int, typer.Option(help="Prunings, each followed by a retraining.")] = 3,
    members: Annotated[
        int, typer.Option(help="Copies retrained side by side and averaged; 1 is plain iterative pruning.")
    ] = 3,
    soup: Annotated[str, typer.Option(help="uniform, or greedy by validation accuracy.")] = "uniform",
    retrain_epochs: Annotated[
        int | None, typer.Option(help="Length of a retraining; by default that of the training.")
    ] = None,
    schedule: Annotated[str, typer.Option(help="Learning rate of a retraining: llr, allr, clr, slr, lrw, ft.")] = "llr",
    published: Annotated[
        Text, typer.Option(help="Start from published weights of this name instead of training.")
    ] = None,
    epochs: Epochs = None,
    lr: Lr = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, data order and all else.")] = None,
    set_: Set = None,
    out: Out = Path("runs/soups"),
    backend: Backend = "auto",
    jobs: Jobs = None,
    threads: Threads = 1,
) -> None:
    """Train, then prune in phases; after each, retrain several copies side by side and average them (sparse model soups).

    A tenth of the training data is held out for the soups' scores (--set validation=0.2 for another part). Writes
    result.json and soup.safetensors. Compare with --members 1, and with --members 1 and as much retraining in all.
    """
    import torch
    from rich.console import Console
    from safetensors.torch import save

    from rarefy._files import atomic_write
    from rarefy.errors import OptionError, nearest
    from rarefy.schedules import RETRAININGS
    from rarefy.search import Workers, sparse_model_soups
    from rarefy.search.recipe import Recipe
    from rarefy.search.stored import read, write
    from rarefy.training.folder import write_json
    from rarefy.training.seeds import derive

    if schedule not in RETRAININGS:
        raise OptionError(
            f"--schedule {schedule!r} is not known{nearest(schedule, RETRAININGS)}: {', '.join(RETRAININGS)}"
        )
    flags = {
        "data": data,
        "model": model,
        "epochs": epochs,
        "seed": seed,
        "optimizer": None if lr is None else {"lr": lr},
    }
    run = _run(config, flags, set_, {"validation": 0.1})
    workers, plain = Workers(backend, jobs, threads), Recipe(run, published=published)
    steps = None if retrain_epochs is None else retrain_epochs * len(plain.inputs().train)
    recipe = Recipe(run, steps, schedule, published)
    torch.set_num_threads(threads)
    same = {"config": run.identity(), "published": published, "retrain_steps": steps, "schedule": schedule}
    saved = read(out / "dense.pt", same)
    net = recipe.build(derive(run.seed, "init"))
    console = Console()
    if saved is not None:
        net.load_state_dict(saved["state"])
    elif not published:
        recipe.fit(net, None, derive(run.seed, "data"), recipe.rates())
    write(out / "dense.pt", {**same, "state": net.state_dict()})
    dense = recipe.score(net)
    done = sparse_model_soups(
        net, recipe.retrain, sparsity=sparsity, phases=phases, members=members, soup=soup, evaluate=recipe.validate,
        calibration=recipe.calibration(), workers=workers, seed=run.seed, folder=out,
    )  # fmt: skip
    for number, phase in enumerate(done, 1):
        scores = ", ".join(f"{100 * score:.2f}" for score in phase.scores or ())
        console.print(
            f"phase {number}: sparsity {phase.sparsity:.4f}, members on validation data {scores} %, soup of "
            f"{len(phase.chosen)}: {100 * (phase.soup_score or 0):.2f} %", highlight=False, soft_wrap=True,
        )  # fmt: skip
    final = recipe.score(net)
    phase_lines = [
        {"sparsity": p.sparsity, "results": p.results, "scores": p.scores, "soup_score": p.soup_score, "chosen": p.chosen,
         "spread": p.spread} for p in done
    ]  # fmt: skip
    write_json(out / "result.json", {"config": run.dump(), "dense": dense, "accuracy": final, "phases": phase_lines})
    with atomic_write(out / "soup.safetensors") as file:
        file.write(save({name: tensor.contiguous() for name, tensor in net.state_dict().items()}))
    console.print(
        f"{out}: test accuracy {100 * final:.2f} % at sparsity {done[-1].sparsity:.4f} (dense {100 * dense:.2f} %)\n"
        f"data: {recipe.inputs().note}", highlight=False, soft_wrap=True,
    )  # fmt: skip
