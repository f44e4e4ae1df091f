"""The log of what happened to the topology."""

from __future__ import annotations

from typing import NamedTuple


class Event(NamedTuple):
    """One change of one layer's mask: at which optimizer step, how many weights were dropped, grown and are kept now."""

    step: int
    layer: str
    dropped: int
    grown: int
    kept: int


class Cost(NamedTuple):
    """What training one layer has cost so far, in units that do not depend on the input size."""

    steps: int  # optimizer steps taken
    kept_steps: int  # sum over those steps of the kept weights
    dense_gradient_steps: int  # steps whose gradient was needed for every weight, kept or not
    further_gradients: int  # sum over steps of other weights, not kept, whose gradient was computed
