"""Dynamic sparse training: drop the smallest weights, grow others, never be dense. SET and RigL."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rarefy.engine import Family, Layer, Method, Sparsifier
from rarefy.engine.options import check_clock, check_decay, check_fraction, check_free
from rarefy.errors import OptionError
from rarefy.methods.static import RandomStart, Static
from rarefy.schedules import Clock, decay


@dataclass(frozen=True, kw_only=True)
class Rewiring(Method):
    """What all methods that rewire on a clock share: when they do."""

    usual_stop: ClassVar[float | None] = None  # None: as long as training goes on
    every: int = 100
    start: int | float = 0
    stop: int | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clock(self.every, self.start, self.stop)

    def clock(self, total_steps: int | None) -> Clock:
        stop = self.usual_stop if self.stop is None and total_steps is not None else self.stop
        return Clock(every=self.every, start=self.start, stop=stop, total=total_steps)

    def due(self, sparse: Sparsifier, step: int) -> bool:
        """Whether masks change after this step: not after a run's last one, where what grows could not learn any more."""
        ends = sparse.clock.last is None and step == sparse.total_steps
        return sparse.clock.due(step) and not ends

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        if self.due(sparse, step):
            self.update(sparse, step)

    def update(self, sparse: Sparsifier, step: int) -> None:
        """Change the masks after optimizer step `step`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DropAndGrow(Rewiring, RandomStart):
    """What SET and its kin share: in each layer, drop a fraction of the smallest weights and grow as many."""

    usual_stop: ClassVar[float | None] = 0.75
    drop_fraction: float = 0.3
    decay: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("drop_fraction", self.drop_fraction, zero=False)
        check_decay(self.decay)

    def fraction(self, sparse: Sparsifier, step: int) -> float:
        """Return f(t), the fraction of each layer's kept weights that the update drops."""
        return decay(self.decay)(self.drop_fraction, sparse.clock.progress(step))

    def update(self, sparse: Sparsifier, step: int) -> None:
        fraction = self.fraction(sparse, step)
        for layer in self.ready(sparse):
            kept = layer.counts()
            survivors = layer.largest_magnitudes(int(kept.sum()) - int(fraction * int(kept.sum())))
            layer.rewire(survivors, self.grow(sparse, layer, kept - layer.counts(survivors), survivors))

    def ready(self, sparse: Sparsifier) -> Iterator[Layer]:
        """Yield the layers that have what the growth rule looks at; a warning names the others."""
        unseen = []
        for layer in sparse.layers.values():
            if self.can_grow(layer):
                yield layer
            else:
                unseen.append(layer.name)
        if unseen:
            warnings.warn(
                f"No finite gradient reached {', '.join(unseen)}: their masks stay as they are.", stacklevel=2
            )

    def can_grow(self, layer: Layer) -> bool:
        """Whether the layer has what the growth rule looks at."""
        return True

    def grow(self, sparse: Sparsifier, layer: Layer, counts: Tensor, survivors: Tensor) -> Tensor:
        """Choose the units to grow, outside the survivors."""
        return layer.random(counts, sparse.generator, besides=survivors)


@dataclass(frozen=True, kw_only=True)
class WholeRun(DropAndGrow):
    """What ITOP and SNFS share: updates until training ends, of a fraction that starts high and falls to a small one."""

    usual_stop: ClassVar[float | None] = None
    drop_fraction: float = 0.5
    final_fraction: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("final_fraction", self.final_fraction)
        if self.final_fraction > self.drop_fraction:
            raise OptionError(
                f"final_fraction={self.final_fraction} must not be above drop_fraction={self.drop_fraction}."
            )

    def fraction(self, sparse: Sparsifier, step: int) -> float:
        falling = decay(self.decay)(self.drop_fraction - self.final_fraction, sparse.clock.progress(step))
        return self.final_fraction + falling


@dataclass(frozen=True, kw_only=True)
class SET(DropAndGrow, Static):
    """Sparse evolutionary training: every few steps, drop the smallest weights and grow as many at random.

    Mocanu et al. 2018, Nature Communications 9 (arXiv 1707.04780); in the form that Evci et al. 2020 (arXiv 1911.11134)
    compare with: drop by |w|, grow from zero, a decaying drop fraction. Starts as `static`. At update step t, in each
    layer with n kept weights,

        k = floor(f(t) n),   f(t) = alpha/2 (1 + cos(pi t / T_end)),
        K = the n - k kept weights of largest |w|,
        R = k weights, uniformly at random, outside K,
        mask = K + R.

    Where the pattern prescribes a number per group (N:M, fan-in), a group grows as many as it has dropped.
    A grown weight starts at 0 with fresh optimizer state. A weight that is dropped and grown in one update keeps both.
    The update follows the optimizer step. The original drops the smallest positive and negative weights separately,
    once an epoch, with a constant fraction: set `decay="constant"` and `every` to the steps of an epoch.

    Options (beside those of `static`):
        drop_fraction: alpha, in (0, 1). Default 0.3 (both papers).
        every: steps between updates. Default 100 (RigL).
        start, stop: first and last step of updates; an int is a step, a float in [0, 1] a fraction of total_steps.
            Defaults 0 and three quarters of total_steps (RigL); without total_steps updates never stop and the drop
            fraction stays constant.
        decay: "cosine" (default), "linear", "constant" or "power".

    Raises as `static` does, OptionError where a fraction is given without total_steps, and PatternError for a pattern that
    chooses whole groups (transposable N:M).
    """

    name: ClassVar[str] = "set"
    family: ClassVar[Family] = "sparse to sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_free(self.pattern)


@dataclass(frozen=True, kw_only=True)
class RigL(SET):
    """RigL: like SET, but grow the weights whose gradient is largest.

    Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners" (arXiv 1911.11134, algorithm 1). As `set`, with

        R = the k weights outside K of largest |dL/dw|,

    the dense gradient of the update step, summed over its accumulated backward passes and averaged over ranks. It is the
    only dense gradient that is used: one step in `every`.
    A layer that no backward pass reached at an update step, or with an overflow, keeps its mask; a warning says so.

    Options, defaults and errors: those of `set` (alpha 0.3, every 100, stop at three quarters: the paper's).
    """

    name: ClassVar[str] = "rigl"
    family: ClassVar[Family] = "sparse to sparse"

    def wants_gradient(self, sparse: Sparsifier, step: int) -> bool:
        return self.due(sparse, step)

    def can_grow(self, layer: Layer) -> bool:
        return layer.has_gradient

    def grow(self, sparse: Sparsifier, layer: Layer, counts: Tensor, survivors: Tensor) -> Tensor:
        return layer.largest_gradients(counts, besides=survivors)
