"""`rarefy train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli import app

Text = str | None


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="A YAML file with the run's keys. Flags override it.")] = None,
    data: Annotated[Text, typer.Option(help="Data set, such as digits, mnist, cifar10.")] = None,
    model: Annotated[Text, typer.Option(help="Network, such as lenet-300-100, resnet-20.")] = None,
    method: Annotated[Text, typer.Option(help="Method; `rarefy methods` lists them.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction of zeros, in [0, 1).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples in a batch.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate (optimizer.lr).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, data order, masks and all else.")] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu or cuda.")] = None,
    precision: Annotated[Text, typer.Option(help="32, bf16 or 16.")] = None,
    threads: Annotated[int | None, typer.Option(help="torch threads.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other key: --set optimizer.momentum=0.8. May be repeated.")
    ] = None,
    name: Annotated[Text, typer.Option(help="Name of the folder under runs/.")] = None,
    out: Annotated[Text, typer.Option(help="The run folder itself.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is there already.")] = False,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder, exactly.")] = None,
) -> None:
    """Train one network and write its run folder: configuration, metrics, masks, checkpoint, result."""
    from rich.console import Console

    from rarefy.cli.progress import OneRun
    from rarefy.errors import ConfigError
    from rarefy.training.config import RunConfig
    from rarefy.training.folder import RunFolder
    from rarefy.training.reading import assignments, merge, read_mapping, validate
    from rarefy.training.signals import Interrupted

    flags: dict[str, Any] = {
        "data": data, "model": model, "method": method, "sparsity": sparsity, "epochs": epochs, "steps": steps,
        "batch_size": batch_size, "seed": seed, "device": device, "precision": precision, "threads": threads,
        "name": name, "out": out, "optimizer": None if lr is None else {"lr": lr},
    }  # fmt: skip
    given = {key: value for key, value in flags.items() if value is not None}
    console = Console()
    if resume is not None:
        if config is not None or set_ or (extra := [key for key in given if key != "threads"]):
            said = ", ".join(extra) if config is None and not set_ else "a configuration"
            raise ConfigError(f"--resume goes on with the run's own configuration: leave out {said}")
        home = RunFolder(resume)
        run = home.read_config()
        if home.status() == "finished":
            console.print(f"{resume} is finished: nothing to resume", highlight=False)
            return
    else:
        read = read_mapping(config) if config is not None else {}
        if "epochs" in given or "steps" in given:  # a length by flag replaces either length in the file
            read = {key: value for key, value in read.items() if key not in ("epochs", "steps")}
        source = config.name if config is not None else "the flags"
        run = validate(RunConfig, merge(merge(read, assignments(set_ or [])), given), source)
        home = RunFolder(run.out or Path("runs") / run.run_name())
        run.build_method()  # refuse bad options before the slow imports
    from rarefy.training.loop import train as train_run

    try:
        with OneRun(home.path.name, console) as bar:
            result = train_run(run, home.path, resume=resume is not None, force=force, threads=threads, report=bar)
    except Interrupted:
        raise Interrupted(f"stopped; rarefy train --resume {home.path} goes on from here") from None
    sparse = "" if run.sparsity is None else f", sparsity {result['sparsity']:.4f}"
    text = f"{home.path}: accuracy {100 * result['accuracy']:.2f} %{sparse}, {result['seconds']:.1f} s"
    for evaluation, share in result["evaluations"].items():
        text += f"\n{evaluation}: {100 * share:.2f} %"
    console.print(f"{text}\ndata: {result['dataset_note']}", highlight=False, soft_wrap=True)
