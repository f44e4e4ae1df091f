"""`rarefy simulate`: cycle models of published accelerators."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli import app
from rarefy.cli.show import WIDE

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rarefy.systems.sat import Comparison

simulate = typer.Typer(
    name="simulate",
    help="Simulate a training step on an accelerator, cycle by cycle of its units.",
    no_args_is_help=True,
)
app.add_typer(simulate)


@simulate.callback()
def _group() -> None:
    pass  # keeps `sat` a command of its own


@simulate.command()
def sat(
    model: Annotated[str, typer.Option(help="Network, such as resnet-18, vgg-19-bn, vit.")],
    pattern: Annotated[str, typer.Option(help="N:M, such as 2:8.")] = "2:8",
    batch: Annotated[int, typer.Option(help="Samples of a training step.")] = 128,
    image: Annotated[
        int | None, typer.Option(help="Pixels of an image's side; by default 224 for ImageNet's networks, else 32.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Outputs; by default the network's own.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the network: --option stem=small. May be repeated.")
    ] = None,
    dense: Annotated[
        list[str] | None,
        typer.Option(help="A layer (glob) to keep dense beside the first and the last. May be repeated."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file with the accelerator's parameters.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A parameter: --set bandwidth=12.8. May be repeated; over --config."),
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="table or json.")] = "table",
    schedule: Annotated[
        Path | None, typer.Option(help="Write the static instruction list to this file, as JSON.")
    ] = None,
) -> None:
    """Simulate BDWP training on SAT (arXiv 2309.13015): cycles, utilisation and an energy proxy for each layer.

    Beside dense training, SR-STE (only the forward pass pruned), pruning anew before each product, and no interleaving,
    all on the same accelerator. No weights are needed: shapes are read from a run on torch's meta device.
    """
    import json

    from rarefy._files import atomic_write
    from rarefy.errors import OptionError, nearest
    from rarefy.systems.sat import accelerator, compare
    from rarefy.systems.sat.report import to_dict
    from rarefy.training.reading import assignments, merge, read_mapping

    if format_ not in ("table", "json"):
        raise OptionError(f"--format {format_!r} is neither table nor json{nearest(format_, ('table', 'json'))}")
    if batch < 1:
        raise OptionError(f"--batch {batch}: a training step needs at least one sample")
    fields = merge(read_mapping(config) if config else {}, assignments(set_ or []))
    array = accelerator(fields, config.name if config and not set_ else "the accelerator")
    net, example, shape = _network(model, batch, image, classes, assignments(option or []))
    found = compare(net, example, pattern, array, dense=dense or ())
    if schedule is not None:
        steps = [step.to_dict() for step in found.sparse.instructions]
        with atomic_write(schedule, "w") as file:
            file.write(json.dumps(steps, indent=1) + "\n")
    if format_ == "json":
        typer.echo(json.dumps({"model": shape, **to_dict(found)}, indent=1))
    else:
        _print(found, shape)


def _network(
    name: str, batch: int, image: int | None, classes: int | None, given: dict[str, Any]
) -> tuple[nn.Module, Tensor, str]:
    """Return a network and a batch for it on the meta device, and how they are called."""
    import torch

    from rarefy import models
    from rarefy.errors import ModelError

    name = models.find(name)
    known = models.options(name)
    if image is not None and "image_size" not in known:
        raise ModelError(f"{name} reads no images: leave out --image")
    usual = known.get("image_size") or (224 if known["num_classes"] == 1000 else 32)
    side = given.get("image_size", usual) if image is None else image
    sizes = {"num_classes": classes, "image_size": side if "image_size" in known else None}
    with torch.device("meta"):
        net = models.build(name, **{**{key: value for key, value in sizes.items() if value is not None}, **given})
        if "image_size" not in known:
            length = given.get("context", known["context"])
            return net, torch.zeros(batch, length, dtype=torch.long), f"{name}, {batch} x {length} tokens"
        channels = given.get("in_channels", known["in_channels"])
        return net, torch.empty(batch, channels, side, side), f"{name}, {batch} x {channels}x{side}x{side}"


def _print(found: Comparison, shape: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rarefy.report.numbers import si
    from rarefy.systems.sat.report import rows

    console = Console(width=max(WIDE, Console().width))  # a narrow terminal breaks lines rather than columns
    array, run = found.sparse.array, found.sparse
    console.print(
        f"{shape}; {run.pattern} on {array.rows} x {array.columns} PEs at {array.mhz:g} MHz, {array.bandwidth:g} GB/s "
        f"(dense peak {array.peak_gflops:.1f} GFLOP/s). Cycles of one training step:", highlight=False,
    )  # fmt: skip
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("layer", overflow="fold")
    table.add_column("weights", overflow="fold")
    for heading in ("FF", "BP", "WU", "update", "all", "dense", "used", "GFLOP/s", "energy", "vs dense", "vs FF only",
                    "vs no pre-gen.", "vs no interl."):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows(found):
        ratios = (row.speedup, row.against_ff, row.against_no_pregeneration, row.against_no_interleaving)
        stages = (row.ff, row.bp, row.wu, row.update)
        table.add_row(
            Text(row.layer.removesuffix(".weight")), Text(row.pattern), *(si(c) if c else "" for c in stages),
            si(row.cycles), si(row.dense_cycles), f"{row.utilisation:.1%}", f"{row.gflops:.1f}", si(row.energy),
            *(f"{ratio:.2f}x" for ratio in ratios), style="bold" if row.layer == "total" else "",
        )  # fmt: skip
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for layer in run.layers:
        if layer.dense_because:
            reasons.setdefault(layer.dense_because, []).append(layer.name)
    for reason, names in reasons.items():
        names = [name.removesuffix(".weight") for name in names]
        many = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        console.print(Text(f"dense: {many}: {reason}"), soft_wrap=True)
    for missing in run.not_modelled:
        console.print(Text(f"not modelled: {missing}", style="yellow"), soft_wrap=True)
    console.print(
        f"{found.speedup:.2f} times as fast as dense training ({found.product_speedup:.2f} if passes over data are hidden "
        f"behind products; {found.bound:.2f} by multiply-adds alone); {run.seconds:.3f} s a step, {run.utilisation:.1%} of "
        f"the array used.\nA model's cycles, no measurement. Energy: multiply-adds and vector operations at "
        f"{array.energy_mac:g}, bytes of memory at {array.energy_byte:g} each; a proxy.", highlight=False, soft_wrap=True,
    )  # fmt: skip
