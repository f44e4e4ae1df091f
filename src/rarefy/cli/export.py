"""`rarefy export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli import app


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run that `rarefy train` has finished.")],
    format: Annotated[str, typer.Option(help="onnx, or safetensors (kept values and their indices).")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="The file; by default model.FORMAT in the run's folder.")] = None,
) -> None:
    """Write a trained network for other runtimes; zeros stay exactly zero."""
    from rich.console import Console

    from rarefy.deploy import export_onnx, save
    from rarefy.errors import OptionError, nearest
    from rarefy.training.finished import finished_network

    formats = ("onnx", "safetensors")
    if format not in formats:
        raise OptionError(
            f"--format {format} is not known{nearest(format, formats)}; it is one of {', '.join(formats)}"
        )
    model, inputs = finished_network(run)
    path = out if out is not None else run / f"model.{format}"
    if format == "onnx":
        export_onnx(model, inputs.example, path)
    else:
        save(model, path)
    weights = [p for p in model.parameters() if p.dim() > 1]
    kept, whole = sum(int(p.count_nonzero()) for p in weights), sum(p.numel() for p in weights)
    Console(soft_wrap=True).print(
        f"{path}: {path.stat().st_size:,} bytes; {kept:,} of {whole:,} weights are not zero", highlight=False
    )
