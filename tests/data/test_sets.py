"""Data sets: what is right loads, what is damaged is refused by its name."""

from __future__ import annotations

import gzip
import lzma
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rarefy import data
from rarefy.data import _idx, _load, _places
from rarefy.errors import DataError, OptionError
from tests.data.common import archive, cifar_records, idx_images, idx_labels, refused

TRAIN = "train-images-idx3-ubyte.gz"
LABELS = "t10k-labels-idx1-ubyte.gz"


def test_tiny_mnist(tiny_mnist: Path) -> None:
    bundle = data.load("mnist", tiny_mnist, verify=False)
    assert bundle.train_x.shape == (40, 1, 28, 28)
    assert bundle.train_x.dtype == torch.uint8
    assert bundle.train_x.flatten().numpy().tobytes() == idx_images(40)[16:]
    assert bundle.test_y.dtype == torch.int64
    assert bundle.test_y.tolist() == [i % 10 for i in range(20)]
    assert "40 training and 20 test" in bundle.note
    assert str(tiny_mnist) not in bundle.note
    refused(tiny_mnist, "mnist", "train-images", "not the official one", verify=True)


def test_idx_without_gz_and_in_torchvision_folders(tiny_mnist: Path, tmp_path: Path) -> None:
    there = tmp_path / "other" / "MNIST" / "raw"
    there.mkdir(parents=True)
    for path in (tiny_mnist / "mnist").iterdir():
        (there / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    assert len(data.load("mnist", tmp_path / "other", verify=False).train_x) == 40


def test_damaged_idx_files(tiny_mnist: Path) -> None:
    path = tiny_mnist / "mnist" / TRAIN
    raw = idx_images(40)
    for bad, why in (
        (raw[:-1], "items need"),
        (raw + b"\0", "items need"),
        (b"\0\0\x08\x01" + raw[4:], "magic number"),
        (raw[:8] + b"\0\0\0\x20" + raw[12:], "32x28"),
        (raw[:10], "too few"),
        (b"", "too few"),
        (idx_images(39), "40 labels for 39 images"),
    ):
        path.write_bytes(gzip.compress(bad))
        refused(tiny_mnist, "mnist", "-ubyte.gz", why)
    for bad in (
        b"no gzip at all",
        b"",
        gzip.compress(raw) + b"more",
        gzip.compress(raw)[:-20],
        gzip.compress(raw)[:-4],
    ):
        path.write_bytes(bad)
        refused(tiny_mnist, "mnist", TRAIN)
    path.write_bytes(gzip.compress(raw))
    labels = tiny_mnist / "mnist" / LABELS
    labels.write_bytes(gzip.compress(idx_labels(20)[:-1] + b"\x0a"))
    refused(tiny_mnist, "mnist", LABELS, "label 19 is 10")


def test_any_flipped_bit_of_a_gz_file_is_noticed(tiny_mnist: Path) -> None:
    path = tiny_mnist / "mnist" / LABELS
    good = path.read_bytes()
    want = data.load("mnist", tiny_mnist, verify=False)
    for at in range(len(good)):
        for bit in (1, 16, 128):
            path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
            try:
                got, said = data.load("mnist", tiny_mnist, verify=False).test_y, ""
            except DataError as error:
                got, said = None, str(error)
            # only the header's time stamp, flags and name carry no data
            assert LABELS in said if got is None else at < 10 and torch.equal(got, want.test_y)
    for end in range(len(good)):
        path.write_bytes(good[:end])
        refused(tiny_mnist, "mnist", LABELS)


def test_a_bomb_is_not_blown_up(tiny_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_idx, "_MOST", 100)
    (tiny_mnist / "mnist" / LABELS).write_bytes(gzip.compress(bytes(10_000_000)))
    refused(tiny_mnist, "mnist", LABELS, "more than the 108 bytes")


def test_a_part_of_mnist_is_named(tiny_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny_mnist / "mnist" / LABELS).unlink()
    refused(tiny_mnist, "mnist", "t10k-labels-idx1-ubyte")
    monkeypatch.setenv("RAREFY_DATA", str(tiny_mnist))
    with pytest.raises(DataError, match="part of MNIST but not t10k-labels"):
        data.load("mnist", verify=False)


def test_tiny_cifar_and_a_part_of_it(tiny_cifar: Callable[..., Path]) -> None:
    root = tiny_cifar(1, 2)
    bundle = data.load("cifar10", root, verify=False)
    first = cifar_records(8, 1)
    assert bundle.train_x.shape == (16, 3, 32, 32)
    assert bundle.augment == "crop-flip"
    assert np.array_equal(bundle.train_x[:8].flatten(1).numpy(), first[:, 1:])
    assert bundle.train_y[:8].tolist() == first[:, 0].tolist()
    assert "8 test images and only the first 16 of 50,000 training images" in bundle.note
    (root / "cifar-10-batches-bin" / "data_batch_2.bin").rename(root / "cifar-10-batches-bin" / "data_batch_4.bin")
    note = data.load("cifar10", root, verify=False).note
    assert "only 16 of 50,000 training images (data_batch_1.bin, data_batch_4.bin)" in note
    refused(root, "cifar10", "data_batch_1.bin", "expected 30,730,000", verify=True)


def test_cifar_without_test_or_training_batch(tiny_cifar: Callable[..., Path]) -> None:
    root = tiny_cifar(1, test=False)
    refused(root, "cifar10", "test_batch.bin")
    folder = root / "cifar-10-batches-bin"
    (folder / "data_batch_1.bin").rename(folder / "test_batch.bin")
    refused(root, "cifar10", "data_batch_1.bin")


def test_damaged_cifar_files(tiny_cifar: Callable[..., Path]) -> None:
    root = tiny_cifar(1, 2, 3, 4, 5)
    assert "40 training images" in data.load("cifar10", root, verify=False).note
    path = root / "cifar-10-batches-bin" / "data_batch_3.bin"
    good = path.read_bytes()
    for bad, why in (
        (good[:-1], "24,583 bytes"),
        (good + b"\0", "24,585 bytes"),
        (b"", "0 bytes"),
        (good[: 3073 * 5] + b"\x0a" + good[3073 * 5 + 1 :], "label of image 5 is 10"),
        (good * 1251, "more than"),
    ):
        path.write_bytes(bad)
        refused(root, "cifar10", "data_batch_3.bin", why)


def pack(records: np.ndarray) -> bytes:
    """Do the opposite of the decoder."""
    red, green, blue = records[:, 1:].reshape(-1, 3, 32, 32).transpose(1, 0, 2, 3)
    planes = np.stack([green, red - green, blue - green])
    planes[:, :, 1:] = planes[:, :, 1:] - planes[:, :, :-1].copy()
    planes[:, :, :, 1:] = planes[:, :, :, 1:] - planes[:, :, :, :-1].copy()
    return records[:, 0].tobytes() + planes.tobytes()


def test_packed_cifar(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10"
    folder.mkdir()
    for n, file in ((1, "data_batch_1.xz"), (99, "test_batch.xz")):
        (folder / file).write_bytes(lzma.compress(pack(cifar_records(8, n)), preset=0))
    bundle = data.load("cifar10", tmp_path, verify=False)
    assert np.array_equal(bundle.train_x.flatten(1).numpy(), cifar_records(8, 1)[:, 1:])
    path = folder / "data_batch_1.xz"
    good = path.read_bytes()
    raw = pack(cifar_records(8, 1))
    bad = [good[:-1], good[:-30], good[:5000], b"", b"garbage", good + b"more", lzma.compress(raw[:-1], preset=0)]
    bad += [good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :] for at in (0, 7, 40, 9000, len(good) - 3)]
    for content in bad:
        path.write_bytes(content)
        refused(tmp_path, "cifar10", "data_batch_1.xz")


def test_cifar100_archive_is_read_in_place(tmp_path: Path) -> None:
    train, test = cifar_records(6, 1, 2, 100), cifar_records(4, 2, 2, 20)
    path = tmp_path / "cifar-100-binary.tar.gz"
    archive(path, {"../../evil.txt": b"x", "train.bin": train.tobytes(), "test.bin": test.tobytes()})
    bundle = data.load("cifar100", tmp_path, verify=False)
    assert bundle.num_classes == 100
    assert bundle.classes[99] == "worm"
    assert bundle.classes[0] == "apple"
    assert bundle.train_y.tolist() == train[:, 1].tolist(), "the fine label is the second byte"
    assert np.array_equal(bundle.test_x.flatten(1).numpy(), test[:, 2:])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert not (tmp_path.parent / "evil.txt").exists()


def test_bad_archives(tmp_path: Path) -> None:
    path = tmp_path / "cifar-100-binary.tar.gz"
    train, test = cifar_records(6, 1, 2, 100).tobytes(), cifar_records(4, 2, 2, 100).tobytes()
    archive(path, {"train.bin": train, "test.bin": test})
    good = path.read_bytes()
    for cut in (0, 100, len(good) // 2, len(good) - 500):
        path.write_bytes(good[:cut])
        refused(tmp_path, "cifar100", path.name)
    archive(path, {"train.bin": train})
    refused(tmp_path, "cifar100", path.name, "does not hold test.bin")
    archive(path, {"train.bin": None, "test.bin": test})
    refused(tmp_path, "cifar100", path.name, "not a plain file")
    archive(path, {"train.bin": train, "test.bin": bytes(3074 * 10_001)})
    refused(tmp_path, "cifar100", path.name, "more than belong")
    archive(path, {"train.bin": train + b"\0", "test.bin": test})
    refused(tmp_path, "cifar100", "train.bin")
    archive(path, {"train.bin": train, "test.bin": test})
    refused(tmp_path, "cifar100", "train.bin", "not the official one", verify=True)


def test_search_order(tiny_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = _places.cache() / "mnist"
    shutil.copytree(tiny_mnist / "mnist", cached)
    assert "official source" in data.load("mnist", download=False, verify=False).note
    monkeypatch.setenv("RAREFY_DATA", str(tiny_mnist))
    assert "RAREFY_DATA" in data.load("mnist", verify=False).note
    assert "given folder" in data.load("mnist", tiny_mnist, verify=False).note
    (tmp_path / "empty").mkdir()
    assert "RAREFY_DATA" in data.load("mnist", tmp_path / "empty", verify=False).note
    with pytest.raises(DataError, match="nowhere is not a folder"):
        data.load("mnist", tmp_path / "nowhere", download=False)
    monkeypatch.setenv("RAREFY_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"RAREFY_DATA names .*gone"):
        data.load("mnist")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "tinyshakespeare"])
def test_missing_says_where_it_was_looked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}.*set RAREFY_DATA"):
        data.load(name, tmp_path, download=False)


def test_unknown_name() -> None:
    with pytest.raises(OptionError, match="did you mean 'cifar10'"):
        data.load("cifar-10")


def test_digits() -> None:
    pytest.importorskip("sklearn")
    bundle = data.load("digits")
    assert bundle.train_x.shape == (1297, 1, 8, 8)
    assert bundle.test_x.shape == (500, 1, 8, 8)
    assert torch.bincount(bundle.test_y).tolist() == [50, 51, 49, 51, 50, 51, 50, 50, 48, 50]
    assert int(bundle.train_x.max()) == 255
    assert torch.equal(bundle.test_x, data.load("digits").test_x)


def test_digits_without_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="scikit-learn"):
        data.load("digits")


def test_demo_data_falls_back_and_says_so(tiny_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    bundle = data.demo_data(download=False)
    assert bundle.name == "digits"
    assert "because MNIST is in no local folder" in bundle.note
    monkeypatch.setattr(_load, "_answers", lambda *_: False)
    assert "cannot be reached" in data.demo_data().note
    with pytest.raises(DataError, match="not the official one"):  # damaged is not missing
        data.demo_data(tiny_mnist)


def test_train_val_split(tiny_mnist: Path) -> None:
    bundle = data.load("mnist", tiny_mnist, verify=False)
    rest, x, y = data.train_val_split(bundle, 0.25, seed=3)
    assert torch.bincount(y).tolist() == [1] * 10
    assert len(rest.train_y) == 30
    assert "10 training samples" in rest.note
    together = torch.cat([rest.train_x, x]).flatten(1)
    assert {tuple(r) for r in together.tolist()} == {tuple(r) for r in bundle.train_x.flatten(1).tolist()}
    again, other = data.train_val_split(bundle, 0.25, seed=3)[1], data.train_val_split(bundle, 0.25, seed=4)[1]
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert len(data.train_val_split(bundle, 0.33)[2]) == 13, "exact also where classes do not divide"
    for bad in (0.0, 1.0, -1.0, 0.001):
        with pytest.raises(OptionError):
            data.train_val_split(bundle, bad)


@pytest.mark.parametrize(
    ("name", "train", "first"),
    [
        ("mnist", 60_000, [5, 0, 4, 1, 9]),
        ("fashion-mnist", 60_000, [9, 0, 0, 3, 0]),
        ("cifar10", 20_000, [6, 9, 9, 4, 1]),
    ],
)
def test_real_sets(real_data: Path, name: str, train: int, first: list[int]) -> None:
    bundle = data.load(name, real_data, download=False)
    assert len(bundle.train_x) >= train
    assert len(bundle.test_x) == 10_000
    assert bundle.train_y[:5].tolist() == first
    assert torch.bincount(bundle.test_y).float().std() < 70
    pixels = bundle.train_x[::5].transpose(0, 1).flatten(1).float() / 255
    assert torch.allclose(pixels.mean(1), torch.tensor(bundle.mean), atol=4e-3)
    assert torch.allclose(pixels.std(1), torch.tensor(bundle.std), atol=4e-3)
    if len(bundle.train_x) < 50_000:
        assert "only the first 20,000 of 50,000" in bundle.note


def test_real_text_and_a_real_file_with_one_bit_wrong(real_data: Path, tmp_path: Path) -> None:
    bundle = data.load("tinyshakespeare", real_data)
    assert bytes(bundle.train_x[:13].tolist()) == b"First Citizen"
    assert len(bundle.train_x) == 1_003_854
    folder = tmp_path / "mnist"
    folder.mkdir()
    for path in (real_data / "mnist").glob("*.gz"):
        shutil.copyfile(path, folder / path.name)
    raw = bytearray(gzip.decompress((folder / LABELS).read_bytes()))
    raw[100] ^= 1
    (folder / LABELS).write_bytes(gzip.compress(bytes(raw)))
    refused(tmp_path, "mnist", LABELS, "not the official one", verify=True)
