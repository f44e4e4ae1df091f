"""A data set in memory: what every loader returns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rarefy.data._seed import generator
from rarefy.errors import DataError, OptionError


@dataclass(frozen=True)
class DataBundle:
    """A whole data set, in memory, with what a model and a report need to know about it.

    For `task` "image": `train_x`, `test_x` are uint8 [N, channels, size, size] (pixels 0..255, not yet normalised)
    and `train_y`, `test_y` int64 [N] class numbers. `mean` and `std` are per channel, of pixels / 255 in the official
    training set. For `task` "text": `*_x` are uint8 [N] bytes in their order and `*_y` uint8 [N], each the byte after
    it; the test part is the end of the text, held out. `note` says in plain words where the data came from and what
    of it is missing. `augment` names the usual augmentation for `Batches` (None: none).
    """

    name: str
    note: str
    train_x: Tensor = field(repr=False)
    train_y: Tensor = field(repr=False)
    test_x: Tensor = field(repr=False)
    test_y: Tensor = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: int = 0
    in_channels: int = 0
    task: str = "image"
    augment: str | None = None

    @property
    def num_classes(self) -> int:
        """Return how many classes there are (for text: 256 byte values)."""
        return len(self.classes)


def train_val_split(bundle: DataBundle, fraction: float = 0.1, seed: int = 0) -> tuple[DataBundle, Tensor, Tensor]:
    """Hold out part of the training set for validation; return (bundle with the rest, validation x, validation y).

    Images: floor(fraction * N + 0.5) samples, every class in its share (stratified), chosen by `seed`, both parts in
    the original order. Text: the last part of the training text, which no seed moves. The test part is not touched.
    Raises OptionError when `fraction` is outside (0, 1) or leaves one side empty.
    """
    n = len(bundle.train_x)
    if not 0.0 < fraction < 1.0:
        raise OptionError(f"fraction is {fraction}: give a number between 0 and 1, such as 0.1")
    held = int(fraction * n + 0.5)
    if held in (0, n):
        raise OptionError(f"fraction {fraction} of {n} training samples leaves one side empty: choose another fraction")
    if bundle.task == "text":
        chosen = torch.arange(n) >= n - held
    else:
        chosen = stratified(bundle.train_y, held, seed)
    rest = dataclasses.replace(
        bundle,
        train_x=bundle.train_x[~chosen],
        train_y=bundle.train_y[~chosen],
        note=f"{bundle.note}; {held:,} training samples held out for validation (seed {seed})",
    )
    return rest, bundle.train_x[chosen], bundle.train_y[chosen]


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose exactly `count` samples, every class in its share; return bool [N], True = chosen.

    Shares are rounded by largest remainder (ties: the lower class number), so that the total is exact.
    """
    n = len(labels)
    if n == 0:
        raise DataError("no samples to split")
    sizes = torch.bincount(labels)
    whole = (sizes * count) // n
    remainder = (sizes * count) % n
    short = count - int(whole.sum())
    order = torch.argsort(remainder, descending=True, stable=True)
    whole[order[:short]] += 1
    chosen = torch.zeros(n, dtype=torch.bool)
    for label, keep in enumerate(whole.tolist()):
        members = (labels == label).nonzero().squeeze(1)
        chosen[members[torch.randperm(len(members), generator=generator(seed, label))[:keep]]] = True
    return chosen
