"""Read compressed files whole, checked and bounded; a damaged one is refused by its name."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import zlib
from pathlib import Path

from rarefy.errors import DataError

_XZ_MEMORY = 512 << 20  # bytes of decoder memory: a forged header may ask for 4 GiB


def read_whole(path: Path, limit: int) -> bytes:
    """Return a file's content, decompressed when its name ends in .gz or .xz.

    Raises DataError when it cannot be read, is truncated or damaged, or holds more than `limit` bytes.
    """
    try:
        if path.suffix == ".gz":
            data = _gzip(path, limit)
        elif path.suffix == ".xz":
            data = _xz(path, limit)
        else:
            with open(path, "rb") as f:
                data = f.read(limit + 1)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise refused(path, f"it is truncated or damaged ({error})") from error
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > limit:
        raise refused(path, f"it holds more than the {limit:,} bytes that belong there")
    return data


def refused(path: Path | str, why: str) -> DataError:
    """Return the error for a file that is not what it should be."""
    return DataError(f"{path} is refused: {why}. Replace it with the original, or remove it")


def check_digest(path: Path | str, data: bytes | bytearray | memoryview, want: str) -> None:
    """Raise DataError unless the SHA-256 of the content is `want`."""
    got = hashlib.sha256(data).hexdigest()
    if got != want:
        raise refused(path, f"its content is not the official one (SHA-256 {got}, expected {want})")


def _gzip(path: Path, limit: int) -> bytes:
    with gzip.open(path, "rb") as f:
        return f.read(limit + 1)  # one more than allowed: reads to the end, where the CRC is checked


def _xz(path: Path, limit: int) -> bytes:
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    data = decoder.decompress(path.read_bytes(), max_length=limit + 1)
    if len(data) <= limit and not decoder.eof:
        raise EOFError("the end of the compressed stream is missing")
    if decoder.unused_data.strip(b"\0"):
        raise lzma.LZMAError("bytes follow the end of the compressed stream")
    return data
