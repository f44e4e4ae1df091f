"""Sets come from their source whole or not at all; the source is a server on this machine."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rarefy import data
from rarefy._files import sha256
from rarefy.data import _cifar, _idx, _load, _places
from rarefy.errors import DataError
from tests.data.common import archive, cifar_records

TRAIN = "train-images-idx3-ubyte.gz"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Serve a folder on this machine; give the folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


def known_as(folder: Path, urls: tuple[str, ...]) -> _idx.IdxSet:
    """Take the files of a folder for the official MNIST."""
    packed = {f: sha256(folder / f"{f}.gz") for f in _idx.FILES}
    content = {f: hashlib.sha256(gzip.decompress((folder / f"{f}.gz").read_bytes())).hexdigest() for f in _idx.FILES}
    return dataclasses.replace(_idx.MNIST, urls=urls, packed=packed, content=content)


def test_mnist_is_downloaded_from_the_first_source_that_has_it(
    tiny_mnist: Path, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = served
    for path in (tiny_mnist / "mnist").iterdir():
        shutil.copyfile(path, folder / path.name)
    monkeypatch.setitem(_load._IDX, "mnist", known_as(folder, (f"{url}not-here/", url)))
    seen: list[int] = []
    bundle = data.load("mnist", progress=lambda done, _: seen.append(done))
    assert len(bundle.train_x) == 40 and "official source" in bundle.note and len(seen) >= 4
    assert sorted(p.name for p in (_places.cache() / "mnist").iterdir()) == sorted(f"{f}.gz" for f in _idx.FILES)
    (_places.cache() / "mnist" / TRAIN).unlink()  # a download that was interrupted is completed
    assert len(data.load("mnist").train_x) == 40
    assert len(data.load("mnist", download=False).train_x) == 40
    monkeypatch.setitem(_load._IDX, "mnist", known_as(folder, (url,)))
    shutil.rmtree(_places.cache())
    assert data.demo_data().name == "mnist"
    shutil.rmtree(_places.cache())
    (folder / TRAIN).write_bytes(b"<html>please log in</html>")
    note = data.demo_data().note
    assert "digits" in note and "could not be downloaded" in note and TRAIN not in str(list(_places.cache().rglob("*")))
    with pytest.raises(DataError, match=f"{TRAIN} is not what it should be"):
        data.load("mnist")


def test_cifar_is_downloaded_and_laid_out(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, url = served
    source = folder / "cifar-100-binary.tar.gz"
    train, test = cifar_records(6, 1, 2, 100).tobytes(), cifar_records(4, 2, 2, 100).tobytes()
    archive(source, {"train.bin": train, "test.bin": test})
    known = dataclasses.replace(_cifar.CIFAR100, url=f"{url}{source.name}", archive_sha256=sha256(source))
    monkeypatch.setitem(_load._CIFAR, "cifar100", known)
    monkeypatch.setattr(_cifar, "check_digest", lambda *_: None)
    assert len(data.load("cifar100", verify=False).train_x) == 6
    assert (_places.cache() / "cifar-100-binary" / "train.bin").read_bytes() == train
    assert [p.name for p in _places.cache().iterdir()] == ["cifar-100-binary"]


def test_a_download_lands_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.tar.gz"
    files: dict[str, bytes | None] = {
        "train.bin": cifar_records(6, 1, 2, 100).tobytes(),
        "test.bin": cifar_records(4, 2, 2, 100).tobytes(),
    }
    archive(source, files)

    def fetched(urls: list[str], path: Path, *_: object) -> Path:
        assert urls == [_cifar.CIFAR100.url]
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(source, path))

    monkeypatch.setattr(_load, "fetch_any", fetched)
    root = tmp_path / "root"
    with pytest.raises(DataError, match=r"train\.bin.*not the official one"):
        data.load("cifar100", root)
    assert [p.name for p in root.iterdir()] == ["cifar-100-binary.tar.gz"]
    monkeypatch.setattr(_cifar, "check_digest", lambda *_: None)
    (root / "cifar-100-binary.tar.gz").unlink()
    bundle = data.load("cifar100", root, verify=False)
    assert [p.name for p in root.iterdir()] == ["cifar-100-binary"]
    assert "official source" in bundle.note
    assert len(data.load("cifar100", root, download=False, verify=False).train_x) == 6
    _places.write_folder(root / "cifar-100-binary", {"train.bin": b"later"})  # somebody was there first
    assert (root / "cifar-100-binary" / "train.bin").read_bytes() == files["train.bin"]
    assert len(list(root.iterdir())) == 1
