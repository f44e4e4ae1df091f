"""N:M along rows and columns at once: masks that a weight and its transpose both run with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import BoolTensor, Tensor

from rarefy.errors import OptionError, PatternError, nearest
from rarefy.kernels import transposable_nm
from rarefy.kernels.transposable import LARGEST_M, SOLVERS
from rarefy.patterns.base import Fold, Pattern


@dataclass(frozen=True)
class TransposableNM(Pattern):
    """n weights kept in every row and every column of each m x m tile, so that W and its transpose are both N:M.

    A layer's forward product runs along the rows of W, the product of its backward pass along the columns; a mask that is N:M
    along both speeds up two of the three products of training. Tiles lie in the (out, in) plane, separately at every kernel
    position of a convolution, as the groups of `NM` do: a mask of "4:8t" is one of "4:8" and of "4:8@0". A tile is a group,
    its weights are the units: G = numel / m^2, U = m^2. The sparsity is 1 - n/m and nothing else. A mask obeys with n or
    fewer in each row and column of a tile.

    The best mask is found by a solver, see `rarefy.kernels.transposable_nm`. Units are coupled: a tile's mask is chosen as a
    whole, so methods that drop and grow weights one by one cannot use the pattern; stages of gradual pruning keep k:m with
    falling k, each within the one before.

    Attributes:
        n: weights kept per row and column of a tile, 1 <= n <= m.
        m: side of a tile, at most 32.
        solver: "fast" (default), "exact" or "approx".

    Raises:
        PatternError: n > m, n < 1 or m > 32.
        OptionError: the solver is unknown.

    Source: Hubara et al. 2021, "Accelerated sparse neural training: a provable and efficient method to find N:M transposable
    masks", arXiv 2102.08124 (there N counts the zeros).

    Example:
        >>> import torch
        >>> from rarefy.patterns import TransposableNM
        >>> TransposableNM(1, 2).project(torch.tensor([[9.0, 8.0], [7.0, 1.0]]), keep=2)
        tensor([[False,  True],
                [ True, False]])
        >>> str(TransposableNM(4, 8)), str(TransposableNM(4, 8, "exact"))
        ('4:8t', '4:8t-exact')
    """

    n: int
    m: int
    solver: str = "fast"
    coupled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.n > self.m:
            raise PatternError(
                f"{self}: cannot keep {self.n} of {self.m}; N:M needs N <= M, such as {self.m}:{self.n}t"
            )
        if self.n < 1 or self.m > LARGEST_M:
            raise PatternError(f"{self}: n must be 1 or more, and tiles have sides of {LARGEST_M} at most")
        if self.solver not in SOLVERS:
            raise OptionError(
                f"solver={self.solver!r} is not known{nearest(self.solver, SOLVERS)}; it is one of {', '.join(SOLVERS)}"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}t" + ("" if self.solver == "fast" else f"-{self.solver}")

    @property
    def fixed_sparsity(self) -> float:
        """The only sparsity there is: 1 - n/m."""
        return 1.0 - self.n / self.m

    def keep(self, shape: Sequence[int], density: float | None = None) -> int:
        """Return n * m, the number kept in every tile.

        Raises:
            OptionError: density is given and differs from n/m by more than 1e-9.
            PatternError: the shape does not fit.
        """
        self.check(shape)
        self._check_density(density)
        return self.n * self.m

    def stage(self, shape: Sequence[int], density: float) -> int:
        return math.floor(density * self.m + 0.5) * self.m

    def choose(self, scores: Tensor, keep: int | Tensor) -> Tensor:
        tiles = scores.reshape(-1, self.m)
        return transposable_nm(tiles, self._per_line(keep), self.m, self.solver).view(scores.shape)

    def _best(self, scores: Tensor, keep: int | Tensor) -> Tensor:
        mask = transposable_nm(scores.reshape(*scores.shape[:2], -1), self._per_line(keep), self.m, self.solver)
        return mask.view(scores.shape)

    def _per_line(self, keep: int | Tensor) -> int:
        """How many of each row and column a number per tile means: one number for all tiles, and a multiple of m."""
        counts = {keep} if isinstance(keep, int) else set(keep.unique().tolist())
        if len(counts) > 1 or max(counts) % self.m:
            self.check_free()
        return max(counts) // self.m

    def _misfit(self, shape: tuple[int, ...]) -> str | None:
        wrong = [f"dimension {dim} ({shape[dim]})" for dim in (0, 1) if shape[dim] % self.m]
        if not wrong:
            return None
        fitting = next((d for d in (1, 0) if shape[d] % self.m == 0), None)
        other = "" if fitting is None else f"use '{self.n}:{self.m}{'' if fitting else '@0'}' along one dimension, "
        return f"{self} needs {' and '.join(wrong)} to be a multiple of {self.m}; {other}pad it or exclude this layer"

    def _fold(self, shape: tuple[int, ...]) -> Fold:
        split = (shape[0] // self.m, self.m, shape[1] // self.m, self.m, *shape[2:])
        return Fold(split, groups=(0, 2, *range(4, len(split))), units=(1, 3))

    def _miscount(self, smallest: int, largest: int) -> str | None:
        if smallest == largest and smallest % self.m == 0 and largest <= self.n * self.m:
            return None
        kept = f"{largest}" if smallest == largest else f"from {smallest} to {largest}"
        return f"keeping {kept} in a tile does not obey {self}; keep {self.n * self.m}"

    def _obeyed_by(self, kept: Tensor, whole: Tensor) -> bool:
        return bool(self.lines(kept).le(self.n).all())

    def lines(self, kept: Tensor) -> Tensor:
        """Add up units [G, m * m] over each row and column of their tiles: [G, 2 m], rows first."""
        tiles = kept.reshape(len(kept), self.m, self.m)
        return torch.cat([tiles.sum(2), tiles.sum(1)], dim=1)


def transposable_mask(scores: Tensor, n: int, m: int, solver: str = "fast") -> BoolTensor:
    """Return the best mask for scores [out, in, ...] with n kept in every row and column of each m x m tile.

    What `TransposableNM(n, m, solver).project` returns, which see. For magnitudes pass `weight.abs()`.

    Raises:
        PatternError: impossible n and m, or a shape that is not made of m x m tiles.
        OptionError: an unknown solver, or scores that hold NaN or infinity.

    Example:
        >>> import torch
        >>> from rarefy.patterns import transposable_mask
        >>> mask = transposable_mask(torch.randn(16, 32).abs(), 4, 8)
        >>> mask.sum(0).unique().item(), mask.sum(1).unique().item()
        (8, 16)
    """
    pattern = TransposableNM(n, m, solver)
    return pattern.project(scores, pattern.keep(scores.shape), "scores")
