"""`rarefy bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli import app


@app.command()
def bench(
    threads: Annotated[list[int] | None, typer.Option(help="Numbers of threads; by default one, and all.")] = None,
    product: Annotated[
        list[str] | None,
        typer.Option(help="ROWSxCOLSxCOLUMNS, for planes, or ROWSxCOLSxSAMPLES:linear; by default a range of layers."),
    ] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Fractions of zeros; by default 0.7 to 0.99.")] = None,
    seconds: Annotated[float, typer.Option(help="How long each way is measured.")] = 0.03,
    json: Annotated[Path | None, typer.Option(help="Write everything to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write an SVG picture to this file.")] = None,
) -> None:
    """Measure this machine and its sparse kernels: speed, share of what is possible, and where sparse beats dense."""
    import json as to_json

    import torch
    from rich.console import Console
    from rich.table import Table

    from rarefy.bench import as_json, break_even, ceilings, measure, speedups_svg
    from rarefy.bench.table import PRODUCTS, SPARSITIES
    from rarefy.errors import OptionError

    products = [_product(text) for text in product] if product else list(PRODUCTS)
    levels = sparsity or list(SPARSITIES)
    if wrong := [s for s in levels if not 0 <= s < 1]:
        raise OptionError(f"--sparsity {wrong[0]} lies outside [0, 1): it is the fraction of zeros")
    before = torch.get_num_threads()
    counts = threads or sorted({1, before})
    if min(counts) < 1:
        raise OptionError(f"--threads {min(counts)}: at least one thread is needed")
    console, machines, rows = Console(width=max(110, Console().width)), [], []
    try:
        for count in counts:
            torch.set_num_threads(count)
            machine = ceilings(count, seconds)
            machines.append(machine)
            reads = ", ".join(f"{name} {speed:.0f}" for name, speed in machine.bandwidth.items())
            console.print(
                f"{count} threads: {machine.gflops:.0f} GFLOP/s at most; reading, GB/s: {reads}", highlight=False
            )
            table = Table(
                "product", "sparsity", "us", "dense us", "times", "GFLOP/s kept", "of peak", "of memory", box=None
            )
            for row in measure(machine, products, levels, seconds):
                rows.append(row)
                table.add_row(
                    row.product, f"{row.sparsity:.0%}", f"{1e6 * row.seconds:.1f}",
                    f"{1e6 * row.dense_seconds:.1f} {row.dense}", f"{row.speedup:.2f}", f"{row.gflops:.1f}",
                    f"{row.share_of_peak:.0%}", f"{row.share_of_dram:.0%}",
                )  # fmt: skip
            console.print(table)
            for name, at in break_even([r for r in rows if r.threads == count]).items():
                console.print(f"  {name}: sparse is faster from {at:.0%} on", highlight=False)
    finally:
        torch.set_num_threads(before)
    if json is not None:
        json.write_text(to_json.dumps(as_json(machines, rows), indent=1) + "\n")
    if plot is not None:
        first = machines[0].threads
        plot.write_text(speedups_svg([r for r in rows if r.threads == first], f"rarefy on {first} thread(s)"))


def _product(text: str) -> Any:
    from rarefy.bench import Product
    from rarefy.errors import OptionError

    sizes, _, form = text.partition(":")
    numbers = sizes.split("x")
    if (
        len(numbers) != 3
        or not all(n.isdecimal() and int(n) > 0 for n in numbers)
        or form not in ("", "planes", "linear")
    ):
        raise OptionError(f"--product {text!r} is not ROWSxCOLSxCOLUMNS or ROWSxCOLSxSAMPLES:linear, as in 512x512x196")
    rows, cols, columns = map(int, numbers)
    return Product(rows, cols, columns, form or "planes")
