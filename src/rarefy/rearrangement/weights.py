"""What a pattern sees of each weight: vectors along the dimension whose order matters, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.coupling import Group, Member
from rarefy.errors import OptionError, PatternError
from rarefy.patterns import NM, FilterGroup, Pattern, TransposableNM, Unstructured
from rarefy.rearrangement import terms
from rarefy.rearrangement.terms import Term

LOAD_ROWS = 4  # rows that the packed kernels load activations for together


@dataclass(frozen=True)
class Weight:
    """One weight whose order is sought: `size` neighbours along each of `dims` belong together, and `keep` units are kept."""

    name: str
    shape: tuple[int, ...]
    pattern: Pattern
    dims: tuple[int, ...]
    size: int
    keep: int

    def default_scores(self, weight: Tensor) -> Tensor:
        """Return w^2 where units of many weights compete, |w| for N:M, and 1 where a weight is not zero."""
        weight = weight.detach().float()
        if isinstance(self.pattern, FilterGroup):
            return weight.square()
        return weight.abs() if isinstance(self.pattern, NM | TransposableNM) else (weight != 0).float()

    def vectors(self, scores: Tensor, dim: int, rows: tuple[int, int] | None = None) -> Tensor:
        """Return the entries that compete at each place along `dim` [places, entries], float32, a copy."""
        part = scores if rows is None else scores[slice(*rows)]
        part = part.movedim(dim, 0)
        if isinstance(self.pattern, FilterGroup) and not self.pattern.taps and part.ndim > 2:
            part = part.flatten(2).sum(2)
        return part.flatten(1).float().contiguous().clone()

    def term(self, vectors: Tensor, index: Tensor) -> Term:
        if isinstance(self.pattern, FilterGroup):
            return terms.Shared(vectors, self.size, index, self.keep)
        if isinstance(self.pattern, NM | TransposableNM):
            return terms.NM(vectors, self.size, index, self.keep)
        return terms.Loads(vectors, self.size, index)

    def value(self, scores: Tensor) -> float:
        """Return what the pattern keeps of the scores (minus what it loads) in the present order."""
        if isinstance(self.pattern, TransposableNM):  # what its terms add up to is a bound
            return float(scores[self.pattern.project(scores, self.pattern.keep(self.shape))].sum(dtype=torch.float64))
        return self.term(self.vectors(scores, self.dims[0]), torch.empty(0, dtype=torch.int64)).value()


def weights_of(shapes: Mapping[str, Sequence[int]], pattern: Pattern, sparsity: float | None) -> dict[str, Weight]:
    """Return the weights whose order matters to the pattern: those that have something to choose."""
    if isinstance(pattern, Unstructured):
        if sparsity is not None:
            raise OptionError("an unstructured pattern is rearranged for the zeros that are there: leave sparsity out")
    elif not isinstance(pattern, FilterGroup | NM | TransposableNM):
        raise PatternError(
            f"{pattern}: the order of channels changes nothing that this pattern keeps; use 'group16' (for blocks of rows), "
            "an N:M pattern, or 'unstructured'"
        )
    elif pattern.fixed_sparsity is None and sparsity is None:
        raise OptionError(f"{pattern} has no sparsity of its own; pass sparsity in [0, 1)")
    found = {}
    for name, given in shapes.items():
        shape = tuple(given)
        if isinstance(pattern, Unstructured):
            found[name] = Weight(name, shape, pattern, (0,), LOAD_ROWS, 0)
            continue
        keep = pattern.keep(shape, None if sparsity is None else 1 - sparsity)
        if isinstance(pattern, NM):
            weight = Weight(name, shape, pattern, (pattern.dim,), pattern.m, keep)
        elif isinstance(pattern, TransposableNM):
            weight = Weight(name, shape, pattern, (0, 1), pattern.m, pattern.n)
        else:
            assert isinstance(pattern, FilterGroup)
            weight = Weight(name, shape, pattern, (0,), min(pattern.size, shape[0]), keep)
        if 0 < keep < pattern.units(shape)[1]:
            found[name] = weight
    return found


def terms_of(group: Group, weights: Mapping[str, Weight], scores: Mapping[str, Tensor], order: Tensor) -> list[Term]:
    """Return a group's terms with its units in the given order.

    Left out are weights of which a unit is several places that do not fill runs evenly: their value is checked afterwards.
    """
    found = []
    for member in group.members:
        weight = weights.get(member.name)
        if weight is None or member.dim not in weight.dims:
            continue
        vectors = weight.vectors(scores[member.name], member.dim, member.rows)
        if member.block == 1:
            index = member.index[:, 0]
            vectors[index] = vectors[index[order]]
            found.append(weight.term(vectors, index))
        elif (joined := _joined(weight, member, vectors)) is not None:
            found.append(
                joined.term(vectors.view(group.units, member.block, -1).sum(1)[order], torch.arange(group.units))
            )
    return found


def _joined(weight: Weight, member: Member, vectors: Tensor) -> Weight | None:
    """Return the weight with units as places, where the sums of neighbours are what counts and runs hold whole units."""
    whole = member.offset == 0 and member.index.numel() == len(vectors)
    if not whole or isinstance(weight.pattern, NM | TransposableNM) or weight.size % member.block:
        return None
    return Weight(weight.name, weight.shape, weight.pattern, weight.dims, weight.size // member.block, weight.keep)


def touched(group: Group, weights: Mapping[str, Weight]) -> list[Weight]:
    """Return the weights whose value the group's order may change."""
    names = dict.fromkeys(m.name for m in group.members if m.name in weights and m.dim in weights[m.name].dims)
    return [weights[name] for name in names]
