"""Sparse checkpoints: safetensors files that hold the kept values and where they stand, and nothing else.

A tensor that is mostly zeros is stored as two: `NAME#values`, and either `NAME#bits` (one bit an entry, as `pack_mask`) or
`NAME#gaps`: for each kept entry in order the number of zeros before it, one byte each; the byte 255 stands for 255 zeros with
no entry behind them. Whichever is smaller is taken; other tensors are stored plainly under their name. The file's metadata say
what is what and hold a checksum over all of it. Kept entries come back bit for bit, NaN and infinities too; -0.0, which is what
masking a negative weight leaves, counts as zero and comes back as 0.0.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from rarefy import _files
from rarefy.deploy.accelerated import AcceleratedModel
from rarefy.errors import OptionError, StateError
from rarefy.kernels import pack_mask, unpack_mask

FORMAT = 1
SPARE = 255  # a byte of gaps that is no entry
LIMIT = 1 << 34  # bytes
_KEY = "rarefy"


def save(what: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a model's or a state dict's tensors to a safetensors file, zeros left out, losslessly.

    An accelerated model is saved as the model it was made from. The file is written whole or not at all. Tensors that share
    their memory are stored once. Raises OptionError for what is no tensor.

    >>> import os, tempfile, torch, rarefy
    >>> layer = torch.nn.Linear(1000, 100)
    >>> layer.weight.data.mul_(torch.rand(100, 1000) < 0.1)
    tensor(...)
    >>> path = os.path.join(tempfile.mkdtemp(), "layer.safetensors")
    >>> rarefy.save(layer, path)
    >>> os.path.getsize(path) < 60_000, torch.equal(rarefy.load(path)["weight"], layer.weight)
    (True, True)
    """
    if isinstance(what, AcceleratedModel):
        what = what.model
    state = what.state_dict() if isinstance(what, nn.Module) else what
    stored: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or "#" in name:
            raise OptionError(
                f"{name}: only tensors can be saved, under names without '#'; this is {type(tensor).__name__}"
            )
        tensor = tensor.detach().cpu()
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            index[name] = {"as": seen[place]}
            continue
        seen[place] = name
        index[name] = _encode(name, tensor.contiguous(), stored)
    text = json.dumps({"format": FORMAT, "tensors": index}, sort_keys=True)
    metadata = {_KEY: text, "checksum": _checksum(stored, text)}
    with _files.atomic_write(path) as file:
        file.write(to_bytes(stored, metadata))


def load(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, limit: int = LIMIT
) -> dict[str, Tensor] | nn.Module:
    """Read what `save` wrote: a state dict of whole tensors, or the model that was given, filled.

    Plain safetensors files are read too. A file cannot run code, and one that is damaged, truncated or not consistent is
    refused whole: the model is then as it was. `limit` bounds the bytes of all tensors together once their zeros are back:
    a small file may claim a huge one.

    Raises StateError when the file is not sound or does not fit the model, OSError when it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            sizes = {name: file.get_slice(name).get_shape() for name in names}
            if sum(math.prod(shape) for shape in sizes.values()) > limit:
                raise StateError(f"{path.name}: its tensors are larger than the limit of {limit:,} bytes")
            stored = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError, UnicodeError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path.name} is not a sound safetensors file: {error}") from error
    if _KEY in metadata:
        state = _decode_all(path.name, stored, metadata, limit)
    elif "checksum" in metadata or any("#" in name for name in stored):
        raise StateError(f"{path.name}: it has lost its index: the file is damaged")
    else:  # a plain safetensors file
        state = stored
    if model is None:
        return state
    return _fill(path.name, model, state)


# --- one tensor --------------------------------------------------------------------------------------------------------


def _encode(name: str, tensor: Tensor, stored: dict[str, Tensor]) -> dict[str, Any]:
    plain = {"kind": "plain"}
    if tensor.dtype.is_complex or tensor.dtype == torch.bool or tensor.numel() < 64:
        stored[name] = tensor.clone()
        return plain
    mask = tensor.reshape(-1) != 0
    at = mask.nonzero().squeeze(1)
    size, nnz = tensor.element_size(), at.numel()
    mask_bytes = -(-tensor.numel() // 8)
    gaps = torch.diff(at, prepend=at.new_tensor([-1])) - 1
    spares = gaps // SPARE
    gap_bytes = nnz + int(spares.sum())
    if nnz * size + min(mask_bytes, gap_bytes) >= tensor.numel() * size:
        stored[name] = tensor.clone()
        return plain
    stored[f"{name}#values"] = tensor.reshape(-1)[at].clone()
    about = {"shape": list(tensor.shape), "kept": nnz}
    if mask_bytes <= gap_bytes:
        stored[f"{name}#bits"] = pack_mask(mask)
        return {"kind": "bits", **about}
    code = torch.full((gap_bytes,), SPARE, dtype=torch.uint8)
    code[(spares + 1).cumsum(0) - 1] = (gaps % SPARE).to(torch.uint8)
    stored[f"{name}#gaps"] = code
    return {"kind": "gaps", **about}


def _decode(name: str, about: dict[str, Any], stored: dict[str, Tensor]) -> Tensor:
    if about.get("kind") == "plain":
        return stored.pop(name)
    shape, kept = about["shape"], about["kept"]
    numel = math.prod(shape)
    values = stored.pop(f"{name}#values")
    if values.dim() != 1 or values.numel() != kept or kept > numel:
        raise StateError(f"{name}: {values.numel()} values for {kept} kept of {numel} entries")
    if about["kind"] == "bits":
        bits = stored.pop(f"{name}#bits")
        if bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-numel // 8),):
            raise StateError(f"{name}: its mask is not one of {numel} bits")
        mask = unpack_mask(bits, (len(bits) * 8,))
        if bool(mask[numel:].any()) or int(mask.sum()) != kept:
            raise StateError(f"{name}: its mask does not keep {kept} entries")
        at = mask[:numel].nonzero().squeeze(1)
    elif about["kind"] == "gaps":
        gaps = stored.pop(f"{name}#gaps")
        if gaps.dtype != torch.uint8 or gaps.dim() != 1:
            raise StateError(f"{name}: its gaps are not bytes")
        entry = gaps != SPARE
        at = ((gaps.to(torch.int64) + entry).cumsum(0) - 1)[entry]
        if at.numel() != kept or (kept and int(at[-1]) >= numel) or (gaps.numel() and not bool(entry[-1])):
            raise StateError(f"{name}: its gaps do not lead to {kept} of {numel} entries")
    else:
        raise StateError(f"{name}: encoding {about['kind']!r} is not known")
    whole = torch.zeros(numel, dtype=values.dtype)
    whole[at] = values
    return whole.view(shape)


# --- the whole file ----------------------------------------------------------------------------------------------------


def _checksum(stored: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(stored):
        tensor = stored[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _decode_all(file: str, stored: dict[str, Tensor], metadata: dict[str, str], limit: int) -> dict[str, Tensor]:
    try:
        if _checksum(stored, metadata[_KEY]) != metadata.get("checksum"):
            raise StateError("its checksum does not fit: the file is damaged")
        about = json.loads(metadata[_KEY])
        if not isinstance(about, dict) or about.get("format") != FORMAT or not isinstance(about.get("tensors"), dict):
            raise StateError("it was written by another version of rarefy")
        _check_index(about["tensors"], stored, limit)
        state: dict[str, Tensor] = {}
        for name, item in about["tensors"].items():
            state[name] = state[item["as"]] if "as" in item else _decode(name, item, stored)
        if stored:
            raise StateError(f"it holds tensors that its index does not name: {', '.join(sorted(stored)[:4])}")
    except StateError as error:
        raise StateError(f"{file}: {error}") from error
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, OverflowError, RecursionError) as error:
        raise StateError(f"{file}: its index does not fit its tensors ({type(error).__name__}: {error})") from error
    return state


def _check_index(index: dict[str, Any], stored: dict[str, Tensor], limit: int) -> None:
    """Raise StateError unless every item is of its form and all tensors together stay below the limit."""
    total = sum(t.numel() * t.element_size() for t in stored.values())
    earlier: set[str] = set()
    for name, item in index.items():
        if not isinstance(item, dict) or "#" in name:
            raise StateError(f"{name}: not an item of an index")
        if "as" in item:
            if item["as"] not in earlier:
                raise StateError(f"{name}: stands for {item['as']!r}, which is not there")
        elif item.get("kind") != "plain":
            kept: Any
            shape: Any
            shape, kept = item.get("shape"), item.get("kept")
            whole = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
            if not whole or type(kept) is not int or kept < 0:
                raise StateError(f"{name}: shape {shape!r} with {kept!r} kept entries")
            total += math.prod(shape) * 8
            if total > limit:
                raise StateError(f"{name} {shape}: the whole tensors would pass the limit of {limit:,} bytes")
        earlier.add(name)


def _fill(file: str, model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    mine = model.state_dict()
    missing, extra = mine.keys() - state.keys(), state.keys() - mine.keys()
    if missing or extra:
        raise StateError(
            f"{file} is not of this model: it lacks {sorted(missing)[:4] or 'nothing'}, and the model does not know its "
            f"{sorted(extra)[:4] or 'nothing'}"
        )
    for name, tensor in state.items():
        if tensor.dtype != mine[name].dtype or (tensor.shape != mine[name].shape and tensor.dim() != 1):
            raise StateError(
                f"{file}: {name} is {tensor.dtype} {list(tensor.shape)}, the model's is {mine[name].dtype} "
                f"{list(mine[name].shape)}"
            )
    before = {name: tensor.clone() for name, tensor in mine.items()}
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        model.load_state_dict(before)
        raise StateError(f"{file} does not fit the model: {error}") from error
    return model
