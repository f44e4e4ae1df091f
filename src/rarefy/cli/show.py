"""`rarefy methods`, `rarefy report`, `rarefy config`."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli import app

WIDE = 176  # columns: room for the whole leaderboard


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method: print all about it. Without: the list.")] = None,
) -> None:
    """List the methods, or explain one: paper, equations, options, defaults, errors."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rarefy import methods as known
    from rarefy.engine import FAMILIES

    console = Console()
    if name is None:
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        table.add_column("method", no_wrap=True)
        table.add_column("what it does")
        table.add_column("options")
        for family, members in known.by_family().items():
            table.add_row(Text(family, style="cyan"), Text(FAMILIES[family], style="dim"))
            for method, cls in members.items():
                first = (inspect.getdoc(cls) or "").splitlines()[0]
                table.add_row(Text(f"  {method}", style="bold"), first, ", ".join(o.name for o in _options(cls)))
        console.print(table)
        console.print(Text("rarefy methods NAME tells all about one of them.", style="dim"))
        return
    cls = known.find(name)
    names = ", ".join((cls.name, *cls.aliases))
    console.print(Text(f"{names}  (rarefy.methods.{cls.__name__}; {cls.family})", style="bold"))
    console.print(Text(inspect.getdoc(cls) or "", overflow="fold"), soft_wrap=True)
    if options := _options(cls):
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for heading in ("option", "type", "default"):
            table.add_column(heading, no_wrap=heading == "option")
        for option in options:
            table.add_row(option.name, str(option.type), repr(option.default))
        console.print()
        console.print(table)


def _options(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    return list(dataclasses.fields(cls))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a comparison or of one run.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file to write.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown instead, and write nothing.")
    ] = False,
    without: Annotated[str, typer.Option(help="Columns that --markdown leaves out, separated by commas.")] = "",
) -> None:
    """Print the leaderboard of finished runs again and write the HTML page."""
    if not markdown:
        return finish(folder, out)
    from rarefy.report import collect, leaderboard
    from rarefy.report import markdown as table

    names = [part.strip() for part in without.split(",") if part.strip()]
    typer.echo(table(leaderboard(collect(folder)), names), nl=False)
    return None


def finish(folder: Path, out: Path | None = None) -> None:
    """Print the leaderboard of a folder, and write table.json and the page."""
    from rich.console import Console

    from rarefy.report import collect, leaderboard, print_leaderboard, write_html, write_table

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=WIDE)  # into a file or a log: nothing has to be left out
    comparison = collect(folder)
    rows = leaderboard(comparison)
    console.print()
    print_leaderboard(console, rows, comparison)
    if not comparison.single:
        write_table(folder / "table.json", comparison, rows)
    page = write_html(folder, out)
    console.print()
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


@app.command()
def config() -> None:
    """Print versions, processor, threads and native kernels: what to put in a question or a bug report."""
    import rarefy

    typer.echo(str(rarefy.show_config()))
