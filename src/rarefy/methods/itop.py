"""In-time over-parameterisation: SET or RigL with rare and large updates, and the share of weights ever tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rarefy.engine import Family, Layer, Sparsifier
from rarefy.errors import OptionError
from rarefy.methods.dynamic import DropAndGrow, RigL, WholeRun


@dataclass(frozen=True, kw_only=True)
class ITOP(WholeRun, RigL):
    """ITOP: SET or RigL with long pauses between updates, so that all weights are tried in time.

    Liu et al. 2021, "Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse Training"
    (arXiv 2102.02887). A grown weight needs time before its magnitude says anything, and a network that has tried many
    weights ends better. So the updates are those of `set` or `rigl`, with many steps between them and a drop fraction
    that starts high and falls over the whole run,

        f(t) = f_end + (alpha - f_end)/2 (1 + cos(pi t / T)),

    and what counts is the share of weights that were ever kept, over the steps so far:

        R_s = |union over t of the masks| / N.

    It starts at the density and never falls: `sparse.explored()` is R_s now, `sparse.memory["explored"]` the list of
    [step, R_s] after every update.

    Where the reference code differs: it drops by |w| > threshold (ties fall too) and grows each weight with a
    probability, so that the number kept drifts. Here both are exact.

    Options (beside those of `rigl`):
        growth: "random" (default, SET-ITOP) or "gradient" (RigL-ITOP).
        drop_fraction: alpha. Default 0.5, and
        final_fraction: f_end, below it. Default 0.005 (both the paper's).
        every: steps between updates. Default 1500, the paper's for random growth on CIFAR (250 epochs of 391 steps); its
            value for growth by gradient is 4000. A shorter run wants as many updates, not as many steps: about 65 in all.
        stop: as `set`, but by default updates go on to the end of training.

    Raises as `rigl` does.
    """

    name: ClassVar[str] = "itop"
    family: ClassVar[Family] = "sparse to sparse"
    growth: str = "random"
    every: int = 1500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.growth not in ("random", "gradient"):
            raise OptionError(f"growth={self.growth!r} must be 'random' or 'gradient'.")

    def initialise(self, sparse: Sparsifier) -> None:
        super().initialise(sparse)
        sparse.memory["explored"] = [[0, sparse.explored()]]

    def update(self, sparse: Sparsifier, step: int) -> None:
        super().update(sparse, step)
        sparse.memory["explored"] = [*sparse.memory["explored"], [step, sparse.explored()]]

    def wants_gradient(self, sparse: Sparsifier, step: int) -> bool:
        return self.growth == "gradient" and super().wants_gradient(sparse, step)

    def can_grow(self, layer: Layer) -> bool:
        return self.growth == "random" or super().can_grow(layer)

    def grow(self, sparse: Sparsifier, layer: Layer, counts: Tensor, survivors: Tensor) -> Tensor:
        rule = RigL.grow if self.growth == "gradient" else DropAndGrow.grow
        return rule(self, sparse, layer, counts, survivors)
