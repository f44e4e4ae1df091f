"""Random pruning before training, as its paper does it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.engine import Family, Layer, Sparsifier, dead_units
from rarefy.engine.options import check_flag
from rarefy.engine.sharing import share
from rarefy.errors import AllocationError, OptionError, nearest
from rarefy.methods.grasp import GraSP
from rarefy.methods.snip import SNIP, BeforeTraining
from rarefy.methods.static import Static
from rarefy.methods.synflow import SynFlow
from rarefy.patterns import NM

BORROWED: Mapping[str, type[BeforeTraining]] = MappingProxyType({cls.name: cls for cls in (SNIP, GraSP, SynFlow)})
"""The criteria whose layer densities can be borrowed."""


@dataclass(frozen=True, kw_only=True)
class RandomPruning(Static):
    """Random pruning before training: draw a random mask at sensible layer densities, and train what is left.

    Liu et al. 2022, "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training"
    (arXiv 2202.02643). Layer l keeps n_l = d_l N_l of its N_l weights, at positions drawn uniformly at random; the weights
    are those of the dense network, and the mask never changes. The densities d_l come from the layers' shapes, or from a
    criterion that is asked once and whose positions are thrown away.

    What differs from `static`: the weights are not scaled up to make good for the missing ones, densities can be borrowed,
    and units that the mask has cut off are reported, or ruled out.

    Options:
        sparsity: fraction of zeros over the sparse layers, in [0, 1). Default 0.9.
        allocation: "erk" (default, as the paper's CIFAR runs), "er", "erk+" (last layer dense), "uniform", "uniform+"
            (first layer dense, last at least 0.2 dense; in the version that keeps the whole budget, which the paper's code
            does not), "snip", "grasp" or "synflow" (that method's layer densities, with its own defaults), or sparsities by
            layer-name glob. "global" and "lamp" borrow from |w|.
        draw: "exact" (default) keeps n_l weights in layer l; "bernoulli" keeps each weight with probability d_l, as the
            paper's code does, so that the number kept varies. Bernoulli is for patterns of one group.
        connected: True keeps at least one weight at every output and every input of every layer (of each group of a grouped
            convolution): max(outputs, inputs) random weights that meet them all come first, then the rest at random.
            Default False (the paper's).
        pattern: "unstructured" (default), "N:M", "RxC", "channel", "column", "fan-in", "groupG".
        init: "dense" (default, the paper's) or "fan-in", see `static`: the paper's code has it as an option.

    "snip", "grasp" and "synflow" need `calibration=[batch, ...]` as those methods do.

    Raises AllocationError where a layer would keep nothing, or too little to be connected; PatternError where a layer does
    not fit the pattern; OptionError as the criterion does. Warns when outputs keep no weight, or inputs are not read.
    """

    name: ClassVar[str] = "random-pruning"
    family: ClassVar[Family] = "before training"
    more_rules: ClassVar[Mapping[str, type[BeforeTraining]]] = BORROWED
    init: str = "dense"
    draw: str = "exact"
    connected: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draw not in ("exact", "bernoulli"):
            raise OptionError(
                f"draw={self.draw!r} must be 'exact' or 'bernoulli'{nearest(str(self.draw), ('exact', 'bernoulli'))}."
            )
        check_flag("connected", self.connected)
        if self.connected and self.draw == "bernoulli":
            raise OptionError(
                "connected=True sets weights by hand, and draw='bernoulli' draws each by itself: choose one."
            )

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]  # the allocation decides
        return self._criterion is not None

    @property
    def _criterion(self) -> type[BeforeTraining] | None:
        return BORROWED.get(self.allocation) if isinstance(self.allocation, str) else None

    def choose(self, sparse: Sparsifier) -> None:
        for name, counts in self._counts(sparse).items():
            layer = sparse.layers[name]
            if not layer.given:
                layer.rewire(*self._positions(layer, counts, sparse.generator))
        if dead := dead_units(layer for layer in sparse.layers.values() if not _of_whole_units(layer)):
            shown = "; ".join(map(str, dead[:8])) + (f"; and in {len(dead) - 8} more layers" if len(dead) > 8 else "")
            mend = "" if self.connected else " Lower the sparsity, or ask for connected=True."
            warnings.warn(f"Random pruning cut units off: {shown}.{mend}", stacklevel=2)

    def _counts(self, sparse: Sparsifier) -> dict[str, Tensor]:
        if self._criterion is None:
            return share(sparse.layers, self.sparsity, self.allocation, sparse.magnitudes)
        self._criterion(sparsity=self.sparsity, pattern=self.pattern).choose(sparse)
        return {name: layer.counts().cpu() for name, layer in sparse.layers.items()}

    def _positions(self, layer: Layer, counts: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        if self.draw == "bernoulli":
            return (layer.random(_binomial(layer, counts, generator), generator),)
        if not self.connected:
            return (layer.random(counts, generator),)
        runs_along = layer.pattern.dim if isinstance(layer.pattern, NM) else None
        cover = layer.at(meeting_all(layer.shape, layer.channel_groups, generator, runs_along))
        needed = layer.counts(cover).cpu()
        if bool((needed > counts).any()):
            raise AllocationError(
                f"{layer.name} {list(layer.shape)} is to keep {int(counts.sum())} units of pattern {layer.pattern}; to meet "
                f"every output and input it needs {int(torch.maximum(needed, counts).sum())}. Lower the sparsity, or set "
                "connected=False."
            )
        return cover, layer.random(counts - needed, generator, besides=cover)


def _of_whole_units(layer: Layer) -> bool:
    """Whether the pattern prunes whole outputs or inputs: cutting them off is then what was asked for."""
    return layer.pattern.unit_size(layer.shape) >= layer.numel // max(layer.shape[:2])


def meeting_all(
    shape: tuple[int, ...], groups: int, generator: torch.Generator, runs_along: int | None = None
) -> Tensor:
    """Draw the fewest positions of a weight that meet each row and each column of every group; flat int64, no repeats.

    Args:
        shape: (rows, columns, taps...); the rows are cut into `groups` of equal size, each with columns of its own.
        runs_along: the dimension (0 rows, 1 columns) of an N:M pattern: neighbours along it then lie in different columns
            or rows, as far as there are enough, so that no run of M holds more positions than it must.
    """
    rows, columns = shape[0] // groups, shape[1]
    taps = torch.Size(shape[2:]).numel()
    longest = torch.arange(max(rows, columns))
    found = []
    for group in range(groups):
        row, column = longest % rows, longest % columns
        if runs_along != 0:
            row = torch.randperm(rows, generator=generator)[row]
        if runs_along != 1:
            column = torch.randperm(columns, generator=generator)[column]
        row = row + group * rows
        tap = torch.randint(taps, longest.shape, generator=generator)
        found.append((row * columns + column) * taps + tap)
    return torch.cat(found)


def _binomial(layer: Layer, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Draw how many units are kept when each is with the same probability: given that number, all places are equal."""
    if layer.groups > 1:
        raise OptionError(
            f"{layer.name} {list(layer.shape)}: pattern {layer.pattern} prescribes how many weights each of its groups keeps; "
            "draw='bernoulli' cannot."
        )
    units = torch.tensor([float(layer.units_per_group)], dtype=torch.float64)
    return torch.binomial(units, counts.double() / units, generator=generator).long()
