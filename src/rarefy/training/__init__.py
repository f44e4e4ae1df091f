"""Runs from one configuration, comparisons of many, and callbacks for other people's loops.

`SparsityCallback` (Lightning) and `HFSparsityCallback` (Hugging Face Trainer) import their framework when they are
first asked for; without it they raise an error that names the extra to install.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rarefy.training.callback import SparsityCallback
    from rarefy.training.compare import Outcome, compare
    from rarefy.training.config import RunConfig
    from rarefy.training.hf import HFSparsityCallback
    from rarefy.training.loop import train
    from rarefy.training.plan import CompareConfig
    from rarefy.training.signals import Interrupted

__all__ = [
    "CompareConfig",
    "HFSparsityCallback",
    "Interrupted",
    "Outcome",
    "RunConfig",
    "SparsityCallback",
    "compare",
    "train",
]

_HOMES = {
    "CompareConfig": "plan",
    "HFSparsityCallback": "hf",
    "Interrupted": "signals",
    "Outcome": "compare",
    "RunConfig": "config",
    "SparsityCallback": "callback",
    "compare": "compare",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # also over the submodule of the same name, `compare`
    return value
