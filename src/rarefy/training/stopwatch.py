"""How long a training took, on the clock and on the processor."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Time:
    """An amount of time, as `now() - before`.

    `seconds` passed on the clock; `cpu_seconds` were spent by all threads of this process on all cores. On a machine that does
    other work too the second says more: a run that had to wait did not compute meanwhile. None where it was not recorded.
    """

    seconds: float
    cpu_seconds: float | None

    @classmethod
    def now(cls) -> Self:
        """Return the two clocks, which mean something only beside another reading of them in this process."""
        return cls(time.perf_counter(), time.process_time())

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Return what a checkpoint has kept; those of earlier versions have no processor time."""
        return cls(float(state["seconds"]), state.get("cpu_seconds"))

    def __add__(self, other: Time) -> Time:
        here, there = self.cpu_seconds, other.cpu_seconds
        return Time(self.seconds + other.seconds, None if here is None or there is None else here + there)

    def __sub__(self, other: Time) -> Time:
        here, there = self.cpu_seconds, other.cpu_seconds
        return Time(self.seconds - other.seconds, None if here is None or there is None else here - there)
