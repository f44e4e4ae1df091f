"""rarefy: make PyTorch networks sparse before, during and after training, and prove what it cost and gained."""

from __future__ import annotations

from rarefy import methods
from rarefy._config import show_config
from rarefy._sparsify import sparsify
from rarefy.engine import Method, Sparsifier
from rarefy.errors import RarefyError

__version__ = "0.1.0"

__all__ = ["Method", "RarefyError", "Sparsifier", "__version__", "methods", "show_config", "sparsify"]
