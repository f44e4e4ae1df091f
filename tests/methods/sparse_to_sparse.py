"""The methods that train sparse networks from the first step on, with options that make them move often."""

from __future__ import annotations

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "itop": {"every": 10},
    "dsr": {"every": 10},
    "deep-r": {"l1": 1e-2},
    "srigl": {"every": 10},
    "gse": {"every": 10},
    "top-kast": {"every": 5, "explore": 8},
    "snfs": {"every": 10, "window": 6},
}
EXACT_PER_LAYER = ("itop", "deep-r", "top-kast")  # the number that each layer keeps never changes
EXACT_IN_ALL = ("dsr", "snfs", "gse")  # the number that all layers keep together never changes
FROM_ZERO = tuple(name for name in METHODS if name != "top-kast")  # what grows starts at 0, without optimizer state
