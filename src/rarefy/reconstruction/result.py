"""What `convert` did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rarefy.engine import LeftOut
from rarefy.patterns import Pattern
from rarefy.rearrangement import Rearrangement
from rarefy.reconstruction.solvers import Solver


@dataclass(frozen=True, eq=False)
class Converted:
    """One converted weight.

    Attributes:
        name, shape: of the weight.
        mask: bool, weight-shaped, True = kept.
        kept: share of sum |w| that the mask keeps.
        masked, solved: mean square of (output wanted - output), over calibration samples and outputs: with the masked weights,
            and with those that the layer has now.
        power: mean square of the output wanted, so that solved / power is the relative error.
    """

    name: str
    shape: tuple[int, ...]
    mask: Tensor
    kept: float
    masked: float
    solved: float
    power: float


@dataclass(frozen=True, eq=False)
class Conversion:
    """What `convert` did; `str()` of it is a table.

    Attributes:
        pattern, solver: as asked; solver None: masks alone.
        layers: the converted weights, in the order in which the network calls them.
        dense: weights that were left dense, each with the reason.
        rearrangement: what the channel permutation did; None without one.
    """

    pattern: Pattern
    solver: Solver | None
    layers: tuple[Converted, ...]
    dense: tuple[LeftOut, ...]
    rearrangement: Rearrangement | None

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by parameter name."""
        return {layer.name: layer.mask for layer in self.layers}

    def __str__(self) -> str:
        rows = [("weight", "shape", "kept |w|", "error, masked", "error now")]
        for layer in self.layers:
            power = layer.power or 1.0
            rows.append(
                (layer.name, "x".join(map(str, layer.shape)), f"{layer.kept:.1%}", f"{layer.masked / power:.3%}",
                 f"{layer.solved / power:.3%}")
            )  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        by = "masks alone" if self.solver is None else str(self.solver)
        moved = (
            "" if self.rearrangement is None else f", channels permuted ({self.rearrangement.gain:+.2%} of |w| kept)"
        )
        dense = [f"dense: {item.name} {list(item.shape)}: {item.reason}" for item in self.dense]
        return "\n".join([f"{self.pattern}, {by}{moved}; errors as shares of the output's mean square", *lines, *dense])
