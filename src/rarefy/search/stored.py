"""Results as bytes and files: tensors and plain values only, written whole or not at all, read without running anything."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy import kernels
from rarefy._files import atomic_write
from rarefy.errors import OptionError, StateError


def pack(value: Any) -> bytes:
    """Return a result as bytes. Raises OptionError where it is not made of tensors, numbers, strings, lists and dicts."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    data = buffer.getvalue()
    try:
        unpack(data)
    except Exception as error:
        raise OptionError(
            f"a result must be made of tensors, numbers, strings, lists and dicts: {str(error).splitlines()[0]}"
        ) from error
    return data


def unpack(data: bytes) -> Any:
    """Return what `pack` packed, its tensors on the CPU."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Write a result, or a state between two steps of a search."""
    data = pack(value)
    with atomic_write(path) as file:
        file.write(data)


def read(path: Path, same: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what `write` wrote, or None where there is no such file.

    Raises StateError where it is damaged, or where one of the entries of `same` is not what it was.
    """
    if not path.exists():
        return None
    try:
        found = unpack(path.read_bytes())
        differ = [key for key, value in same.items() if found[key] != value]
    except Exception as error:
        raise StateError(
            f"{path} cannot be read ({(str(error).splitlines() or ['?'])[0]}): remove it to start again from what is left."
        ) from error
    if differ:
        was = ", ".join(f"{key} was {found[key]!r} and is {same[key]!r} now" for key in differ)
        raise StateError(f"{path} is of another search: {was}. Choose another folder, or remove this one.")
    assert isinstance(found, dict)
    return found


def packed_masks(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return masks as packed bits and shapes."""
    return {n: {"bits": kernels.pack_mask(m.cpu().contiguous()), "shape": list(m.shape)} for n, m in masks.items()}


def unpacked_masks(packed: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what `packed_masks` packed."""
    return {name: kernels.unpack_mask(entry["bits"], entry["shape"]) for name, entry in packed.items()}
