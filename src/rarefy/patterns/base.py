"""What every pattern is: a way to cut a weight into groups of units, and the best mask that follows from it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import BoolTensor, Tensor

from rarefy.errors import OptionError, PatternError
from rarefy.kernels import select_k


@dataclass(frozen=True)
class Fold:
    """How a weight of one shape is cut up: `split` is its shape with some dimensions divided, the rest are axes of it.

    Every axis of `split` is in exactly one of `groups` (where a count is prescribed), `units` (what is chosen) and
    `inner` (what lives and dies together).
    """

    split: tuple[int, ...]
    groups: tuple[int, ...]
    units: tuple[int, ...]
    inner: tuple[int, ...] = ()

    def sizes(self, axes: Sequence[int]) -> list[int]:
        """Lengths of some axes of `split`."""
        return [self.split[axis] for axis in axes]

    def count(self, axes: Sequence[int]) -> int:
        """Product of the lengths of some axes of `split`."""
        return math.prod(self.sizes(axes))


class Pattern(ABC):
    """Which weights of a layer live and die together, and where their number is prescribed.

    A pattern cuts a weight of any shape into G *groups* of U *units* of `unit_size` weights each, so that
    G * U * unit_size == numel. A mask keeps or drops whole units; the number kept is prescribed per group. Groups,
    and the units inside a group, are numbered row-major in the order of the weight's own dimensions; ties go to the
    lowest number.

    Patterns are frozen dataclasses without state: equal options are equal patterns, and `str(pattern)` is read back
    by `parse_pattern`. Weights are laid out as PyTorch does: Linear [out, in], convolution [out, in / groups, k...],
    Embedding [entries, features].

    A subclass says how it cuts (`_fold`), which shapes it cannot cut (`_misfit`) and what it calls itself; everything
    else is done here.
    """

    least_dims: ClassVar[int] = 2
    """The fewest dimensions that a weight must have."""
    coupled: ClassVar[bool] = False
    """Whether which units a group may keep depends on which others it keeps: then groups are chosen as wholes."""

    @abstractmethod
    def __str__(self) -> str:
        """Short text that `parse_pattern` reads back."""

    @abstractmethod
    def _fold(self, shape: tuple[int, ...]) -> Fold:
        """How a weight of this (fitting) shape is cut."""

    def _misfit(self, shape: tuple[int, ...]) -> str | None:
        """Say why a weight of this shape, with dimensions enough, cannot be cut, and the mend; None if it can."""
        return None

    @property
    def fixed_sparsity(self) -> float | None:
        """The sparsity that the pattern itself prescribes (N:M: 1 - N/M), or None where it is free."""
        return None

    def _check_density(self, density: float | None) -> None:
        """Raise OptionError where a density is asked for that is not the only one that the pattern has."""
        fixed = self.fixed_sparsity
        if density is not None and fixed is not None and abs(density - (1 - fixed)) > 1e-9:
            raise OptionError(
                f"{self} keeps {1 - fixed:g} of a weight, density {density:g} was asked; "
                f"ask for sparsity {fixed:g} or choose another N:M"
            )

    def check(self, shape: Sequence[int], name: str = "weight") -> None:
        """Raise where a weight of this shape cannot follow the pattern.

        Args:
            shape: the weight's shape.
            name: the layer's name, for the message.

        Raises:
            PatternError: naming the layer, its shape, what does not fit, and the mend.

        Example:
            >>> from rarefy.patterns import NM
            >>> NM(2, 4).check([10, 301], "fc2.weight")
            Traceback (most recent call last):
            ...
            rarefy.errors.PatternError: fc2.weight [10, 301]: 2:4 needs dimension 1 (301) to be a multiple of 4; ...
        """
        shape = tuple(shape)
        if math.prod(shape) == 0:
            problem: str | None = "the weight is empty; exclude this layer"
        elif len(shape) < self.least_dims:
            problem = f"{self} needs {self.least_dims} dimensions or more; exclude this layer or use 'unstructured'"
        else:
            problem = self._misfit(shape)
        if problem:
            raise PatternError(f"{name} {list(shape)}: {problem}")

    def units(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return (G, U): the number of groups in a weight of this shape, and of units per group.

        Example:
            >>> from rarefy.patterns import NM, Block, FanIn
            >>> NM(2, 4).units([6, 8]), Block(2, 4).units([6, 8]), FanIn().units([6, 8])
            ((12, 4), (1, 6), (6, 8))
        """
        fold = self._checked_fold(shape)
        return fold.count(fold.groups), fold.count(fold.units)

    def unit_size(self, shape: Sequence[int]) -> int:
        """Return the number of weights in a unit.

        Example:
            >>> from rarefy.patterns import Block, Slice
            >>> Block(2, 4).unit_size([6, 8]), Slice(0).unit_size([16, 3, 5, 5])
            (8, 75)
        """
        fold = self._checked_fold(shape)
        return fold.count(fold.inner)

    def pool(self, t: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Sum a weight-shaped tensor over each unit.

        Args:
            t: [shape], any dtype, device and strides; or flat [numel] together with `shape`.
            shape: the weight's shape; default t.shape.

        Returns:
            [G, U]. Where a unit is one weight: t's dtype, and a view of t if its strides allow it. Otherwise sums,
            taken in float64 so that their order does not matter, in t's dtype (float16 and bfloat16: float32; bool
            and integers: int64).

        Raises:
            PatternError: the shape does not fit (see `check`).

        Example:
            >>> from rarefy.patterns import Block
            >>> Block(2, 2).pool(torch.arange(16.0).reshape(4, 4))
            tensor([[10., 18., 42., 50.]])
        """
        shape = tuple(t.shape if shape is None else shape)
        fold = self._checked_fold(shape)
        groups, units, inner = (fold.count(axes) for axes in (fold.groups, fold.units, fold.inner))
        cut = t.reshape(fold.split).permute(fold.groups + fold.units + fold.inner)
        if inner == 1:
            return cut.reshape(groups, units)
        # One memory layout, whatever t's strides were: the sums must not depend on them.
        cut = cut.reshape(groups, units, inner).contiguous()
        if not t.is_floating_point():
            return cut.sum(-1)
        wide = torch.float32 if t.device.type == "mps" else torch.float64
        result = torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype
        return cut.sum(-1, dtype=wide).to(result)

    def expand(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """Give every weight the value of its unit: the way back from [G, U] to the weight's shape.

        Args:
            units: [G, U], bool or numbers.
            shape: the weight's shape.

        Returns:
            [shape], contiguous, dtype of `units`; may share memory with it where a unit is one weight.

        Raises:
            PatternError: the shape does not fit, or `units` is not [G, U].

        Example:
            >>> from rarefy.patterns import Slice
            >>> Slice(0).expand(torch.tensor([[True, False]]), [2, 3])
            tensor([[ True,  True,  True],
                    [False, False, False]])
        """
        fold = self._checked_fold(shape)
        expected = (fold.count(fold.groups), fold.count(fold.units))
        if tuple(units.shape) != expected:
            raise PatternError(
                f"weight {list(shape)}: {self} has units {list(expected)}, not {list(units.shape)}; "
                "pass a tensor of that shape, as pool() returns it"
            )
        outer = fold.sizes(fold.groups + fold.units)
        order = fold.groups + fold.units + fold.inner
        cut = units.reshape(outer + [1] * len(fold.inner)).expand(outer + fold.sizes(fold.inner))
        back = [order.index(axis) for axis in range(len(order))]
        return cut.permute(back).reshape(tuple(shape)).contiguous()

    def keep(self, shape: Sequence[int], density: float | None = None) -> int:
        """Return how many units a density keeps in every group: floor(density * U + 1/2).

        Args:
            shape: the weight's shape.
            density: kept fraction in [0, 1]. N:M patterns bring their own: there it is None or n/m.

        Raises:
            OptionError: density is missing, outside [0, 1], or not what the pattern prescribes.
            PatternError: the shape does not fit.

        Example:
            >>> from rarefy.patterns import NM, FanIn, Unstructured
            >>> Unstructured().keep([300, 784], 0.1), FanIn().keep([300, 784], 0.1), NM(2, 4).keep([300, 784])
            (23520, 78, 2)
        """
        self.check(shape)
        if density is None:
            raise OptionError(f"{self} has no density of its own; pass one in [0, 1]")
        if not 0.0 <= density <= 1.0:
            raise OptionError(f"density is {density}; it is the kept fraction and must lie in [0, 1]")
        return self.stage(shape, density)

    def stage(self, shape: Sequence[int], density: float) -> int:
        """Return the units per group nearest to a density, also where the pattern prescribes one: a stage on the way to it.

        Args:
            shape: the weight's shape.
            density: kept fraction in [0, 1].
        """
        _, units = self.units(shape)
        return math.floor(density * units + 0.5)

    def project(self, scores: Tensor, keep: int | Tensor, name: str = "weight") -> BoolTensor:
        """Return the best mask that obeys the pattern: the units with the largest summed score.

        Maximises sum(scores[mask]) over all masks that keep exactly `keep` units in every group; ties go to the unit
        with the lowest number.

        Args:
            scores: [shape], floating point, any strides and device; no NaN.
            keep: units kept per group (as `keep()` counts them): an int, or int64 [G] for one number per group.
            name: the layer's name, for messages.

        Returns:
            Bool [shape], contiguous, True = kept.

        Raises:
            PatternError: the shape does not fit, or `keep` asks for a mask that does not obey the pattern.
            OptionError: `keep` is outside [0, U], or scores hold NaN.

        Example:
            >>> from rarefy.patterns import NM
            >>> NM(2, 4).project(torch.tensor([[3.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), keep=2)
            tensor([[ True, False, False,  True],
                    [ True,  True, False, False]])
        """
        self.check(scores.shape, name)
        shape = list(scores.shape)
        groups, units = self.units(shape)
        smallest, largest = self._keep_range(keep, groups, name, shape)
        if smallest < 0 or largest > units:
            wrong = smallest if smallest < 0 else largest
            raise OptionError(f"{name} {shape}: cannot keep {wrong} of the {units} units in a group of {self}")
        if problem := self._miscount(smallest, largest):
            raise PatternError(f"{name} {shape}: {problem}")
        try:
            return self._best(scores, keep)  # type: ignore[return-value]
        except OptionError as error:
            raise OptionError(f"{name} {shape}: {error}") from error

    def _best(self, scores: Tensor, keep: int | Tensor) -> Tensor:
        """The mask of the best choice, where shape and numbers have been checked."""
        return self.expand(self.choose(self.pool(scores), keep), scores.shape)

    def choose(self, scores: Tensor, keep: int | Tensor) -> Tensor:
        """Choose the `keep` units of every group with the largest summed score, among the choices that the pattern allows.

        Args:
            scores: [G, U], as `pool` returns them; minus infinity where a unit is not to be chosen while others are left.
            keep: units per group: an int, or int64 [G].

        Returns:
            Bool [G, U].

        Raises:
            OptionError: `keep` is outside [0, U], or scores hold NaN.
            PatternError: the pattern has no choice of that many units.
        """
        return select_k(scores, keep)

    def choose_anywhere(self, scores: Tensor, keep: int) -> Tensor:
        """Choose `keep` units over all groups together, whatever each group gets.

        Args, returns, errors: as `choose`; PatternError always where units are `coupled`.
        """
        self.check_free()
        return select_k(scores.reshape(-1), keep).view_as(scores)

    def check_free(self) -> None:
        """Raise PatternError where units are `coupled`, for those who would drop and grow them one by one."""
        if self.coupled:
            raise PatternError(
                f"{self} chooses whole groups at once: its weights cannot be dropped and grown one by one; use a method that "
                "chooses whole masks (magnitude, gradual, static) or a pattern whose weights are free, such as N:M"
            )

    def obeys(self, mask: Tensor) -> bool:
        """Tell whether a mask is allowed by the pattern, whatever its sparsity.

        Args:
            mask: bool [shape], True = kept.

        Raises:
            PatternError: the mask is not bool, or no mask of this shape can follow the pattern (see `check`).

        Example:
            >>> from rarefy.patterns import NM
            >>> NM(2, 4).obeys(torch.tensor([[True, True, False, False], [True, True, True, False]]))
            False
        """
        self.check(mask.shape, "mask")
        if mask.dtype != torch.bool:
            raise PatternError(f"mask {list(mask.shape)}: dtype is {mask.dtype}, not bool; pass mask != 0")
        return self._obeyed_by(self.pool(mask), self.pool(torch.ones_like(mask)))

    @abstractmethod
    def _obeyed_by(self, kept: Tensor, whole: Tensor) -> bool:
        """Tell whether kept weights per unit [G, U] are allowed; `whole` are all of a unit's weights."""

    def _miscount(self, smallest: int, largest: int) -> str | None:
        """Say why keeping from `smallest` to `largest` units in a group breaks the pattern; None if it does not."""
        return None

    def _checked_fold(self, shape: Sequence[int]) -> Fold:
        self.check(shape)
        return self._fold(tuple(shape))

    def _keep_range(self, keep: int | Tensor, groups: int, name: str, shape: list[int]) -> tuple[int, int]:
        """Smallest and largest number kept in a group."""
        if not isinstance(keep, Tensor):
            return keep, keep
        if tuple(keep.shape) != (groups,):
            raise OptionError(
                f"{name} {shape}: keep has shape {list(keep.shape)}; {self} has {groups} groups here, "
                f"so pass an int or a tensor [{groups}]"
            )
        return int(keep.min()), int(keep.max())
