"""A run's folder: its configuration, environment, metrics, result, masks and checkpoint."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from rarefy._files import atomic_write
from rarefy.errors import ConfigError, StateError
from rarefy.training.config import RunConfig
from rarefy.training.reading import read_mapping, validate

Status = Literal["finished", "failed", "interrupted"]

HEADER = (
    "# A rarefy run: `rarefy train --resume FOLDER` continues it, `rarefy train THIS_FILE --name NEW` repeats it.\n"
)


class RunFolder:
    """The files of one run, each written so that it is whole or not there (metrics.jsonl grows line by line)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.environment_file = self.path / "environment.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.result_file = self.path / "result.json"
        self.masks_file = self.path / "masks.safetensors"
        self.checkpoint_file = self.path / "checkpoint.ckpt"

    def exists(self) -> bool:
        """Return whether a run was ever started here."""
        return self.config_file.exists()

    def read_config(self) -> RunConfig:
        """Return the configuration that the run was started with."""
        if not self.exists():
            raise ConfigError(f"{str(self.path)!r} is no run folder: it has no {self.config_file.name}")
        return validate(RunConfig, read_mapping(self.config_file), str(self.config_file))

    def write_config(self, config: RunConfig) -> None:
        """Write the full configuration, defaults included."""
        with atomic_write(self.config_file, "w") as file:
            file.write(HEADER + yaml.safe_dump(config.dump(), sort_keys=False))

    def status(self) -> Status | None:
        """Return how the run ended, or None when it did not end (never started, running, or killed)."""
        found = self.read_result().get("status")
        return found if found in ("finished", "failed", "interrupted") else None

    def read_result(self) -> dict[str, Any]:
        """Return the contents of result.json, or an empty dict where there is none that can be read."""
        try:
            found = json.loads(self.result_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json; numbers that are not finite become null."""
        write_json(self.result_file, result)

    def start_afresh(self) -> None:
        """Remove what an earlier run left here, and nothing else."""
        for file in (self.result_file, self.metrics_file, self.masks_file, self.checkpoint_file, self.environment_file):
            file.unlink(missing_ok=True)


class Metrics:
    """Appends lines to metrics.jsonl; each is on its way to the disk when `write` returns."""

    def __init__(self, path: Path, length: int = 0) -> None:
        """Open `path` and cut it to `length` bytes: what came after the checkpoint will be written again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("ab")
        size = self._file.seek(0, os.SEEK_END)
        if size < length:
            self._file.close()
            raise StateError(
                f"{path} holds {size} bytes, but {length} were there when the checkpoint was written: it was changed "
                "since. Start the run again in another folder."
            )
        self._file.truncate(length)

    def write(self, *lines: Mapping[str, Any]) -> None:
        """Append one JSON object a line."""
        if lines:
            text = "".join(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines)
            self._file.write(text.encode())
            self._file.flush()

    def length(self) -> int:
        """Return how many bytes the file holds."""
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file; writing is over."""
        self._file.close()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_write(path, "w") as file:
        file.write(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return `value` with null in place of NaN and infinities, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def environment(threads: int) -> dict[str, Any]:
    """Return what the run's numbers depend on beside its configuration: versions, processor, threads, kernels."""
    import rarefy

    found = rarefy.show_config()
    return {
        "python": found.python,
        "torch": found.torch,
        "rarefy": rarefy.__version__,
        "cpu": found.cpu,
        "cores": os.cpu_count(),
        "gpu": found.cuda,
        "threads": threads,
        "native": found.asdict(),
        "platform": found.platform,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
