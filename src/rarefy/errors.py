"""What can go wrong, said so that the reader knows what, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RarefyError(Exception):
    """Base of every error that rarefy raises on purpose."""


class OptionError(RarefyError, ValueError):
    """An option or a number is out of its range, or its name is unknown."""


class SelectionError(RarefyError, LookupError):
    """A layer selection matches nothing, or names a layer that cannot be made sparse."""


class PatternError(RarefyError, ValueError):
    """A pattern does not fit a weight's shape, or a mask does not obey its pattern."""


class AllocationError(RarefyError, ValueError):
    """The asked sparsity cannot be shared out over the layers."""


class StateError(RarefyError, ValueError):
    """A saved state does not fit the model or sparsifier that it is loaded into."""


class DataError(RarefyError, OSError):
    """A data set or weight file is missing, incomplete or not what it should be."""


class ModelError(RarefyError, ValueError):
    """A model cannot be built or used as asked."""


class ConfigError(RarefyError, ValueError):
    """A run's configuration is not valid."""


def nearest(word: object, words: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest of `words`, or "" when none is close; `word` is what was given."""
    close = difflib.get_close_matches(str(word), list(words), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
