"""Batches from memory: fast, the same on every machine, and resumed exactly in the middle of an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rarefy.data._augment import AUGMENTS
from rarefy.data._bundle import DataBundle
from rarefy.data._seed import generator
from rarefy.errors import OptionError, StateError, nearest

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Takes a batch as stored [B, C, H, W] and a CPU generator; returns the changed batch, same shape and dtype."""

_ORDER, _CHANGE = 0, 1  # keep the draws for order and augmentation apart


class _Resumable(ABC):
    """The position (epoch, batch) of a loader whose batches depend on (seed, epoch, batch index) alone."""

    def __init__(self, seed: int, fingerprint: dict[str, Any]) -> None:
        self._seed = seed
        self._fingerprint = {"seed": seed, **fingerprint}
        self._epoch = 0
        self._batch = 0
        self._resume = False

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches in an epoch."""

    @abstractmethod
    def _epoch_batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from number `start` on."""

    @property
    def epoch(self) -> int:
        """Return the epoch that the next batch belongs to."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next. A position loaded for this very epoch is kept, any other is dropped."""
        if epoch < 0:
            raise OptionError(f"epoch is {epoch}: give a number from 0 up")
        if epoch != self._epoch:
            self._epoch, self._batch, self._resume = epoch, 0, False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate the current epoch from its start, or after `load_state_dict` from the saved batch."""
        start, self._resume = (self._batch if self._resume else 0), False
        epoch, total = self._epoch, len(self)
        for number, batch in enumerate(self._epoch_batches(epoch, start), start + 1):
            # set before handing out: a state taken while the caller works on this batch names the next one
            self._epoch, self._batch = (epoch + 1, 0) if number == total else (epoch, number)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and strings that name the next batch, and what the loader was built with."""
        return {"epoch": self._epoch, "batch": self._batch, **self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the batch that `state` names. Raises StateError, changing nothing, when it is of another loader."""
        expected = self.state_dict()
        if set(state) != set(expected):
            raise StateError(f"the loader state holds {sorted(state)}, expected {sorted(expected)}")
        for key, own in self._fingerprint.items():
            if state[key] != own:
                raise StateError(f"the loader state was saved with {key}={state[key]!r}, this loader has {key}={own!r}")
        epoch, batch = state["epoch"], state["batch"]
        if type(epoch) is not int or type(batch) is not int or epoch < 0 or not 0 <= batch < len(self):
            raise StateError(f"the loader state names epoch {epoch!r}, batch {batch!r} of {len(self)} batches")
        self._epoch, self._batch, self._resume = epoch, batch, True


class Batches(_Resumable):
    """Iterate (inputs, labels) of an image set: float32 [B, C, H, W] normalised, int64 [B].

    `x` is uint8 [N, C, H, W] (divided by 255, then normalised by `mean` and `std` per channel where given) or
    floating (normalised only); `y` int64 [N]. Both are moved to `device` once. With `shuffle`, the order is a
    permutation drawn from (seed, epoch) alone; `augment` (a name such as "crop-flip", or a function of batch and
    generator) draws from (seed, epoch, batch index) alone, on the CPU, so that every device sees the same batches and
    a run may stop and go on anywhere. The last batch may be smaller unless `drop_last`. One pass is one epoch; the
    next pass is the next epoch.

    Raises OptionError when sizes, options or the augmentation's name do not fit.

        >>> x, y = torch.zeros(10, 1, 2, 2, dtype=torch.uint8), torch.arange(10)
        >>> [len(labels) for _, labels in Batches(x, y, batch_size=4)]
        [4, 4, 2]
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        augment: str | Augment | None = None,
        drop_last: bool = False,
        device: str | torch.device = "cpu",
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if len(x) != len(y):
            raise OptionError(f"there are {len(x)} inputs but {len(y)} labels")
        _check_batch_size(batch_size)
        self._drop = drop_last
        self._size = batch_size
        self._count = len(x)
        if len(self) == 0:
            raise OptionError(f"{len(x)} samples make no batch of {batch_size}: use a smaller batch_size or more data")
        self._augment = _augmentation(augment)
        self._shuffle = shuffle
        self._x, self._y = x.to(device), y.to(device)
        self._scale, self._shift = _normalisation(x, mean, std)
        if self._scale is not None and self._shift is not None:
            self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        super().__init__(
            seed, {"samples": len(x), "batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last}
        )

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self._count // self._size if self._drop else -(-self._count // self._size)

    def _epoch_batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = None
        if self._shuffle:
            order = torch.randperm(self._count, generator=generator(self._seed, epoch, _ORDER)).to(self._x.device)
        for number in range(start, len(self)):
            begin, end = number * self._size, min((number + 1) * self._size, self._count)
            if order is None:
                x, y = self._x[begin:end], self._y[begin:end].clone()
            else:
                x, y = self._x.index_select(0, order[begin:end]), self._y.index_select(0, order[begin:end])
            if self._augment is not None:
                x = self._augment(x, generator(self._seed, epoch, _CHANGE, number))
            x = x.to(torch.float32, copy=True)  # own memory: a caller that changes a batch must not change the data
            if self._scale is not None and self._shift is not None:
                x = x.mul_(self._scale).add_(self._shift)
            yield x, y


class TextBatches(_Resumable):
    """Iterate (inputs, targets) windows of a byte stream, int64 [B, length] each, targets one byte ahead.

    `x` and `y` are uint8 [N], `y[i]` the byte after `x[i]`, as in a bundle of task "text". "random": each window
    starts anywhere, drawn from (seed, epoch, batch index) alone, and an epoch is `steps` batches (default N //
    (batch_size * length)). "sequential": windows side by side in their order, each byte once, for evaluation; fewer
    than `length` bytes at the end are left out. Both are moved to `device` once. Raises OptionError when the stream
    is shorter than a window.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        length: int,
        seed: int = 0,
        mode: Literal["random", "sequential"] = "random",
        steps: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if x.ndim != 1 or x.shape != y.shape:
            raise OptionError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must be streams of the same length")
        _check_batch_size(batch_size)
        if not 1 <= length <= len(x):
            raise OptionError(f"length is {length}: give a window from 1 to the stream's {len(x)} bytes")
        if mode not in ("random", "sequential"):
            raise OptionError(
                f"mode is {mode!r}{nearest(mode, ('random', 'sequential'))}: use 'random' or 'sequential'"
            )
        if steps is not None and (steps < 1 or mode == "sequential"):
            raise OptionError(f"steps is {steps}: give a number from 1 up, and only in random mode")
        self._windows = len(x) // length
        self._size, self._length, self._mode = batch_size, length, mode
        if mode == "random":
            self._steps = steps or max(1, self._windows // batch_size)
        else:
            self._steps = -(-self._windows // batch_size)
        self._x, self._y = x.to(device), y.to(device)
        self._within = torch.arange(length, device=device)
        super().__init__(
            seed, {"bytes": len(x), "batch_size": batch_size, "length": length, "mode": mode, "steps": self._steps}
        )

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self._steps

    def _epoch_batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(start, self._steps):
            if self._mode == "random":
                g = generator(self._seed, epoch, number)
                begins = torch.randint(0, len(self._x) - self._length + 1, (self._size,), generator=g)
            else:
                last = min((number + 1) * self._size, self._windows)
                begins = torch.arange(number * self._size, last) * self._length
            at = begins.to(self._x.device)[:, None] + self._within
            yield self._x[at].long(), self._y[at].long()


def train_batches(
    bundle: DataBundle,
    batch_size: int,
    seed: int = 0,
    *,
    length: int = 128,
    augment: str | Augment | None = "default",
    drop_last: bool = False,
    device: str | torch.device = "cpu",
) -> Batches | TextBatches:
    """Return the training loader of a bundle: shuffled and augmented in the set's usual way, or random text windows.

    `augment` "default" is the bundle's own; None switches it off. `length` is the window of a text set.
    """
    if bundle.task == "text":
        return TextBatches(bundle.train_x, bundle.train_y, batch_size, length, seed, device=device)
    chosen = bundle.augment if augment == "default" else augment
    x, y = bundle.train_x, bundle.train_y
    return Batches(x, y, batch_size, seed, True, chosen, drop_last, device, mean=bundle.mean, std=bundle.std)


def eval_batches(
    bundle: DataBundle, batch_size: int = 500, *, length: int = 128, device: str | torch.device = "cpu"
) -> Batches | TextBatches:
    """Return the loader of a bundle's test part: every sample once, in its order, not augmented."""
    if bundle.task == "text":
        return TextBatches(bundle.test_x, bundle.test_y, batch_size, length, mode="sequential", device=device)
    x, y = bundle.test_x, bundle.test_y
    return Batches(x, y, batch_size, shuffle=False, device=device, mean=bundle.mean, std=bundle.std)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}: give a number from 1 up")


def _augmentation(augment: str | Augment | None) -> Augment | None:
    if isinstance(augment, str):
        if augment not in AUGMENTS:
            raise OptionError(
                f"unknown augmentation {augment!r}{nearest(augment, AUGMENTS)}: "
                f"use one of {', '.join(AUGMENTS)}, or None"
            )
        return AUGMENTS[augment]
    return augment


def _normalisation(
    x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the factor and the summand that take a stored batch to a normalised one (None: nothing to do)."""
    divisor = 1.0 if x.is_floating_point() else 255.0
    if not mean and not std:
        return (None, None) if divisor == 1.0 else (torch.tensor(1.0 / divisor), torch.tensor(0.0))
    m, s = torch.tensor(mean or [0.0], dtype=torch.float64), torch.tensor(std or [1.0], dtype=torch.float64)
    if x.ndim < 2 or any(len(t) not in (1, x.shape[1]) for t in (m, s)) or not bool((s > 0).all()):
        raise OptionError(
            f"mean {tuple(m.tolist())} and std {tuple(s.tolist())} do not fit inputs of shape {tuple(x.shape)}: "
            "give one number a channel, std above 0"
        )
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return (1.0 / (divisor * s)).float().view(shape), (-m / s).float().view(shape)
