"""rarefy: make PyTorch networks sparse before, during and after training, and prove what it cost and gained."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rarefy import methods
from rarefy._config import show_config
from rarefy._sparsify import sparsify
from rarefy.engine import Method, Sparsifier
from rarefy.errors import RarefyError, nearest

if TYPE_CHECKING:
    from rarefy.deploy import accelerate, load, save
    from rarefy.rearrangement import rearrange
    from rarefy.reconstruction import convert

__version__ = "0.1.0"

__all__ = [
    "Method", "RarefyError", "Sparsifier", "__version__", "accelerate",
    "convert", "load", "methods", "rearrange", "save", "show_config", "sparsify",
]  # fmt: skip

_ROOMS = (
    "allocation",
    "analysis",
    "coupling",
    "data",
    "deploy",
    "kernels",
    "metrics",
    "models",
    "nn",
    "patterns",
    "rearrangement",
    "reconstruction",
    "report",
    "schedules",
    "scores",
    "search",
    "systems",
    "training",
)
_LATE = {
    "accelerate": "deploy",
    "convert": "reconstruction",
    "load": "deploy",
    "rearrange": "rearrangement",
    "save": "deploy",
}


def __getattr__(name: str) -> Any:
    """Import a room when it is first asked for: `rarefy.models` works after `import rarefy`, and costs nothing before."""
    if name in _ROOMS:
        return importlib.import_module(f"rarefy.{name}")
    if name in _LATE:
        return getattr(importlib.import_module(f"rarefy.{_LATE[name]}"), name)
    raise AttributeError(f"rarefy has no {name!r}{nearest(name, [*__all__, *_ROOMS])}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
