"""`rarefy compare` and `rarefy demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli import app

Text = str | None
Jobs = Annotated[int | None, typer.Option(help="Runs side by side, each in its own process with its share of threads.")]
Threads = Annotated[int | None, typer.Option(help="torch threads in all; default: one per core.")]


@app.command()
def compare(
    config: Annotated[Path | None, typer.Argument(help="A YAML file with methods, sparsities, seeds, base.")] = None,
    recipe: Annotated[Text, typer.Option(help="A packaged comparison: demo, mnist-lenet, n-m, ...")] = None,
    methods: Annotated[Text, typer.Option(help="Methods by name, separated by commas.")] = None,
    sparsities: Annotated[Text, typer.Option(help="Fractions of zeros, separated by commas.")] = None,
    patterns: Annotated[
        Text,
        typer.Option(
            help="Patterns (2:4,1:16), in place of sparsities where they fix them; methods of a recipe that list their own "
            "keep those."
        ),
    ] = None,
    seeds: Annotated[Text, typer.Option(help="How many seeds (3), or which (0,1,5).")] = None,
    data: Annotated[Text, typer.Option(help="Data set of all runs.")] = None,
    model: Annotated[Text, typer.Option(help="Network of all runs.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Length of all runs.")] = None,
    steps: Annotated[int | None, typer.Option(help="Length of all runs in steps, instead of epochs.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any key: --set base.optimizer.lr=0.05, --set overrides.rigl.method_options.every=20"
        ),
    ] = None,
    name: Annotated[Text, typer.Option(help="Name of the folder under runs/.")] = None,
    out: Annotated[Text, typer.Option(help="The folder itself.")] = None,
    jobs: Jobs = None,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what ran with another configuration.")] = False,
) -> None:
    """Run methods x sparsities (or patterns) x seeds, print the leaderboard and write the report.

    Finished runs are skipped and interrupted ones continued: the same command again completes a comparison.
    """
    from rarefy.errors import ConfigError
    from rarefy.training.reading import assignments, merge, read_mapping, read_recipe

    if config is not None and recipe is not None:
        raise ConfigError("give a configuration file or --recipe, not both")
    if config is None and recipe is None and methods is None:
        raise ConfigError("nothing to compare: give a YAML file, --recipe NAME or --methods rigl,static,...")
    read: dict[str, Any] = read_mapping(config) if config else read_recipe(recipe) if recipe else {}
    source = config.name if config else f"recipe {recipe}" if recipe else "the flags"
    base = {k: v for k, v in {"data": data, "model": model, "epochs": epochs, "steps": steps}.items() if v is not None}
    if "epochs" in base or "steps" in base:
        kept = {key: value for key, value in read.get("base", {}).items() if key not in ("epochs", "steps")}
        read = {**read, "base": kept}
    flags: dict[str, Any] = {"name": name, "out": out}
    flags["methods"] = None if methods is None else [part.strip() for part in methods.split(",") if part.strip()]
    flags["sparsities"] = None if sparsities is None else [_number(part, float) for part in sparsities.split(",")]
    flags["patterns"] = None if patterns is None else [part.strip() for part in patterns.split(",")]
    if seeds is not None:
        flags["seeds"] = [_number(part, int) for part in seeds.split(",")] if "," in seeds else _number(seeds, int)
    given = {key: value for key, value in flags.items() if value is not None}
    if methods is not None and "overrides" in read:  # of methods that are left out now
        read["overrides"] = {k: v for k, v in read["overrides"].items() if k in given["methods"]}
    if base:
        given["base"] = base
    if name is None and "name" not in read and config is not None:
        given["name"] = config.stem
    _go(merge(merge(read, assignments(set_ or [])), given), source, jobs, threads, force)


@app.command()
def demo(
    out: Annotated[Text, typer.Option(help="The folder to write.")] = None,
    jobs: Jobs = None,
    threads: Threads = None,
) -> None:
    """Train a small network on real images with every method at 90 % and 98 % sparsity, and report; a few minutes."""
    from rich.console import Console

    from rarefy import data
    from rarefy.training.reading import merge, read_recipe

    bundle = data.demo_data()
    Console().print(f"data: {bundle.note}", highlight=False, soft_wrap=True)
    base: dict[str, Any] = {"data": bundle.name}
    if bundle.name == "digits":  # an epoch is short there: evaluate about as often as on MNIST
        base["eval_every"] = 15
    given: dict[str, Any] = {"base": base} if out is None else {"base": base, "out": out}
    _go(merge(read_recipe("demo"), given), "recipe demo", jobs, threads, force=True)


def _go(mapping: dict[str, Any], source: str, jobs: int | None, threads: int | None, force: bool) -> None:
    from rich.console import Console

    from rarefy.cli.progress import ManyRuns
    from rarefy.cli.show import finish
    from rarefy.training.compare import compare as run_all
    from rarefy.training.plan import CompareConfig, Planned
    from rarefy.training.reading import validate
    from rarefy.training.signals import Interrupted

    console = Console()
    config = validate(CompareConfig, mapping, source)
    bars: list[ManyRuns] = []

    def begin(runs: list[Planned]) -> None:
        kinds = {kind: sum(run.action == kind for run in runs) for kind in ("run", "resume", "skip")}
        said = f"{len(runs)} runs in {runs[0].folder.parent}: {kinds['run']} to do"
        said += f", {kinds['resume']} to continue" if kinds["resume"] else ""
        said += f", {kinds['skip']} finished before" if kinds["skip"] else ""
        console.print(said, highlight=False, soft_wrap=True)
        bars.append(ManyRuns(runs, console))
        bars[0].__enter__()

    try:
        outcome = run_all(
            config,
            force=force,
            jobs=jobs,
            threads=threads,
            on_plan=begin,
            notify=lambda notice: bars[0](notice),
            source=source,
        )
    except Interrupted:
        raise Interrupted("stopped; the same command again goes on from here") from None
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)
    finish(outcome.folder)
    if outcome.failed:
        console.print(f"{len(outcome.failed)} of the runs failed: {', '.join(outcome.failed)}", style="red")
        raise typer.Exit(1)


def _number(text: str, kind: type[int] | type[float]) -> int | float:
    from rarefy.errors import ConfigError

    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
