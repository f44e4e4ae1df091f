"""Data sets in memory: real ones by name, checked to the last byte, and loaders that resume exactly."""

from __future__ import annotations

from rarefy.data._augment import crop_flip
from rarefy.data._batches import Batches, TextBatches, eval_batches, train_batches
from rarefy.data._bundle import DataBundle, train_val_split
from rarefy.data._load import available, demo_data, load
from rarefy.data._text import load_text

__all__ = [
    "Batches",
    "DataBundle",
    "TextBatches",
    "available",
    "crop_flip",
    "demo_data",
    "eval_batches",
    "load",
    "load_text",
    "train_batches",
    "train_val_split",
]
