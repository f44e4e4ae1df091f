"""How alike two sets of masks are, and how much of a network was ever tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rarefy.errors import OptionError, SelectionError, StateError, nearest
from rarefy.metrics._masks import Masks, check_bool

MEASURES = ("jaccard", "overlap", "flip_rate")


@dataclass(frozen=True)
class Overlap:
    """Counts of two masks over the same weights, and what follows from them.

    Attributes:
        size: number of weights.
        kept_a, kept_b, both: weights kept by the first mask, by the second, by both.
        expected_both: mean of `both` over random masks with the same numbers kept in every layer, kept_a kept_b / size.
    """

    size: int
    kept_a: int
    kept_b: int
    both: int
    expected_both: float

    @property
    def jaccard(self) -> float:
        """|A and B| / |A or B|; 1 where both masks are empty."""
        union = self.kept_a + self.kept_b - self.both
        return self.both / union if union else 1.0

    @property
    def overlap(self) -> float:
        """Overlap coefficient |A and B| / min(|A|, |B|); 1 where one of them is empty."""
        least = min(self.kept_a, self.kept_b)
        return self.both / least if least else 1.0

    @property
    def flips(self) -> int:
        """Weights whose state differs (Hamming distance): the sparse architecture divergence, SAD, of arXiv 2102.04010."""
        return self.kept_a + self.kept_b - 2 * self.both

    @property
    def flip_rate(self) -> float:
        """Share of weights whose state differs: flips over size."""
        return self.flips / self.size if self.size else 0.0

    @property
    def expected_jaccard(self) -> float:
        """Jaccard index at the expected intersection of random masks (their mean, for large layers)."""
        union = self.kept_a + self.kept_b - self.expected_both
        return self.expected_both / union if union else 1.0

    @property
    def expected_overlap(self) -> float:
        """Mean overlap coefficient of random masks: the larger of the two densities for one layer."""
        least = min(self.kept_a, self.kept_b)
        return self.expected_both / least if least else 1.0


@dataclass(frozen=True)
class OverlapReport:
    """Overlap of two sets of masks, per layer and over all weights together."""

    layers: dict[str, Overlap]
    total: Overlap


def overlap(masks_a: Masks, masks_b: Masks) -> OverlapReport:
    """Compare two sets of masks, layer by layer and in total.

    Args:
        masks_a, masks_b: bool masks by name; the same names and shapes in both.

    Raises:
        SelectionError: a name is in one set only. OptionError: a mask is not bool, or two shapes differ.

    >>> a, b = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()
    >>> total = overlap({"w": a}, {"w": b}).total
    >>> round(total.jaccard, 4), total.overlap, total.flip_rate
    (0.3333, 0.5, 0.5)
    """
    _same_layers(masks_a, masks_b)
    layers = {}
    for name, a in masks_a.items():
        b = masks_b[name].to(a.device)
        kept_a, kept_b, both = int(a.sum()), int(b.sum()), int((a & b).sum())
        expected = kept_a * kept_b / a.numel() if a.numel() else 0.0
        layers[name] = Overlap(a.numel(), kept_a, kept_b, both, expected)
    parts = list(layers.values())
    total = Overlap(
        sum(p.size for p in parts),
        sum(p.kept_a for p in parts),
        sum(p.kept_b for p in parts),
        sum(p.both for p in parts),
        sum(p.expected_both for p in parts),
    )
    return OverlapReport(layers, total)


def overlap_matrix(runs: Sequence[Masks], measure: str = "jaccard") -> torch.Tensor:
    """Compare every set of masks with every other: a symmetric float64 matrix [runs, runs] of the total `measure`.

    `measure` is "jaccard", "overlap" (over the smaller) or "flip_rate". OptionError for another name.
    """
    if measure not in MEASURES:
        raise OptionError(f"unknown measure {measure!r}; choose from {', '.join(MEASURES)}{nearest(measure, MEASURES)}")
    matrix = torch.zeros(len(runs), len(runs), dtype=torch.float64)
    for i, a in enumerate(runs):
        for j in range(i, len(runs)):
            matrix[i, j] = matrix[j, i] = getattr(overlap(a, runs[j]).total, measure)
    return matrix


def _same_layers(a: Masks, b: Masks) -> None:
    for name in [*a, *b]:
        if name not in a or name not in b:
            which, others = ("first", a) if name not in a else ("second", b)
            raise SelectionError(f"layer {name!r} is missing from the {which} set of masks{nearest(name, others)}")
    for name in a:
        check_bool(name, a[name])
        check_bool(name, b[name])
        if a[name].shape != b[name].shape:
            raise OptionError(f"masks of {name!r} differ in shape: {tuple(a[name].shape)} and {tuple(b[name].shape)}")


class Explored:
    """Gathers which weights were ever kept: R_s, the in-time over-parametrisation rate (ITOP, Liu et al. 2021).

    R_s = |union over time of the masks| / number of weights. It starts at the density and never falls.

    >>> seen = Explored({"w": torch.tensor([1, 0, 0, 0]).bool()})
    >>> seen.update({"w": torch.tensor([0, 0, 1, 0]).bool()})
    >>> seen.share
    0.5
    """

    def __init__(self, masks: Masks) -> None:
        """Start from the first masks (bool, by name); they are copied."""
        _same_layers(masks, masks)
        self._ever = {name: mask.clone() for name, mask in masks.items()}

    def update(self, masks: Masks) -> None:
        """Add the masks of a later step; the same names and shapes as at the start (SelectionError, OptionError)."""
        _same_layers(self._ever, masks)
        for name, ever in self._ever.items():
            ever |= masks[name].to(ever.device)

    @property
    def layers(self) -> dict[str, float]:
        """R_s of each layer."""
        return {name: int(ever.sum()) / max(1, ever.numel()) for name, ever in self._ever.items()}

    @property
    def share(self) -> float:
        """R_s over all layers together."""
        size = sum(ever.numel() for ever in self._ever.values())
        return sum(int(ever.sum()) for ever in self._ever.values()) / size if size else 0.0

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the union masks by name (bool tensors, copies)."""
        return {name: ever.clone() for name, ever in self._ever.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the union masks of `state_dict()`; StateError where names, dtypes or shapes differ."""
        try:
            _same_layers(self._ever, state)
        except (SelectionError, OptionError) as error:
            raise StateError(f"the explored weights do not fit this model: {error}") from error
        self._ever = {name: state[name].clone().to(ever.device) for name, ever in self._ever.items()}

    def __repr__(self) -> str:
        return f"Explored(share={self.share:.4f}, layers={len(self._ever)})"
