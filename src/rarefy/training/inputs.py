"""What a run reads: its data, split and batched, and the network that fits them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rarefy import data, models
from rarefy.data import Batches, DataBundle, TextBatches
from rarefy.training.config import RunConfig
from rarefy.training.seeds import derive

EVAL_BATCH = 1000

Normalise = tuple[tuple[float, ...], tuple[float, ...]]


class Inputs:
    """Training, validation and test batches of a configuration, and networks of the right input and output size.

    Attributes:
        train, test: loaders; `val` is one too, or None without a validation part.
        samples: training samples of an epoch (for text: positions count as one sample per window).
        example: one input [1, ...], normalised, on the CPU.
        name, note: of the data set, for tables.

    Args:
        normalise: mean and standard deviation per channel in the place of the data set's own: those that published weights
            were trained with.
    """

    def __init__(
        self, config: RunConfig, device: torch.device | str = "cpu", normalise: Normalise | None = None
    ) -> None:
        self.config = config
        self._options = models.options(config.model)
        whole = bundle_of(config.data, config.data_root)
        bundle = _first(whole, config.limit_train, config.limit_test)
        if normalise is not None:
            bundle = dataclasses.replace(bundle, mean=normalise[0], std=normalise[1])
        held: tuple[Tensor, Tensor] | None = None
        seed = derive(config.seed, "data")
        if config.validation:
            bundle, *parts = data.train_val_split(bundle, config.validation, seed)
            held = (parts[0], parts[1])
        self.bundle = bundle
        self.name, self.note = bundle.name, bundle.note
        length = int(config.model_options.get("context", self._options.get("context") or 128))
        augment = "default" if config.augment else None
        self.train = data.train_batches(bundle, config.batch_size, seed, length=length, augment=augment, device=device)
        self.test = data.eval_batches(
            bundle, EVAL_BATCH if bundle.task == "image" else 50, length=length, device=device
        )
        self.val: Batches | TextBatches | None = None
        if held is not None:
            part = dataclasses.replace(bundle, test_x=held[0], test_y=held[1])
            batch = EVAL_BATCH if bundle.task == "image" else 50
            self.val = data.eval_batches(part, batch, length=length, device=device)
        text = bundle.task == "text"
        self.samples = len(self.train) * config.batch_size if text else len(bundle.train_x)
        self.example: Tensor = next(iter(self.test))[0][:1].cpu().clone()

    def build(self, width: float) -> nn.Module:
        """Build the configuration's network at a width, for this data's classes, channels and image size."""
        bundle, known = self.bundle, self._options
        sizes: dict[str, Any] = {
            "num_classes": bundle.num_classes,
            "in_channels": bundle.in_channels,
            "image_size": bundle.image_size,
        }
        given = {key: value for key, value in sizes.items() if key in known and value}
        return models.build(self.config.model, width, **{**given, **self.config.model_options})

    def calibration(self, whole: bool = False) -> Iterable[tuple[Tensor, Tensor]]:
        """Return the first training batch of epoch 0, or the whole epoch, for methods that look at data by themselves."""
        loader = self.train
        position = loader.state_dict()
        try:
            loader.set_epoch(0)
            return list(loader) if whole else [next(iter(loader))]
        finally:
            loader.load_state_dict(position)


@functools.lru_cache(maxsize=4)
def bundle_of(name: str, root: str | None) -> DataBundle:
    """Return a data set by its name; the last few stay in memory."""
    return data.demo_data(root) if name == "demo" else data.load(name, root)


def _first(bundle: DataBundle, train: int | None, test: int | None) -> DataBundle:
    """Return the bundle with its first samples only, and a note that says so."""
    n, m = len(bundle.train_x), len(bundle.test_x)
    note = bundle.note
    if train is not None and train < n:
        note += f"; only the first {train:,} of {n:,} training samples"
    if test is not None and test < m:
        note += f"; only the first {test:,} of {m:,} test samples"
    return dataclasses.replace(
        bundle,
        note=note,
        train_x=bundle.train_x[:train],
        train_y=bundle.train_y[:train],
        test_x=bundle.test_x[:test],
        test_y=bundle.test_y[:test],
    )
