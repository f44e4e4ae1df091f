"""Load a known data set by its name."""

from __future__ import annotations

import dataclasses
import os
import threading
import urllib.request
from pathlib import Path

import numpy as np
import torch

from rarefy._files import Progress
from rarefy.data import _cifar, _idx
from rarefy.data._bundle import DataBundle, stratified
from rarefy.data._places import Place, cache, fetch_any, missing, places, write_folder
from rarefy.data._text import TEXTS, load_text
from rarefy.errors import DataError, OptionError, nearest

_IDX = {"mnist": _idx.MNIST, "fashion-mnist": _idx.FASHION}
_CIFAR = {"cifar10": _cifar.CIFAR10, "cifar100": _cifar.CIFAR100}
_DIGITS_TEST = 500
_DIGITS_SEED = 0  # fixed: "digits" is the same split for everybody


def available() -> tuple[str, ...]:
    """Return the names that `load` knows."""
    return ("digits", *_IDX, *_CIFAR, *TEXTS)


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    download: bool = True,
    *,
    verify: bool = True,
    progress: Progress | None = None,
    timeout: float = 30.0,
    attempts: int = 4,
) -> DataBundle:
    """Load a data set whole into memory, from a local folder or its official source.

    `name` is one of `available()`. Looked for in `root`, then in the folder named by the environment variable
    RAREFY_DATA, then in the cache ($XDG_CACHE_HOME/rarefy or ~/.cache/rarefy); the first folder that has it is used.
    If none has and `download` is true, it is fetched into `root` (else the cache). CIFAR is read in its official
    binary version: its folder, its .tar.gz, or packed .xz batches; a folder with some of the training batches loads
    and `note` says so. `progress(bytes so far, bytes in total or None)` is told of downloads, `timeout` is seconds
    without an answer.

    Every file is checked (length, magic number, labels, compression checksum) and, unless `verify` is False, compared
    with the SHA-256 of the official one. Raises DataError, naming the file, when one is missing, truncated or
    changed; nothing is half-loaded. Raises OptionError for an unknown name.

        >>> bundle = load("digits")
        >>> bundle.train_x.shape, bundle.test_x.shape
        (torch.Size([1297, 1, 8, 8]), torch.Size([500, 1, 8, 8]))
    """
    if name == "digits":
        return _digits()
    if name in TEXTS:
        return load_text(name, root, download, verify=verify, progress=progress, timeout=timeout, attempts=attempts)
    if name not in _IDX and name not in _CIFAR:
        raise OptionError(f"unknown data set {name!r}{nearest(name, available())}: use one of {', '.join(available())}")
    searched = places(root, download)
    found = _local(name, searched, verify)
    if found is not None:
        return found
    known = _IDX.get(name) or _CIFAR[name]
    if not download:
        wanted = known.folders[0] + "/*.gz" if isinstance(known, _idx.IdxSet) else known.folder
        raise missing(known.title, searched, wanted)
    target = Path(root).expanduser() if root is not None else cache()
    if isinstance(known, _idx.IdxSet):
        folder = target / known.folders[0]
        files = {f: folder / f"{f}.gz" for f in _idx.FILES}
        for file, path in files.items():
            urls = [f"{base}{file}.gz" for base in known.urls]
            if not path.exists():
                fetch_any(urls, path, known.packed[file], progress, timeout, attempts)
        return _idx.build(name, known, files, "from the official source", verify)
    archive = target / known.archive
    fetch_any([known.url], archive, known.archive_sha256, progress, timeout, attempts)
    folder = target / known.folder
    write_folder(folder, _cifar.read_archive(known, archive))
    archive.unlink(missing_ok=True)
    return _cifar.build(name, known, (folder, list(known.sha256)), "from the official source", verify)


def demo_data(
    root: str | os.PathLike[str] | None = None,
    download: bool = True,
    *,
    progress: Progress | None = None,
    patience: float = 3.0,
) -> DataBundle:
    """Load MNIST from a local folder or the official source, otherwise scikit-learn's digits; `note` says which.

    `patience` is how many seconds the official source has to answer. A local MNIST that is damaged is not passed
    over: it raises DataError, like `load`.
    """
    found = _local("mnist", places(root, download), verify=True)
    if found is not None:
        return found
    why = "is in no local folder and downloading was not allowed"
    if download:
        why = "is in no local folder and its official source cannot be reached"
        if _answers(f"{_IDX['mnist'].urls[0]}{_idx.FILES[1]}.gz", patience):
            try:
                return load("mnist", root, progress=progress, timeout=max(patience, 10.0), attempts=2)
            except DataError:
                why = "is in no local folder and could not be downloaded whole"
    digits = _digits()
    return dataclasses.replace(digits, note=f"{digits.note}, because MNIST {why}")


def _local(name: str, searched: list[Place], verify: bool) -> DataBundle | None:
    """Build the set from the first place that has it whole (CIFAR: that has any of it), or return None."""
    for place in searched:
        if name in _IDX:
            files = _idx.find(_IDX[name], place.path)
            if len(files) == len(_idx.FILES):
                return _idx.build(name, _IDX[name], files, place.said, verify)
            if files and not place.target:
                lack = ", ".join(f for f in _idx.FILES if f not in files)
                raise DataError(
                    f"{next(iter(files.values())).parent} holds part of {_IDX[name].title} but not {lack}: "
                    "place the rest there too"
                )
        else:
            spot = _cifar.find(_CIFAR[name], place.path)
            if spot is not None:
                return _cifar.build(name, _CIFAR[name], spot, place.said, verify)
    return None


def _answers(url: str, seconds: float) -> bool:
    """Say whether the address answers in time. In a thread, because looking up a host's name knows no time limit."""
    answered: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "rarefy"})
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                answered.append(answer.status == 200)
        except OSError:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered == [True]


def _digits() -> DataBundle:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            'the data set "digits" comes with scikit-learn, which is not installed: pip install "rarefy[demo]"'
        ) from error
    raw = load_digits()
    # 0..16 grey levels onto 0..255, so that every image set means the same by a pixel
    pixels = np.rint(raw.images * (255.0 / 16.0)).astype(np.uint8)
    x = torch.from_numpy(pixels).unsqueeze(1)
    y = torch.from_numpy(raw.target.astype(np.int64))
    test = stratified(y, _DIGITS_TEST, _DIGITS_SEED)
    train = x[~test].double() / 255
    return DataBundle(
        name="digits",
        note=f"digits: {len(train):,} training and {_DIGITS_TEST} test images of 8x8 pixels, embedded in scikit-learn",
        train_x=x[~test].contiguous(),
        train_y=y[~test],
        test_x=x[test].contiguous(),
        test_y=y[test],
        classes=tuple("0123456789"),
        mean=(round(float(train.mean()), 4),),
        std=(round(float(train.std()), 4),),
        image_size=8,
        in_channels=1,
    )
