"""`rarefy inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli import app


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A safetensors file, or one of torch.save.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Tell the sparsity and the pattern of every weight in a checkpoint; no code in the file is run."""
    import json as to_json

    from rarefy.analysis import inspect_checkpoint

    found = inspect_checkpoint(checkpoint)
    typer.echo(to_json.dumps(found.to_dict(), indent=1) if json else str(found))
