"""The log of what happened to the topology."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Event(NamedTuple):
    """One change of one layer's mask: at which optimizer step, how many weights were dropped, grown and are kept now."""

    step: int
    layer: str
    dropped: int
    grown: int
    kept: int


def net(events: Sequence[Event]) -> list[Event]:
    """Return one event a layer: what all of one step's events have changed, however many rounds it took."""
    dropped: dict[str, int] = {}
    last = {event.layer: event for event in events}
    for event in events:
        dropped[event.layer] = dropped.get(event.layer, 0) + event.dropped - event.grown
    return [e._replace(dropped=max(dropped[name], 0), grown=max(-dropped[name], 0)) for name, e in last.items()]


class Cost(NamedTuple):
    """What training one layer has cost so far, in units that do not depend on the input size."""

    steps: int  # optimizer steps taken
    kept_steps: int  # sum over those steps of the kept weights
    dense_gradient_steps: int  # steps whose gradient was needed for every weight, kept or not
    further_gradients: int  # sum over steps of other weights, not kept, whose gradient was computed
