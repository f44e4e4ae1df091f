"""The patterns: unstructured, N:M, blocks, whole rows or columns, constant fan-in, inputs shared by groups of filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from rarefy.errors import PatternError
from rarefy.patterns.base import Fold, Pattern


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weight may be zero: most accurate per kept weight, faster only on sparse kernels.

    One group, every weight is a unit: G = 1, U = numel. The only pattern that also takes one-dimensional weights.

    Example:
        >>> import torch
        >>> from rarefy.patterns import Unstructured
        >>> Unstructured().project(torch.tensor([[0.5, 3.0], [2.0, 0.1]]), keep=2)
        tensor([[False,  True],
                [ True, False]])
    """

    least_dims: ClassVar[int] = 1

    def __str__(self) -> str:
        return "unstructured"

    def _fold(self, shape: tuple[int, ...]) -> Fold:
        return Fold(split=(math.prod(shape),), groups=(), units=(0,))

    def _obeyed_by(self, kept: Tensor, whole: Tensor) -> bool:
        return True


@dataclass(frozen=True)
class NM(Pattern):
    """At most n weights kept in every m neighbours along one dimension, such as 2:4 for sparse tensor cores.

    Groups are the runs of m neighbours along `dim`, at every position of the other dimensions (for a convolution
    [out, in, kh, kw] with dim=1: m input channels at one output channel and kernel position); units are single
    weights. G = numel / m, U = m. The sparsity is 1 - n/m and nothing else. A mask obeys with n or fewer in a group.

    Attributes:
        n: weights kept per group, 1 <= n <= m.
        m: length of a group.
        dim: dimension that groups run along; 1 = inputs, 0 = outputs.

    Raises:
        PatternError: n > m, or n, m or dim out of range.

    Source: Mishra et al. 2021, "Accelerating sparse deep neural networks", arXiv 2104.08378 (2:4 along the inputs).

    Example:
        >>> import torch
        >>> from rarefy.patterns import NM
        >>> NM(1, 2, dim=0).project(torch.tensor([[1.0, 5.0], [2.0, 4.0]]), keep=1)
        tensor([[False,  True],
                [ True, False]])
        >>> str(NM(2, 4)), str(NM(2, 4, dim=0)), NM(2, 4).fixed_sparsity
        ('2:4', '2:4@0', 0.5)
    """

    n: int
    m: int
    dim: int = 1

    def __post_init__(self) -> None:
        if self.n > self.m:
            raise PatternError(f"{self}: cannot keep {self.n} of {self.m}; N:M needs N <= M, such as {self.m}:{self.n}")
        if self.n < 1 or self.dim < 0:
            raise PatternError(f"{self}: n, m must be 1 or more and dim 0 or more")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + ("" if self.dim == 1 else f"@{self.dim}")

    @property
    def fixed_sparsity(self) -> float:
        """The only sparsity there is: 1 - n/m."""
        return 1.0 - self.n / self.m

    def keep(self, shape: Sequence[int], density: float | None = None) -> int:
        """Return n, the number kept in every group of m.

        Raises:
            OptionError: density is given and differs from n/m by more than 1e-9.
            PatternError: the shape does not fit.
        """
        self.check(shape)
        self._check_density(density)
        return self.n

    def _misfit(self, shape: tuple[int, ...]) -> str | None:
        if self.dim >= len(shape):
            return f"{self} runs along dimension {self.dim}, which this weight lacks; use '{self.n}:{self.m}'"
        if shape[self.dim] % self.m:
            fitting = [d for d, size in enumerate(shape) if size % self.m == 0]
            other = f"use '{NM(self.n, self.m, fitting[0])}', " if fitting else ""
            return (
                f"{self} needs dimension {self.dim} ({shape[self.dim]}) to be a multiple of {self.m}; "
                f"{other}pad it or exclude this layer"
            )
        return None

    def _fold(self, shape: tuple[int, ...]) -> Fold:
        d = self.dim
        split = (*shape[:d], shape[d] // self.m, self.m, *shape[d + 1 :])
        return Fold(split, groups=tuple(axis for axis in range(len(split)) if axis != d + 1), units=(d + 1,))

    def _miscount(self, smallest: int, largest: int) -> str | None:
        return f"keeping {largest} in a group does not obey {self}; keep {self.n}" if largest > self.n else None

    def _obeyed_by(self, kept: Tensor, whole: Tensor) -> bool:
        return bool((kept.sum(1) <= self.n).all())


@dataclass(frozen=True)
class Block(Pattern):
    """Weights live and die in blocks of rows x cols, the shape that vector instructions like.

    Blocks tile the (out, in) plane, separately at every kernel position of a convolution. One group; a unit is a
    block: G = 1, U = numel / (rows * cols), numbered row-major over (block row, block column, kernel position).

    Attributes:
        rows: neighbours along dimension 0 (outputs).
        cols: neighbours along dimension 1 (inputs).

    Raises:
        PatternError: rows or cols is less than 1.

    Source: Zhu & Gupta 2017, arXiv 1710.01878, reference code (block masks pooled by sum).

    Example:
        >>> import torch
        >>> from rarefy.patterns import Block
        >>> Block(2, 1).project(torch.tensor([[3.0, 2.0], [0.0, 2.0]]), keep=1)
        tensor([[False,  True],
                [False,  True]])
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise PatternError(f"block {self}: rows and cols must be 1 or more")

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    def _misfit(self, shape: tuple[int, ...]) -> str | None:
        wrong = [
            f"dimension {dim} ({shape[dim]}) to be a multiple of {size}"
            for dim, size in enumerate((self.rows, self.cols))
            if shape[dim] % size
        ]
        if wrong:
            fit = Block(math.gcd(self.rows, shape[0]), math.gcd(self.cols, shape[1]))
            return f"block {self} needs {' and '.join(wrong)}; use '{fit}' or smaller, pad it or exclude this layer"
        return None

    def _fold(self, shape: tuple[int, ...]) -> Fold:
        split = (shape[0] // self.rows, self.rows, shape[1] // self.cols, self.cols, *shape[2:])
        return Fold(split, groups=(), units=(0, 2, *range(4, len(split))), inner=(1, 3))

    def _obeyed_by(self, kept: Tensor, whole: Tensor) -> bool:
        return _all_or_nothing(kept, whole)


@dataclass(frozen=True)
class Slice(Pattern):
    """Whole rows (output channels, filters) or whole columns (input channels) live and die together.

    One group; a unit is all weights that share an index in `dim`: G = 1, U = shape[dim].

    Attributes:
        dim: 0 = row / output channel / filter ("row"), 1 = column / input channel ("column").

    Raises:
        PatternError: dim is neither 0 nor 1.

    Source: Li et al. 2017, "Pruning filters for efficient ConvNets", arXiv 1608.08710 (filters by summed score).

    Example:
        >>> import torch
        >>> from rarefy.patterns import Slice
        >>> Slice(1).project(torch.tensor([[1.0, 0.0, 9.0], [1.0, 5.0, 9.0]]), keep=2)
        tensor([[False,  True,  True],
                [False,  True,  True]])
    """

    dim: int = 0

    def __post_init__(self) -> None:
        if self.dim not in (0, 1):
            raise PatternError(f"slice dimension is {self.dim}; it must be 0 (row) or 1 (column)")

    def __str__(self) -> str:
        return "column" if self.dim else "row"

    def _fold(self, shape: tuple[int, ...]) -> Fold:
        inner = tuple(axis for axis in range(len(shape)) if axis != self.dim)
        return Fold(shape, groups=(), units=(self.dim,), inner=inner)

    def _obeyed_by(self, kept: Tensor, whole: Tensor) -> bool:
        return _all_or_nothing(kept, whole)


@dataclass(frozen=True)
class FanIn(Pattern):
    """Every output keeps the same number of inputs, so that the layer packs into a small dense table.

    Groups are the rows (dimension 0: output neurons, filters), units single weights: G = shape[0],
    U = numel / shape[0]. A mask obeys when all rows keep equally many.

    Source: Lasby et al. 2024 (SRigL), arXiv 2305.02299, constant fan-in.

    Example:
        >>> import torch
        >>> from rarefy.patterns import FanIn
        >>> FanIn().project(torch.tensor([[1.0, 2.0, 9.0], [0.1, 0.3, 0.2]]), keep=1)
        tensor([[False, False,  True],
                [False,  True, False]])
    """

    def __str__(self) -> str:
        return "fan-in"

    def _fold(self, shape: tuple[int, ...]) -> Fold:
        return Fold(shape, groups=(0,), units=tuple(range(1, len(shape))))

    def _miscount(self, smallest: int, largest: int) -> str | None:
        if smallest == largest:
            return None
        return f"keep runs from {smallest} to {largest}; constant fan-in needs one number for all rows"

    def _obeyed_by(self, kept: Tensor, whole: Tensor) -> bool:
        in_row = kept.sum(1)
        return bool((in_row == in_row[0]).all())


@dataclass(frozen=True)
class FilterGroup(Pattern):
    """Within each group of `size` filters, all filters drop the same input channels, and every group keeps equally many.

    Finer than whole filters, coarser than single weights: one index serves `size` weights, so that a vector of them is
    loaded at once. Groups are runs of `size` outputs (the last may be shorter); units are the inputs of a group, with all
    kernel positions ("kernel sparsity"), or with `taps` each position by itself: G = ceil(shape[0] / size),
    U = shape[1], or shape[1] * positions. For a linear layer or a 1x1 convolution a unit is a block of `size` x 1.
    A mask obeys when units are kept or dropped whole and all groups keep the same number. `unit_size` is that of a full
    group.

    Attributes:
        size: filters in a group: the lanes of a vector (16 for AVX-512, 8 for AVX2, 4 for NEON).
        taps: choose every kernel position by itself.

    Raises:
        PatternError: size is less than 1.

    Source: Xu et al. 2023 (SparseByteNN), arXiv 2310.19509, names the pattern; the paper's details are not published, and
    these are a reconstruction.

    Example:
        >>> import torch
        >>> from rarefy.patterns import FilterGroup
        >>> FilterGroup(2).project(torch.tensor([[3.0, 2.0], [0.0, 2.0], [5.0, 1.0]]), keep=1)
        tensor([[False,  True],
                [False,  True],
                [ True, False]])
    """

    size: int
    taps: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise PatternError(f"{self}: a group needs 1 filter or more")

    def __str__(self) -> str:
        return f"group{self.size}" + ("-tap" if self.taps else "")

    def pool(self, t: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        shape = tuple(t.shape if shape is None else shape)
        self.check(shape)
        whole = self._whole(shape)
        missing = [0] * (2 * len(shape) - 1) + [whole[0] - shape[0]]
        return super().pool(functional.pad(t.reshape(shape), missing) if missing[-1] else t, whole)

    def expand(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        self.check(shape)
        return super().expand(units, self._whole(tuple(shape)))[: shape[0]]

    def _whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        size = min(self.size, shape[0])
        return (-(-shape[0] // size) * size, *shape[1:])

    def _fold(self, shape: tuple[int, ...]) -> Fold:
        size = min(self.size, shape[0])
        split = (-(-shape[0] // size), size, *shape[1:])
        positions = tuple(range(3, len(split)))
        if self.taps:
            return Fold(split, groups=(0,), units=(2, *positions), inner=(1,))
        return Fold(split, groups=(0,), units=(2,), inner=(1, *positions))

    def _miscount(self, smallest: int, largest: int) -> str | None:
        return (
            None if smallest == largest else f"keep runs from {smallest} to {largest}; {self} needs one number for all"
        )

    def _obeyed_by(self, kept: Tensor, whole: Tensor) -> bool:
        in_group = (kept > 0).sum(1)
        return _all_or_nothing(kept, whole) and bool((in_group == in_group[0]).all())


def _all_or_nothing(kept: Tensor, whole: Tensor) -> bool:
    return bool(((kept == 0) | (kept == whole)).all())
