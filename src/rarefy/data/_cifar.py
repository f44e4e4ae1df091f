"""CIFAR-10 and CIFAR-100 in their official binary version (no pickle): a folder, an archive, or packed .xz files."""

from __future__ import annotations

import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.data._bundle import DataBundle
from rarefy.data._names import CIFAR10_CLASSES, CIFAR100_CLASSES
from rarefy.data._read import check_digest, read_whole, refused
from rarefy.errors import DataError

_PIXELS = 3 * 32 * 32
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class CifarSet:
    """What is known about one of the two CIFAR sets."""

    title: str
    folder: str
    others: tuple[str, ...]
    archive: str
    archive_sha256: str
    url: str
    classes: tuple[str, ...]
    labels: int
    """Label bytes in front of an image; the last one is the (fine) class."""
    train: dict[str, str]
    """Training files in their order and the SHA-256 of their content."""
    test: tuple[str, str]
    per_file: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def record(self) -> int:
        """Return the bytes of one image with its labels."""
        return self.labels + _PIXELS

    @property
    def sha256(self) -> dict[str, str]:
        """Return the SHA-256 of every file's content."""
        return {**self.train, self.test[0]: self.test[1]}

    def count(self, file: str) -> int:
        """Return how many images the official file holds."""
        return 10_000 if file == self.test[0] else self.per_file


# The archives' MD5 sums on the official page are c32a1d4ab5d03f1284b67883e8d87530 and
# 03b5dce01913d631647c71ecec9e9cb8; the SHA-256 sums here are those that other projects publish for the same archives
# and for the files in them. Those of data_batch_1, data_batch_2 and test_batch were also measured by us, on images
# verified in another way.
CIFAR10 = CifarSet(
    title="CIFAR-10",
    folder="cifar-10-batches-bin",
    others=("cifar10", "cifar-10"),
    archive="cifar-10-binary.tar.gz",
    archive_sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    classes=CIFAR10_CLASSES,
    labels=1,
    train={
        "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    },
    test=("test_batch.bin", "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
    per_file=10_000,
    mean=(0.49139968, 0.48215841, 0.44653091),
    std=(0.24703223, 0.24348513, 0.26158784),
)

CIFAR100 = CifarSet(
    title="CIFAR-100",
    folder="cifar-100-binary",
    others=("cifar100", "cifar-100"),
    archive="cifar-100-binary.tar.gz",
    archive_sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    classes=CIFAR100_CLASSES,
    labels=2,
    train={"train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"},
    test=("test.bin", "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"),
    per_file=50_000,
    mean=(0.50707516, 0.48654887, 0.44091784),
    std=(0.26733429, 0.25643846, 0.27615047),
)


def find(known: CifarSet, root: Path) -> tuple[Path, list[str]] | None:
    """Return (folder or archive, official names of the files there) for the first place below `root` that has any."""
    for folder in (known.folder, *(f"{o}/{known.folder}" for o in known.others), *known.others, "."):
        here = root / folder
        names = [name for name in known.sha256 if (here / name).is_file() or _packed(here / name).is_file()]
        if names:
            return here, names
    for folder in (".", *known.others):
        archive = root / folder / known.archive
        if archive.is_file():
            return archive, list(known.sha256)
    return None


def build(name: str, known: CifarSet, place: tuple[Path, list[str]], where: str, verify: bool) -> DataBundle:
    """Read what a place holds; a set without its test file, or without any training file, is refused."""
    source, names = place
    train = [n for n in known.train if n in names]
    if known.test[0] not in names or not train:
        missing = known.test[0] if known.test[0] not in names else next(iter(known.train))
        raise DataError(
            f"{source} holds {', '.join(names)} but no {missing}: {known.title} cannot be used without it. "
            f"Place {missing} there too, or name another folder in RAREFY_DATA"
        )
    if source.is_file():
        got = read_archive(known, source, verify)
        records = [_records(known, f"{source}/{n}", n, got[n], verify) for n in (*train, known.test[0])]
    else:
        with ThreadPoolExecutor(max_workers=4) as pool:  # decompression and hashing run outside the interpreter lock
            records = list(pool.map(partial(_from_folder, known, source, verify), (*train, known.test[0])))
    train_x, train_y = _tensors(known, records[:-1])
    test_x, test_y = _tensors(known, records[-1:])
    return DataBundle(
        name=name,
        note=f"{known.title}: {len(test_x):,} test images and {_share(known, train, len(train_x))}, {where}",
        train_x=train_x,
        train_y=train_y,
        test_x=test_x,
        test_y=test_y,
        classes=known.classes,
        mean=known.mean,
        std=known.std,
        image_size=32,
        in_channels=3,
        augment="crop-flip",
    )


def read_archive(known: CifarSet, path: Path, verify: bool = True) -> dict[str, bytes]:
    """Return the data files of the official .tar.gz: plain files under their known names; nothing is unpacked."""
    wanted = {f"{known.folder}/{name}": name for name in known.sha256}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                name = wanted.get(member.name.removeprefix("./"))
                if name is None:
                    continue  # other members are passed over, wherever their names point to
                if not member.isreg():
                    raise refused(path, f"its member {member.name} is not a plain file")
                if name in found:
                    raise refused(path, f"it holds {member.name} twice")
                if member.size > known.count(name) * known.record:
                    raise refused(path, f"its member {member.name} is {member.size:,} bytes, more than belong there")
                file = tar.extractfile(member)
                data = file.read() if file is not None else b""
                if len(data) != member.size:
                    raise refused(path, f"its member {member.name} is cut off")
                if verify:
                    check_digest(f"{path}/{name}", data, known.sha256[name])
                found[name] = data
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise refused(path, f"it is truncated or damaged ({error})") from error
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise refused(path, f"it cannot be read ({error.strerror or error})") from error
    missing = [n for n in known.sha256 if n not in found]
    if missing:
        raise refused(path, f"it does not hold {', '.join(missing)}")
    return found


def decode_xz(data: bytes) -> Bytes:
    """Turn a packed batch back into the official records, uint8 [N, 3073].

    The packed form is N label bytes, then the planes G, R-G and B-G, each N x 32 x 32, modulo 256, differenced along
    rows and columns. Raises ValueError when the length is not a whole number of images.
    """
    count, rest = divmod(len(data), 1 + _PIXELS)
    if rest or not count:
        raise ValueError(f"{len(data):,} bytes are not a whole number of images")
    flat: Any = np.frombuffer(data, np.uint8)
    planes = flat[count:].reshape(3, count, 32, 32)
    planes = np.add.accumulate(np.add.accumulate(planes, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    out = np.empty((count, 1 + _PIXELS), np.uint8)
    out[:, 0] = flat[:count]
    green = planes[0]
    for channel, plane in enumerate((planes[1] + green, green, planes[2] + green)):
        out[:, 1 + 1024 * channel : 1 + 1024 * (channel + 1)] = plane.reshape(count, 1024)
    return out


def _packed(path: Path) -> Path:
    return path.with_suffix(".xz")


def _from_folder(known: CifarSet, folder: Path, verify: bool, name: str) -> Bytes:
    path = folder / name
    if path.is_file():
        data = read_whole(path, known.count(name) * known.record)
        return _records(known, path, name, data, verify)
    path = _packed(path)
    data = read_whole(path, known.count(name) * known.record)
    try:
        records = decode_xz(data)
    except ValueError as error:
        raise refused(path, str(error)) from error
    return _records(known, path, name, records.data, verify)


def _records(known: CifarSet, path: Path | str, name: str, data: bytes | memoryview, verify: bool) -> Bytes:
    """Check a file's content and return it as uint8 [N, label bytes + 3072]."""
    flat = np.frombuffer(data, np.uint8)
    count, rest = divmod(flat.size, known.record)
    if rest or not count or (verify and count != known.count(name)):
        size = known.count(name) * known.record
        raise refused(path, f"it holds {flat.size:,} bytes, expected {size:,} ({known.record:,} an image)")
    records: Bytes = flat.reshape(count, known.record)
    labels = records[:, known.labels - 1]
    if int(labels.max()) >= len(known.classes):
        at = int(np.argmax(labels >= len(known.classes)))
        raise refused(path, f"the label of image {at} is {labels[at]}, and there are {len(known.classes)} classes")
    if verify:
        check_digest(path, data, known.sha256[name])
    return records


def _tensors(known: CifarSet, records: list[Bytes]) -> tuple[Tensor, Tensor]:
    count = sum(len(r) for r in records)
    images = torch.empty(count, _PIXELS, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    at = 0
    for r in records:
        np.copyto(images[at : at + len(r)].numpy(), r[:, known.labels :])
        np.copyto(labels[at : at + len(r)].numpy(), r[:, known.labels - 1])
        at += len(r)
    return images.view(count, 3, 32, 32), labels


def _share(known: CifarSet, train: list[str], count: int) -> str:
    if len(train) == len(known.train):
        return f"{count:,} training images"
    first = train == list(known.train)[: len(train)]
    what = "the first " if first else ""
    which = "" if first else f" ({', '.join(train)})"
    return f"only {what}{count:,} of {known.per_file * len(known.train):,} training images{which}"
