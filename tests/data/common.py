"""What tiny data files are made of."""

from __future__ import annotations

import io
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from rarefy import data
from rarefy.errors import DataError


def idx_images(count: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, count * 784, dtype=np.uint8)
    return struct.pack(">4I", 0x803, count, 28, 28) + pixels.tobytes()


def idx_labels(count: int) -> bytes:
    return struct.pack(">2I", 0x801, count) + bytes(i % 10 for i in range(count))


def cifar_records(count: int, seed: int, labels: int = 1, classes: int = 10) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = rng.integers(0, 256, (count, labels + 3072), dtype=np.uint8)
    out[:, :labels] = rng.integers(0, classes, (count, labels), dtype=np.uint8)
    return out


def refused(root: Path, name: str, file: str, why: str = "", verify: bool = False) -> None:
    with pytest.raises(DataError, match=re.escape(file) + ".*" + why):
        data.load(name, root, download=False, verify=verify)


def archive(path: Path, members: dict[str, bytes | None], prefix: str = "cifar-100-binary/") -> None:
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(prefix + name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content or b""))
