"""Where data is looked for: the given folder, then RAREFY_DATA, then the cache; and how what is missing gets there."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rarefy._files import Progress, atomic_write, fetch
from rarefy.errors import DataError

VARIABLE = "RAREFY_DATA"


@dataclass(frozen=True)
class Place:
    """A folder to look in, and what to call it in a note (which may leave this machine, so without its path)."""

    path: Path
    said: str
    target: bool = False
    """Downloads go here, so that an incomplete set in it is one to complete."""


def cache() -> Path:
    """Return the folder that downloads go to: $XDG_CACHE_HOME/rarefy, or ~/.cache/rarefy."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rarefy"


def places(root: str | os.PathLike[str] | None, download: bool = True) -> list[Place]:
    """Return the folders to search, in order. Raises DataError for a folder that was named but is not there."""
    found = []
    if root is not None:
        path = Path(root).expanduser()
        if not path.is_dir() and (path.exists() or not download):
            raise DataError(f"the data folder {path} is not a folder: name one that holds the data")
        found.append(Place(path, "from the given folder", target=download))
    named = os.environ.get(VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_dir():
            raise DataError(f"{VARIABLE} names {named}, which is not a folder: correct it or unset it")
        found.append(Place(path, f"from the folder named by {VARIABLE}"))
    found.append(Place(cache(), "from the official source", target=root is None))
    return found


def missing(what: str, searched: Iterable[Place], wanted: str) -> DataError:
    """Return the error for a data set that is nowhere to be found."""
    where = ", ".join(str(p.path) for p in searched)
    return DataError(
        f"{what} was not found in {where}: set {VARIABLE} to a folder that holds {wanted}, place it in one of these "
        f"folders, or allow the download"
    )


def fetch_any(
    urls: Iterable[str], path: Path, sha256: str, progress: Progress | None, timeout: float, attempts: int
) -> Path:
    """Download from the first address that gives the right file; raise the last address's DataError."""
    error: DataError | None = None
    for url in urls:
        try:
            return fetch(url, path, sha256, progress, timeout=timeout, attempts=attempts)
        except DataError as failed:
            error = failed
    assert error is not None
    raise error


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Make `folder` hold all the files at once: it appears whole under its name, or not at all."""
    tmp = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        for name, data in files.items():
            with atomic_write(tmp / name) as f:
                f.write(data)
        with contextlib.suppress(OSError):  # another process was faster: its verified files are as good as ours
            os.rename(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
