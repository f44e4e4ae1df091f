"""`rarefy convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli import app

Layers = list[str] | None


@app.command()
def convert(
    run: Annotated[Path | None, typer.Argument(help="The folder of a run that `rarefy train` has finished.")] = None,
    pattern: Annotated[str, typer.Option(help="N:M, such as 2:4 or 1:16; 4:8t: transposable.")] = "2:4",
    published: Annotated[
        str | None, typer.Option(help="Published weights of this name instead of a run: resnet-20-cifar10, ...")
    ] = None,
    solver: Annotated[str, typer.Option(help="least-squares, adaprune, or none for masks alone.")] = "least-squares",
    permute: Annotated[bool, typer.Option(help="First reorder channels so that the pattern keeps more.")] = False,
    samples: Annotated[int, typer.Option(help="Training samples to calibrate on.")] = 256,
    include: Annotated[Layers, typer.Option(help="Only these layers, by name or glob. May be repeated.")] = None,
    exclude: Annotated[Layers, typer.Option(help="A layer to keep dense, by name or glob. May be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file; by default beside the run's checkpoint.")] = None,
) -> None:
    """Make a trained network N:M sparse without training: masks by magnitude, weights solved anew layer by layer.

    Writes a safetensors file (kept values and their indices; `rarefy.load` reads it into the network), and tells the accuracy
    on the test set before and after. Nothing is chosen by it.
    """
    from rich.console import Console

    import rarefy
    from rarefy.deploy import save
    from rarefy.errors import OptionError
    from rarefy.training.evaluate import evaluate
    from rarefy.training.finished import finished_network, published_network, some_inputs

    if (run is None) == (published is None):
        raise OptionError("name what to convert: the folder of a run, or --published NAME, and not both")
    net, inputs = finished_network(run) if run is not None else published_network(str(published))
    before = evaluate(net, inputs.test)
    report = rarefy.convert(
        net, pattern, some_inputs(inputs, samples), solver=None if solver == "none" else solver, permute=permute,
        include=include or None, exclude=exclude or None,
    )  # fmt: skip
    after = evaluate(net, inputs.test)
    tag = str(report.pattern).replace(":", "of")
    path = out or (run / f"model-{tag}.safetensors" if run is not None else Path(f"{published}-{tag}.safetensors"))
    save(net, path)
    console = Console(soft_wrap=True)
    console.print(str(report), highlight=False, markup=False)
    console.print(
        f"test accuracy {before['accuracy']:.2%} before, {after['accuracy']:.2%} now (loss {before['loss']:.4f}, "
        f"{after['loss']:.4f})\ndata: {inputs.note}\n{path}: {path.stat().st_size:,} bytes", highlight=False, markup=False,
    )  # fmt: skip
