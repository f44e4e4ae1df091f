"""MNIST and Fashion-MNIST: the idx format, checked to the last byte."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rarefy.data._bundle import DataBundle
from rarefy.data._read import check_digest, read_whole, refused

_SIDE = 28
_MOST = 1 << 20  # samples: far above any real set, far below what fills the memory


@dataclass(frozen=True)
class IdxSet:
    """What is known about an idx data set: where it lies, where it comes from, and the SHA-256 of its files."""

    title: str
    folders: tuple[str, ...]
    urls: tuple[str, ...]
    classes: tuple[str, ...]
    mean: float
    std: float
    packed: dict[str, str]
    """SHA-256 of the official .gz files, for downloads."""
    content: dict[str, str]
    """SHA-256 of what is inside, which does not depend on who compressed it."""


FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

# The content's MD5 sums are the official ones (MNIST train images 6bbc9ace898e44ae57da46a324031adb); these SHA-256
# sums were taken from those files. The .gz sums are those of the files on the official servers.
MNIST = IdxSet(
    title="MNIST",
    folders=("mnist", "MNIST/raw", "MNIST", "."),
    urls=("https://storage.googleapis.com/cvdf-datasets/mnist/", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
    classes=tuple("0123456789"),
    mean=0.1307,
    std=0.3081,
    packed={
        FILES[0]: "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        FILES[1]: "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        FILES[2]: "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        FILES[3]: "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    content={
        FILES[0]: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        FILES[1]: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        FILES[2]: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        FILES[3]: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
)

FASHION = IdxSet(
    title="Fashion-MNIST",
    folders=("fashion-mnist", "FashionMNIST/raw", "fashion_mnist", "."),
    urls=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    classes=(
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
    mean=0.2860,
    std=0.3530,
    packed={
        FILES[0]: "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        FILES[1]: "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        FILES[2]: "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        FILES[3]: "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
    content={
        FILES[0]: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        FILES[1]: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        FILES[2]: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        FILES[3]: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
)  # fmt: skip


def find(known: IdxSet, root: Path) -> dict[str, Path]:
    """Return the set's files below `root`, from the first folder that holds all four (else from the best one)."""
    best: dict[str, Path] = {}
    for folder in known.folders:
        here = {}
        for name in FILES:
            for path in (root / folder / f"{name}.gz", root / folder / name):
                if path.is_file():
                    here[name] = path
                    break
        if len(here) == len(FILES):
            return here
        best = max(best, here, key=len)
    return best


def build(name: str, known: IdxSet, files: dict[str, Path], where: str, verify: bool) -> DataBundle:
    """Read all four files and return the bundle; nothing is returned unless all of them are right."""
    tensors = [read(files[f], known.content[f] if verify else None) for f in FILES]
    train_x, train_y, test_x, test_y = tensors
    for x, y, file in ((train_x, train_y, FILES[1]), (test_x, test_y, FILES[3])):
        if len(x) != len(y):
            raise refused(files[file], f"it holds {len(y):,} labels for {len(x):,} images")
        if int(y.max()) >= len(known.classes):
            at = int((y >= len(known.classes)).nonzero()[0])
            raise refused(files[file], f"label {at} is {int(y[at])}, and there are {len(known.classes)} classes")
    return DataBundle(
        name=name,
        note=f"{known.title}: {len(train_x):,} training and {len(test_x):,} test images, {where}",
        train_x=train_x,
        train_y=train_y.long(),
        test_x=test_x,
        test_y=test_y.long(),
        classes=known.classes,
        mean=(known.mean,),
        std=(known.std,),
        image_size=_SIDE,
        in_channels=1,
    )


def read(path: Path, sha256: str | None = None) -> Tensor:
    """Read one idx file of bytes, plain or .gz: images uint8 [N, 1, 28, 28] or labels uint8 [N].

    Which of the two it has to be is taken from the file's name. Raises DataError naming the file when the magic
    number, the sizes, the length, the gzip checksum or the SHA-256 (where given) is wrong.
    """
    images = "idx3" in path.name
    head = 16 if images else 8
    data = read_whole(path, head + _MOST * (_SIDE * _SIDE if images else 1))
    if len(data) < head:
        raise refused(path, f"it holds {len(data)} bytes, too few for an idx header")
    magic, count, *sides = struct.unpack(">4I" if images else ">2I", data[:head])
    want = 0x803 if images else 0x801
    if magic != want:
        raise refused(path, f"its magic number is {magic:#010x}, expected {want:#010x}")
    if images and sides != [_SIDE, _SIDE]:
        raise refused(path, f"its images are {sides[0]}x{sides[1]}, expected {_SIDE}x{_SIDE}")
    size = head + count * (_SIDE * _SIDE if images else 1)
    if count == 0 or len(data) != size:
        raise refused(path, f"it holds {len(data):,} bytes, but {count:,} items need {size:,}")
    if sha256 is not None:
        check_digest(path, data, sha256)
    values = np.frombuffer(data, np.uint8, offset=head).copy()  # own memory: tensors are writable
    out = torch.from_numpy(values)
    return out.view(count, 1, _SIDE, _SIDE) if images else out
