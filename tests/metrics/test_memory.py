"""Peak memory, by the kernel's mark and by sampling."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from rarefy.metrics import PeakMemory, memory

MIB = 1 << 20
linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")


def spike(size: int, hold: float = 0.0) -> None:
    block = np.ones(size, dtype=np.uint8)
    time.sleep(hold)
    del block


@linux
def test_a_short_peak_is_seen_and_does_not_stay() -> None:
    with PeakMemory() as peak:
        spike(192 * MIB, hold=0.05)
    assert 150 * MIB < peak.increase < 400 * MIB
    assert peak.bytes >= peak.start_bytes > 0 and peak.how in ("kernel", "sampled") and peak.cuda_bytes == 0
    with PeakMemory() as quiet:
        pass
    assert quiet.increase < 64 * MIB


@linux
def test_garbage_of_an_earlier_block_does_not_count() -> None:
    with PeakMemory() as first:
        cycle: list[object] = [np.ones(192 * MIB, dtype=np.uint8)]
        cycle.append(cycle)  # only the collector frees it
        del cycle
    assert first.increase > 150 * MIB
    with PeakMemory() as second:
        pass
    assert second.bytes < first.bytes - 150 * MIB


@linux
def test_sampling_where_the_kernel_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset_kernel_mark", lambda: False)
    with PeakMemory(interval=0.002) as peak:
        spike(192 * MIB, hold=0.2)
    assert peak.how == "sampled" and 150 * MIB < peak.increase < 400 * MIB


def test_systems_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("_STATUS", "_CLEAR", "_STATM"):
        monkeypatch.setattr(memory, name, tmp_path / "none" / name)
    with PeakMemory() as peak:
        pass
    assert peak.how == "process" and peak.bytes > 10 * MIB


def test_an_error_in_the_block_passes_through() -> None:
    peak = PeakMemory()
    with pytest.raises(ZeroDivisionError), peak:
        1 / 0  # noqa: B018
    assert peak.bytes >= 0 and peak._thread is None
