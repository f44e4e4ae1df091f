"""When: update times, the rise of sparsity, the decay of the drop fraction."""

from __future__ import annotations

from rarefy.schedules.clock import Clock, Time, check_time, check_times
from rarefy.schedules.curves import CURVES, DECAYS, Curve, Decay, curve, decay
from rarefy.schedules.retraining import RETRAININGS, retraining

__all__ = [
    "CURVES",
    "DECAYS",
    "RETRAININGS",
    "Clock",
    "Curve",
    "Decay",
    "Time",
    "check_time",
    "check_times",
    "curve",
    "decay",
    "retraining",
]
