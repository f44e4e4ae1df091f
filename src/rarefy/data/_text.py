"""Text as bytes, for byte-level language models: 256 classes, no tokenizer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from rarefy._files import Progress
from rarefy.data._bundle import DataBundle
from rarefy.data._places import cache, fetch_any, missing, places
from rarefy.data._read import check_digest, read_whole, refused
from rarefy.errors import DataError, OptionError, nearest

_LIMIT = 1 << 30


@dataclass(frozen=True)
class _Text:
    title: str
    path: str
    url: str
    sha256: str


TEXTS = {
    "tinyshakespeare": _Text(
        title="Tiny Shakespeare",
        path="text/tinyshakespeare/input.txt",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    )
}


def load_text(
    path_or_name: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    download: bool = True,
    *,
    fraction: float = 0.1,
    verify: bool = True,
    progress: Progress | None = None,
    timeout: float = 30.0,
    attempts: int = 4,
    limit: int = _LIMIT,
) -> DataBundle:
    """Load a text file as bytes, its last part held out; return a bundle of task "text".

    `path_or_name` is a file of any encoding, plain, .gz or .xz, or a known name ("tinyshakespeare", looked for like
    the sets of `load`). `fraction` of the bytes, at the end, is the test part; `train_x` and `test_x` are uint8 [N]
    bytes and `train_y`, `test_y` the byte after each. `limit` bounds the decompressed bytes. Raises DataError, naming
    the file, when it is missing, damaged, too large or too short, and OptionError when `fraction` is outside (0, 1).
    """
    if not 0.0 < fraction < 1.0:
        raise OptionError(f"fraction is {fraction}: give a number between 0 and 1, such as 0.1")
    known = TEXTS.get(str(path_or_name))
    if known is not None:
        path, said = _find(known, root, download, progress, timeout, attempts)
        title, name = known.title, str(path_or_name)
    else:
        path = Path(path_or_name).expanduser()
        if not path.is_file():
            hint = nearest(str(path_or_name), TEXTS)
            raise DataError(f"no text file {path}{hint}: give a file, or one of {', '.join(TEXTS)}")
        title, name, said = path.name, path.name, "from a local file"
    data = read_whole(path, limit)
    if known is not None and verify:
        check_digest(path, data, known.sha256)
    held = int(fraction * len(data) + 0.5)
    if held < 2 or len(data) - held < 2:
        raise refused(path, f"it holds {len(data):,} bytes, too few to split")
    stream = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    train, test = stream[: len(data) - held], stream[len(data) - held :]
    return DataBundle(
        name=name,
        note=f"{title}: {len(train):,} bytes to train on and the last {held:,} held out, {said}",
        train_x=train[:-1],
        train_y=train[1:],
        test_x=test[:-1],
        test_y=test[1:],
        classes=tuple(f"0x{b:02x}" for b in range(256)),
        task="text",
    )


def _find(
    known: _Text,
    root: str | os.PathLike[str] | None,
    download: bool,
    progress: Progress | None,
    timeout: float,
    attempts: int,
) -> tuple[Path, str]:
    searched = places(root, download)
    for place in searched:
        for ending in ("", ".gz", ".xz"):
            path = place.path / (known.path + ending)
            if path.is_file():
                return path, place.said
    if not download:
        raise missing(known.title, searched, known.path)
    target = (Path(root).expanduser() if root is not None else cache()) / known.path
    return fetch_any([known.url], target, known.sha256, progress, timeout, attempts), "from the official source"
