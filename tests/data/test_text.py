"""Text files as bytes."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest
import torch

from rarefy import data
from rarefy.errors import DataError
from tests.data.common import refused


def test_text(tmp_path: Path) -> None:
    text = "naïve ✓ text\n".encode() * 50
    for name, content in (("a.txt", text), ("a.txt.gz", gzip.compress(text)), ("a.txt.xz", lzma.compress(text))):
        (tmp_path / name).write_bytes(content)
        bundle = data.load_text(tmp_path / name, fraction=0.2)
        whole = bytes(bundle.train_x.tolist() + bundle.train_y[-1:].tolist() + bundle.test_x.tolist()) + text[-1:]
        assert whole == text
        assert bundle.task == "text"
        assert bundle.num_classes == 256
        assert torch.equal(bundle.train_x[1:], bundle.train_y[:-1])
        assert len(bundle.test_x) == len(text) // 5 - 1
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text)[:-9])
    with pytest.raises(DataError, match=r"a\.txt\.xz"):
        data.load_text(tmp_path / "a.txt.xz")
    with pytest.raises(DataError, match=r"a\.txt .*more than the 9 bytes"):
        data.load_text(tmp_path / "a.txt", limit=9)
    with pytest.raises(DataError, match=r"did you mean 'tinyshakespeare'"):
        data.load_text("tinyshakespear")
    (tmp_path / "a.txt").write_bytes(b"abc")
    with pytest.raises(DataError, match="too few"):
        data.load_text(tmp_path / "a.txt")
    rest, x, _ = data.train_val_split(bundle, 0.1)
    assert torch.equal(torch.cat([rest.train_x, x]), bundle.train_x)


def test_tampered_known_text(tmp_path: Path) -> None:
    path = tmp_path / "text" / "tinyshakespeare" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"First Citizen: something else entirely\n" * 20)
    refused(tmp_path, "tinyshakespeare", "input.txt", "not the official one", verify=True)
    assert "Tiny Shakespeare" in data.load("tinyshakespeare", tmp_path, verify=False).note
