"""Tiny data sets made on the fly, and the real ones where they are."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.common import cifar_records, idx_images, idx_labels


@pytest.fixture(autouse=True)
def no_outside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tests away from the user's cache, data folder and proxies."""
    monkeypatch.delenv("RAREFY_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("no_proxy", "*")


_NAMED = os.environ.get("RAREFY_DATA")  # before the fixture above hides it
_REAL = Path(_NAMED) if _NAMED and Path(_NAMED).is_dir() else None


@pytest.fixture
def real_data() -> Path:
    """Return the folder with real data, or skip and say how to get it."""
    if _REAL is None:
        pytest.skip("no real data: set RAREFY_DATA to a folder that holds it")
    return _REAL


@pytest.fixture
def tiny_mnist(tmp_path: Path) -> Path:
    """Return a root folder with an MNIST of 40 training and 20 test images."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for prefix, count in (("train", 40), ("t10k", 20)):
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_images(count)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_labels(count)))
    return tmp_path


@pytest.fixture
def tiny_cifar(tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of a root folder with CIFAR-10 batches of 8 images each, the given ones only."""

    def make(*numbers: int, test: bool = True) -> Path:
        folder = tmp_path / "cifar-10-batches-bin"
        folder.mkdir()
        for n in numbers:
            cifar_records(8, n).tofile(folder / f"data_batch_{n}.bin")
        if test:
            cifar_records(8, 99).tofile(folder / "test_batch.bin")
        return tmp_path

    return make
