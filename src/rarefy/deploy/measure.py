"""Which of several ways is the fastest on this machine: measured, and remembered."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy import _files
from rarefy.kernels import native_config

FORMAT = 1


def race(ways: Mapping[str, Callable[[], object]], seconds: float = 0.03, least: int = 5) -> dict[str, float]:
    """Return each way's median time in seconds. They take turns, so that whatever else the machine does falls on all alike."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    end = time.perf_counter() + seconds * len(ways)
    while min(map(len, samples.values())) < least or time.perf_counter() < end:
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
        if len(next(iter(samples.values()))) >= 200:
            break
    return {name: statistics.median(times) for name, times in samples.items()}


def fingerprint(*parts: Any) -> str:
    """Return a key for what was measured: values, shapes, where a weight's zeros lie, and this machine."""
    digest = hashlib.sha256()
    config = native_config()
    machine = (_cpu(), config["isa"], config["threads"], config["version"], torch.__version__, FORMAT)
    for part in (*machine, *parts):
        if isinstance(part, Tensor):
            digest.update(repr((tuple(part.shape), str(part.dtype))).encode())
            digest.update((part != 0).cpu().numpy().tobytes())
        else:
            digest.update(repr(part).encode())
        digest.update(b"|")
    return digest.hexdigest()[:32]


class Memory:
    """Times measured before, in this process and in a file of the user's cache (`RAREFY_CACHE`; empty: no file)."""

    def __init__(self, folder: str | None = None) -> None:
        if folder is None:
            cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
            folder = os.environ.get("RAREFY_CACHE", str(Path(cache) / "rarefy"))
        self._path = Path(folder) / "measured.json" if folder else None
        self._times: dict[str, dict[str, float]] = self._read()

    def get(self, key: str) -> dict[str, float] | None:
        """Return the times under a key."""
        return self._times.get(key)

    def put(self, key: str, times: dict[str, float]) -> None:
        """Remember times in this process."""
        self._times[key] = times

    def save(self) -> None:
        """Write what is known to the file; a folder that cannot be written is no reason to fail."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            merged = {**self._read(), **self._times}
            recent = dict(list(merged.items())[-20_000:])
            with _files.atomic_write(self._path) as file:
                file.write(json.dumps({"format": FORMAT, "times": recent}).encode())
        except OSError:
            return

    def _read(self) -> dict[str, dict[str, float]]:
        if self._path is None:
            return {}
        try:
            content = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        if (
            not isinstance(content, dict)
            or content.get("format") != FORMAT
            or not isinstance(content.get("times"), dict)
        ):
            return {}
        return {key: times for key, times in content["times"].items() if _are_times(times)}


def _are_times(times: Any) -> bool:
    return isinstance(times, dict) and all(
        isinstance(name, str) and isinstance(t, float) and 0 < t < 1e6 for name, t in times.items()
    )


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown"
