"""Files that are whole or not there: checksums, atomic writes, and downloads that resume and are verified."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from rarefy.errors import DataError

try:
    import fcntl
except ImportError:  # Windows: no lock; the checksum still catches two writers in one part file
    fcntl = None  # type: ignore[assignment]

Progress = Callable[[int, int | None], None]
"""Called with (bytes so far, bytes in total or None where the server does not say)."""

_CHUNK = 1 << 18
_ATTEMPTS = 4


class _Broken(Exception):
    """A transfer ended before its time; what arrived is kept and the rest is asked for."""


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes as 64 lower-case hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open `path` so that it holds all that was written, or stays as it was.

    Yields a file opened with `mode` ("wb", or "w" for UTF-8 text with Unix line ends). It lies in the same folder under
    another name; leaving the block flushes it to disk and renames it over `path`. An exception inside the block, also
    Ctrl-C, removes it and passes on. Missing parent folders are made.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"atomic_write mode is {mode!r}: use 'wb' or 'w'")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    # os.open and not tempfile: the file gets the user's usual permissions instead of 0600
    fd = os.open(tmp, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(fd, "wb") if mode == "wb" else open(fd, "w", encoding="utf-8", newline="\n") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def fetch(
    url: str,
    path: str | os.PathLike[str],
    sha256: str,
    progress: Progress | None = None,
    *,
    timeout: float = 30.0,
    attempts: int = _ATTEMPTS,
) -> Path:
    """Download `url` to `path`, verified by its SHA-256, and return the path.

    A file that is already there with the right checksum is left alone. Bytes arrive in `<path>.part`, which a later
    call resumes (HTTP Range) and which is renamed to `path` only after its checksum is right; two processes that want
    the same file wait for each other. `timeout` is seconds without an answer; `attempts` is how often a broken
    transfer is resumed.

    Raises DataError when the file cannot be had (what arrived stays in the part file) or is not what it should be
    (nothing stays).
    """
    path = Path(path)
    want = sha256.lower()
    name = _file_name(url)
    if path.exists():
        if _digest(path) == want:
            return path
        raise DataError(
            f"{path} is not the official {name} (SHA-256 {_digest(path)}, expected {want}): "
            "remove it to download it again"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".part")) as (part, file):
            if path.exists() and _digest(path) == want:  # another process has finished it meanwhile
                part.unlink(missing_ok=True)
                return path
            resumed = file.seek(0, os.SEEK_END) > 0
            _download(url, file, progress, timeout, attempts)
            if resumed and _part_digest(file) != want:
                file.truncate(0)  # the old part may stem from another version: once more, from zero
                _download(url, file, progress, timeout, attempts)
            got, size = _part_digest(file), file.seek(0, os.SEEK_END)
            if got != want:
                part.unlink(missing_ok=True)
                raise DataError(
                    f"the downloaded {name} is not what it should be ({size} bytes, SHA-256 {got}, expected {want}) "
                    f"and was removed. {_mend(path)}"
                )
            os.fsync(file.fileno())
            os.replace(part, path)
    except _Broken as error:
        raise DataError(f"cannot download {name} for {path}: {error}. {_mend(path)}") from error
    except OSError as error:
        if isinstance(error, DataError):
            raise
        reason = error.strerror or str(error)
        raise DataError(f"cannot write {path} ({reason}): choose a folder that can be written to") from error
    return path


def _mend(path: Path) -> str:
    return f"Set RAREFY_DATA to a folder that holds it, or place the file {path.name} in {path.parent}"


def _file_name(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise DataError(f"cannot download {url!r}: only http and https addresses are read")
    return parts.path.rsplit("/", 1)[-1] or "the file"


def _digest(path: Path) -> str:
    return sha256(path)


def _part_digest(file: BinaryIO) -> str:
    file.flush()
    return sha256(file.name)


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Open the part file for this process alone; wait while another one holds it."""
    while True:
        with open(part, "a+b") as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # file systems without locks: go on, the checksum decides
                    fcntl.flock(file, fcntl.LOCK_EX)
                # while we waited, the part may have been renamed to the finished file: never write into that one
                try:
                    same = os.path.samestat(os.fstat(file.fileno()), os.stat(part))
                except FileNotFoundError:
                    same = False
                if not same:
                    continue
            try:
                yield part, file
            finally:
                empty = file.seek(0, os.SEEK_END) == 0
                if empty:
                    part.unlink(missing_ok=True)
            return


def _download(url: str, file: BinaryIO, progress: Progress | None, timeout: float, attempts: int) -> None:
    """Append what is missing; resume after a break as long as each attempt may bring something new."""
    for attempt in range(1, attempts + 1):
        try:
            _transfer(url, file, progress, timeout)
            return
        except urllib.error.HTTPError as error:
            error.close()  # it is the open answer, too
            if error.code == 416:  # nothing after our last byte: complete, or of another version; the checksum decides
                return
            if error.code < 500 or attempt == attempts:
                raise _Broken(f"the server answered {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            # no connection at all: trying again at once would only make the user wait
            raise _Broken(f"no connection ({error.reason})") from error
        except (_Broken, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            if attempt == attempts:
                raise _Broken(str(error) or type(error).__name__) from error
        time.sleep(0.2 * (attempt - 1))


def _transfer(url: str, file: BinaryIO, progress: Progress | None, timeout: float) -> None:
    start = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"User-Agent": "rarefy", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        partial = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if start and not partial:  # the server knows no ranges and sends all again
            file.truncate(0)
            start = 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        done = start
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
            if total is not None and done > total:
                break
    file.flush()
    if total is not None and done != total:
        raise _Broken(f"the transfer broke off after {done} of {total} bytes")
