"""What a checkpoint holds: how sparse each weight is, and in which pattern. Reads files that anyone may have written."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rarefy.analysis._table import aligned
from rarefy.analysis.detect import detect, nonzero
from rarefy.deploy.files import LIMIT, load
from rarefy.errors import DataError, StateError
from rarefy.kernels import unpack_mask

_MODELS = ("state_dict", "model_state_dict", "model", "module", "network")  # where training loops put the weights


@dataclass(frozen=True)
class Weight:
    """One weight of two or more dimensions: its zeros and their pattern (see `detect`)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    zeros: int
    pattern: str
    also: tuple[str, ...]
    zero_rows: int
    zero_columns: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.numel


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        file, bytes: its name and size.
        kind: "safetensors", "rarefy" (compressed by `rarefy.save`), "masks" (of a run), or "torch".
        weights: tensors of two or more dimensions.
        others: number of other tensors (biases, norms, counters), and `others_numel` of their entries.
        notes: what was left out, and why.
    """

    file: str
    bytes: int
    kind: str
    weights: tuple[Weight, ...]
    others: int
    others_numel: int
    notes: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @property
    def zeros(self) -> int:
        return sum(weight.zeros for weight in self.weights)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all weights of two or more dimensions; 0 where there are none."""
        return self.zeros / self.numel if self.numel else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        plain = asdict(self) | {"numel": self.numel, "zeros": self.zeros, "sparsity": self.sparsity}
        for entry, weight in zip(plain["weights"], self.weights, strict=True):
            entry["sparsity"] = weight.sparsity
        return plain

    def __str__(self) -> str:
        head = ("weight", "shape", "dtype", "pattern", "zeros", "of", "sparsity", "zero rows", "zero columns")
        rows = [
            (
                _printable(w.name), "x".join(map(str, w.shape)), w.dtype, ", also ".join((w.pattern, *w.also)),
                f"{w.zeros:,}", f"{w.numel:,}", f"{w.sparsity:.2%}", f"{w.zero_rows:,}", f"{w.zero_columns:,}",
            )
            for w in self.weights
        ]  # fmt: skip
        rows.append(("all of these", "", "", "", f"{self.zeros:,}", f"{self.numel:,}", f"{self.sparsity:.2%}", "", ""))
        lines = [f"{self.file}: {self.kind}, {self.bytes:,} bytes", *aligned(head, rows, left=4)]
        if self.others:
            lines.append(f"beside them {self.others:,} other tensors with {self.others_numel:,} entries")
        return "\n".join(lines + [_printable(note) for note in self.notes])


def inspect_checkpoint(path: str | os.PathLike[str], *, limit: int = LIMIT) -> Checkpoint:
    """Read a checkpoint and tell the sparsity and pattern of every weight in it.

    Reads safetensors files (also those that `rarefy.save` has compressed, and the masks of a run) and files of `torch.save`:
    state dicts, training checkpoints (the model's part of them: "state_dict", "model", ...), and the `_orig`/`_mask`
    pairs of `torch.nn.utils.prune`. No code in the file is run: torch files are read with `weights_only=True`.

    Args:
        path: the file.
        limit: largest number of bytes that its tensors may take in all, as a small file may claim huge ones.

    Raises:
        DataError: there is no such file, or it is of neither kind.
        StateError: it is damaged, not consistent, larger than `limit`, or holds more than tensors and plain values.
    """
    path = Path(path)
    kind = _kind(path)
    notes: list[str] = []
    if kind == "torch":
        tensors = iter(_from_torch(path, limit, notes).items())
    else:
        kind, tensors = _from_safetensors(path, limit, notes)
    weights, others, others_numel = [], 0, 0
    for name, tensor in tensors:
        if tensor.dim() < 2 or tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.dtype == torch.bool):
            others += 1
            others_numel += tensor.numel()
            continue
        mask = nonzero(tensor)
        found = detect(mask)
        weights.append(
            Weight(
                name,
                tuple(tensor.shape),
                str(tensor.dtype).removeprefix("torch."),
                tensor.numel(),
                tensor.numel() - int(mask.sum()),
                found.pattern,
                found.also,
                found.zero_rows,
                found.zero_columns,
            )
        )
    return Checkpoint(path.name, path.stat().st_size, kind, tuple(weights), others, others_numel, tuple(notes))


def read_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read masks that a run has packed into bits; bool, by name. Raises DataError and StateError as `inspect_checkpoint`."""
    path = Path(path)
    kind = _kind(path)
    tensors: Iterator[tuple[str, Tensor]] = iter(())
    if kind == "safetensors":
        kind, tensors = _from_safetensors(path, LIMIT, [])
    if kind != "masks":
        raise StateError(f"{path.name} holds no masks packed into bits with their shapes")
    return dict(tensors)


def _kind(path: Path) -> str:
    if path.is_dir():
        raise DataError(f"{path} is a folder; give a file in it, such as checkpoint.ckpt or model.safetensors")
    try:
        with path.open("rb") as file:
            begin = file.read(16)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if begin[8:9] == b"{":  # first: the length before it may begin like the others
        return "safetensors"
    if begin[:2] == b"PK" or begin[:1] == b"\x80":
        return "torch"
    raise DataError(f"{path} is neither a safetensors file nor one of torch.save")


# --- safetensors -------------------------------------------------------------------------------------------------------


def _from_safetensors(path: Path, limit: int, notes: list[str]) -> tuple[str, Iterator[tuple[str, Tensor]]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise StateError(f"{path.name} is not a sound safetensors file: {_short(error)}") from error
    if "rarefy" in metadata or "checksum" in metadata or any("#" in name for name in names):
        state = load(path, limit=limit)
        assert isinstance(state, dict)  # no model was given
        return "rarefy", iter(state.items())
    if path.stat().st_size > limit:
        raise StateError(f"{path.name}: its tensors are larger than the limit of {limit:,} bytes")
    masks = {name: stated for name in names if (stated := _mask_shape(metadata.get(name), shapes[name]))}
    if len(masks) == len(names) and (names or metadata == {"masks": "none"}):  # a run of a method that makes no zeros
        return "masks", ((n, unpack_mask(t, masks[n])) for n, t in _each(path, names))
    if any(name.endswith(("_orig", ".crow")) for name in names):
        return "safetensors", iter(_joined(dict(_each(path, names)), notes).items())
    return "safetensors", _each(path, names)


def _each(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in names:
            yield name, file.get_tensor(name)


def _mask_shape(stated: str | None, stored: list[int]) -> tuple[int, ...] | None:
    """The shape of a mask that a run has packed into bytes, where the file's metadata state one that fits."""
    try:
        shape = json.loads(stated) if stated else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(shape, list) or not shape or not all(type(n) is int and 0 < n < 1 << 40 for n in shape):
        return None
    return tuple(shape) if list(stored) == [-(-math.prod(shape) // 8)] else None


# --- torch.save --------------------------------------------------------------------------------------------------------


def _from_torch(path: Path, limit: int, notes: list[str]) -> dict[str, Tensor]:
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
            raise StateError(f"{path.name} is damaged: {_short(error)}") from error
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise StateError(f"{path.name} holds compressed entries, which torch.save does not write: it is not read")
        if sum(entry.file_size for entry in entries) > limit:
            raise StateError(f"{path.name}: its tensors are larger than the limit of {limit:,} bytes")
    try:
        with torch.sparse.check_sparse_tensor_invariants(True):  # indices outside a tensor would read what is not there
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the reader say
        text = str(error)
        if "weights_only" in text or "Unsupported" in text or "WeightsUnpickler" in text:
            raise StateError(
                f"{path.name} holds Python objects beside tensors and plain values; reading them would run what the file "
                f"says. Save the model's state_dict() instead. ({_short(error)})"
            ) from error
        raise StateError(f"{path.name} is no sound file of torch.save: {_short(error)}") from error
    if isinstance(content, Mapping):
        part = next((key for key in _MODELS if isinstance(content.get(key), Mapping) and content[key]), None)
        if part is not None:
            notes.append(f"of the file's parts only {part!r} was looked at")
            content = content[part]
    return _joined(_flat(path.name, content, limit, notes), notes)


def _flat(file: str, content: Any, limit: int, notes: list[str]) -> dict[str, Tensor]:
    """List all tensors by dotted names; each container and tensor once, however often and deep it is referred to."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", content)]
    total = 0
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping | list | tuple | Tensor):
            if id(value) in seen:
                continue
            seen.add(id(value))
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
            if total > limit:
                raise StateError(
                    f"{file}: {name or 'its tensor'} {list(value.shape)} passes the limit of {limit:,} bytes"
                )
            if value.is_meta or value.is_quantized or value.is_nested:
                notes.append(f"{name}: a tensor of a kind that is not looked at ({value.layout}, {value.dtype})")
            else:
                found[name or "tensor"] = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        elif isinstance(value, Mapping | list | tuple):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += reversed([(f"{name}.{key}" if name else str(key), item) for key, item in items])
    return found


def _joined(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Put together what tools keep apart: weight_orig and weight_mask; and name layers that hold kept values only."""
    result = {}
    for name, tensor in tensors.items():
        base = name.removesuffix("_orig")
        mask = tensors.get(f"{base}_mask")
        if name.endswith("_orig") and mask is not None and mask.shape == tensor.shape:
            result[base] = tensor.where(nonzero(mask), 0)
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in tensors):
            result[name] = tensor
        layer = name.removesuffix(".values")
        rows = tensors.get(f"{layer}.crow")
        if name.endswith(".values") and rows is not None and f"{layer}.col" in tensors:
            notes.append(
                f"{layer}: a compressed layer with {tensor.numel():,} kept weights in {max(0, rows.numel() - 1):,} rows; "
                "the file does not say how many columns it has"
            )
    return result


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
