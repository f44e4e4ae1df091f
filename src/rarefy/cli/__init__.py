"""The command line. Each command imports what it needs when it runs, so that `rarefy --help` stays quick."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

HINT = "Errors in what was asked end with exit code 2, failed runs with 1, Ctrl-C with 130."


class _Group(TyperGroup):
    """Turns rarefy's own errors into one clear line, and Ctrl-C into exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            _fail(str(error) or "stopped", "yellow")
            raise typer.Exit(130) from error
        except Exception as error:
            from rarefy.errors import RarefyError

            if not isinstance(error, RarefyError):
                raise
            _fail(str(error), "red")
            raise typer.Exit(2) from error


def _fail(text: str, color: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(text, style=color))


app = typer.Typer(
    cls=_Group,
    name="rarefy",
    help="Make PyTorch networks sparse, train them, compare methods fairly, and report what it cost and gained.",
    epilog=HINT,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from rarefy import __version__

        typer.echo(f"rarefy {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


from rarefy.cli import (  # noqa: E402  (they register their commands on `app`)
    bench,
    compare,
    convert,
    export,
    inspect,
    search,
    show,
    simulate,
    train,
)

__all__ = ["app", "bench", "compare", "convert", "export", "inspect", "main", "search", "show", "simulate", "train"]


def main() -> None:
    """Run the command line."""
    app(prog_name="rarefy")


if __name__ == "__main__":
    main()
