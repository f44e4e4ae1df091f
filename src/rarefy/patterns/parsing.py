"""Patterns as short texts, for configuration files and the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from rarefy.errors import OptionError, nearest
from rarefy.patterns.base import Pattern
from rarefy.patterns.kinds import NM, Block, FanIn, FilterGroup, Slice, Unstructured
from rarefy.patterns.transposable import TransposableNM

_WORDS: dict[str, Pattern] = {
    "unstructured": Unstructured(),
    "row": Slice(0),
    "channel": Slice(0),
    "filter": Slice(0),
    "column": Slice(1),
    "fan-in": FanIn(),
}

PATTERNS: Mapping[str, Pattern] = MappingProxyType(
    {
        **_WORDS,
        "2:4": NM(2, 4),
        "2:4@0": NM(2, 4, 0),
        "4:8t": TransposableNM(4, 8),
        "4:8t-exact": TransposableNM(4, 8, "exact"),
        "4x1": Block(4, 1),
        "group16": FilterGroup(16),
        "group16-tap": FilterGroup(16, taps=True),
    }
)
"""Texts that `parse_pattern` reads: every word, and one example of each form with numbers."""


def parse_pattern(text: str | Pattern) -> Pattern:
    """Read a pattern from its short text; a pattern is returned as it is.

    | text | pattern |
    |---|---|
    | `unstructured` | `Unstructured()` |
    | `2:4`, `2:4@0` | `NM(2, 4)`, the same along dimension 0 |
    | `4:8t`, `4:8t-exact` | `TransposableNM(4, 8)`, the same with another solver |
    | `4x1` | `Block(4, 1)` |
    | `row`, `channel`, `filter` | `Slice(0)` |
    | `column` | `Slice(1)` |
    | `fan-in` | `FanIn()` |
    | `group16`, `group16-tap` | `FilterGroup(16)`, `FilterGroup(16, taps=True)` |

    Case and outer blanks do not matter; `parse_pattern(str(pattern)) == pattern` for every pattern.

    Raises:
        OptionError: the text is none of these; names the nearest one.
        PatternError: its numbers are impossible, such as 4:2.

    Example:
        >>> from rarefy.patterns import parse_pattern
        >>> parse_pattern("2:4@0"), parse_pattern("row")
        (NM(n=2, m=4, dim=0), Slice(dim=0))
        >>> parse_pattern("unstructred")
        Traceback (most recent call last):
        ...
        rarefy.errors.OptionError: unknown pattern 'unstructred' (did you mean 'unstructured'?); use one of ...
    """
    if isinstance(text, Pattern):
        return text
    if not isinstance(text, str):
        raise OptionError(f"a pattern is a text such as '2:4' or a rarefy.patterns.Pattern, not {text!r}")
    word = text.strip().lower()
    if word in _WORDS:
        return _WORDS[word]
    if match := re.fullmatch(r"(\d+):(\d+)(?:@(\d+))?", word):
        n, m, dim = match.groups(default="1")
        return NM(int(n), int(m), int(dim))
    if match := re.fullmatch(r"(\d+):(\d+)t(?:-(\w+))?", word):
        return TransposableNM(int(match[1]), int(match[2]), match[3] or "fast")
    if match := re.fullmatch(r"(\d+)x(\d+)", word):
        return Block(*map(int, match.groups()))
    if match := re.fullmatch(r"group(\d+)(-tap)?", word):
        return FilterGroup(int(match[1]), taps=match[2] is not None)
    raise OptionError(f"unknown pattern {text!r}{nearest(word, PATTERNS)}; use one of {', '.join(PATTERNS)}")
