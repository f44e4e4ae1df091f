"""Weights that are read from one small array by a fixed hash: the mappings, and the operators that gather and scatter.

A weight W [rows, cols] of a network stands nowhere. Entry j (flattened) is

    W[j] = scale * sign(j) * values[slot(j)],

with `values` [size] shared by all weights of the network. Two mappings give slot and sign; both read contiguous runs:

- `Fold` (RANDOMFOLD of Desai & Shrivastava 2024, arXiv 2310.11611): all weights in a row, cut into chunks as long as
  the array, each chunk rotated by a hash. Every slot is used floor(n / size) or ceil(n / size) times, and at size >= n
  exactly once or not at all.
- `Tile` (ROAST, Desai et al. 2023, arXiv 2207.10702): each tile of the matrix starts at a hashed place. A tile of 1 x 1
  is HashedNets (Chen et al. 2015, arXiv 1504.04788). The start is a quadratic hash of the tile's number. The reference
  hashes its row and column linearly; such starts fall into arithmetic progressions, and cover between 25 % and 86 %
  of the slots where independent ones cover 63 % (200 x 200 single weights on as many slots, four seeds).

Signs come from one short random table that each chunk or tile enters at a hashed place: two weights that share a slot
have independent signs, and nothing as long as a weight is stored. Every hash is an exact function of the seed, the
same on every machine.

The operator `rarefy::shared_weight` and its adjoint `rarefy::shared_weight_gradient` are each other's derivative, known
to `torch.compile` and `torch.export`; what they need beside their result is a fraction of a weight at a time.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

PRIME = 2038074743
SIGNS = 4096  # entries of the sign table
_GROUP = 1 << 20  # entries whose slots are held at a time
_SHORT = 256  # runs shorter than this are gathered entry by entry


@functools.lru_cache(maxsize=64)
def coefficients(seed: int, use: str) -> tuple[int, int, int]:
    """Return three odd numbers below PRIME: the hash function of this seed for this use."""
    digest = hashlib.sha256(f"{use}:{seed}".encode()).digest()
    a, b, c = (int.from_bytes(digest[8 * i : 8 * i + 8], "little") % PRIME | 1 for i in range(3))
    return a, b, c


def sign_table(seed: int) -> Tensor:
    """Return +-1 in equal chance, int8 [SIGNS]."""
    bits = hashlib.shake_256(f"signs:{seed}".encode()).digest(SIGNS // 8)
    places = torch.arange(8, dtype=torch.uint8, device="cpu")
    table = torch.frombuffer(bytearray(bits), dtype=torch.uint8)[:, None] >> places & 1
    return table.reshape(-1).to(torch.int8) * 2 - 1


def hash_of(x: Tensor, seed: int, use: str) -> Tensor:
    """Return (a x + b x^2 + c) mod PRIME, exactly, for int64 x >= 0."""
    a, b, c = coefficients(seed, use)
    x = x % PRIME
    return (a * x % PRIME + b * (x * x % PRIME) % PRIME + c) % PRIME


@dataclass(frozen=True)
class Fold:
    """Chunks of the whole network's weights, each a rotation of the array.

    Attributes:
        seed: of the hash, one for the network.
        size: slots of the array.
        offset: weights of the network before this one.
        rows, cols: of this weight.
    """

    seed: int
    size: int
    offset: int
    rows: int
    cols: int

    def slots(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots of these entries (int64, any shape), and their places in the sign table."""
        t = flat + self.offset
        chunk, place = t // self.size, t % self.size
        enter = hash_of(chunk, self.seed, "sign") % SIGNS
        return (hash_of(chunk, self.seed, "slot") % self.size + place) % self.size, (enter + place) % SIGNS

    def read(self, values: Tensor, signs: Tensor) -> Tensor:
        """Return sign * values[slot] of every entry, flat."""
        if self.size < _SHORT:
            return _read_entries(self, values, signs)
        out = values.new_empty(self.rows * self.cols)
        for start, length, slot, enter in _runs(self):
            torch.mul(values[slot : slot + length], _signs(signs, enter, length), out=out[start : start + length])
        return out

    def add(self, out: Tensor, grad: Tensor, signs: Tensor | None) -> None:
        """Add sign * grad (flat) to `out` [size] at every entry's slot; without a table all signs are +."""
        if self.size < _SHORT:
            return _add_entries(self, out, grad, signs)
        for start, length, slot, enter in _runs(self):
            part = grad[start : start + length]
            out[slot : slot + length] += part if signs is None else part * _signs(signs, enter, length)


@dataclass(frozen=True)
class Tile:
    """Tiles of the weight's matrix, each contiguous in the array from a hashed place on.

    Attributes: as `Fold`'s, and the tile's height and width; the array has more than height * width slots.
    """

    seed: int
    size: int
    offset: int
    rows: int
    cols: int
    height: int
    width: int

    def _starts(self, band: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        number = self.offset + band * -(-self.cols // self.width) + column  # no other tile of the network has it
        span = self.size - self.height * self.width
        return hash_of(number, self.seed, "slot") % span, hash_of(number, self.seed, "sign") % SIGNS

    def slots(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots of these entries (int64, any shape), and their places in the sign table."""
        row, col = flat // self.cols, flat % self.cols
        start, enter = self._starts(row // self.height, col // self.width)
        inside = row % self.height * self.width + col % self.width
        return start + inside, (enter + inside) % SIGNS

    def _bands(self, device: torch.device) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield some rows of tiles at a time: first row, row behind the last, slots and sign places [..., tile]."""
        inside = torch.arange(self.height * self.width, device=device)
        columns = torch.arange(-(-self.cols // self.width), device=device)
        step = max(1, _GROUP // (self.height * self.width * len(columns)))
        for first in range(0, -(-self.rows // self.height), step):
            last = min(first + step, -(-self.rows // self.height))
            start, enter = self._starts(torch.arange(first, last, device=device)[:, None], columns)
            yield (
                first * self.height,
                min(last * self.height, self.rows),
                start[..., None] + inside,
                (enter[..., None] + inside) % SIGNS,
            )

    def read(self, values: Tensor, signs: Tensor) -> Tensor:
        """Return sign * values[slot] of every entry, flat."""
        out = values.new_empty(self.rows, self.cols)
        for first, last, slot, enter in self._bands(values.device):
            tiles = (values[slot] * signs[enter]).view(*slot.shape[:2], self.height, self.width)
            band = tiles.transpose(1, 2).reshape(slot.shape[0] * self.height, -1)
            out[first:last] = band[: last - first, : self.cols]
        return out.view(-1)

    def add(self, out: Tensor, grad: Tensor, signs: Tensor | None) -> None:
        """Add sign * grad (flat) to `out` [size] at every entry's slot; without a table all signs are +."""
        grad = grad.view(self.rows, self.cols)
        for first, last, slot, enter in self._bands(grad.device):
            band = grad.new_zeros(slot.shape[0] * self.height, slot.shape[1] * self.width)
            band[: last - first, : self.cols] = grad[first:last]
            tiles = band.view(slot.shape[0], self.height, slot.shape[1], self.width).transpose(1, 2).reshape(slot.shape)
            out.index_add_(0, slot.view(-1), (tiles if signs is None else tiles * signs[enter]).view(-1))


Place = Fold | Tile


def place_of(numbers: list[int]) -> Place:
    """Undo `list(astuple(place))`, the form in which operators take a place."""
    return Fold(*numbers) if len(numbers) == 5 else Tile(*numbers)


@functools.lru_cache(maxsize=1024)
def _runs(fold: Fold) -> list[tuple[int, int, int, int]]:
    """Return the contiguous runs of a weight: first entry, length, first slot, place in the sign table."""
    begin, end, size = fold.offset, fold.offset + fold.rows * fold.cols, fold.size
    chunks = torch.arange(begin // size, -(-end // size), device="cpu")
    rotations = (hash_of(chunks, fold.seed, "slot") % size).tolist()
    enters = (hash_of(chunks, fold.seed, "sign") % SIGNS).tolist()
    runs = []
    for chunk, rotation, enter in zip(chunks.tolist(), rotations, enters, strict=True):
        t, stop = max(begin, chunk * size), min(end, (chunk + 1) * size)
        while t < stop:  # twice where the rotation wraps around the array's end
            place = t - chunk * size
            slot = (rotation + place) % size
            length = min(stop - t, size - slot)
            runs.append((t - begin, length, slot, (enter + place) % SIGNS))
            t += length
    return runs


def _signs(table: Tensor, enter: int, length: int) -> Tensor:
    return table.repeat(-(-(enter + length) // SIGNS))[enter : enter + length]


def _groups(place: Place, device: torch.device) -> Iterator[Tensor]:
    numel = place.rows * place.cols
    for first in range(0, numel, _GROUP):
        yield torch.arange(first, min(first + _GROUP, numel), device=device)


def _read_entries(place: Place, values: Tensor, signs: Tensor) -> Tensor:
    parts = []
    for flat in _groups(place, values.device):
        slot, enter = place.slots(flat)
        parts.append(values[slot] * signs[enter])
    return torch.cat(parts)


def _add_entries(place: Place, out: Tensor, grad: Tensor, signs: Tensor | None) -> None:
    for flat in _groups(place, grad.device):
        slot, enter = place.slots(flat)
        part = grad[flat]
        out.index_add_(0, slot, part if signs is None else part * signs[enter])


# --- operators ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("rarefy", "FRAGMENT")
_REST = "Tensor scale, Tensor signs, Tensor? gain, Tensor? lengths, Tensor? ids, int[] place"
_library.define(f"shared_weight(Tensor values, {_REST}) -> Tensor")
_library.define(f"shared_weight_gradient(Tensor grad, {_REST}) -> Tensor")


def shared_weight(
    values: Tensor,
    scale: Tensor,
    signs: Tensor,
    place: Place,
    *,
    gain: Tensor | None = None,
    lengths: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """Return W [rows, cols] = scale * sign * values[slot], or only its rows `ids`; differentiable in `values`.

    Args:
        values: float [size].
        scale: a float scalar, in the dtype of `values`; no gradient is taken for it.
        signs: `sign_table(seed)`.
        place: where the weight stands.
        gain, lengths: multiply the gradient of slot i by gain[k], where the lengths (int64, summing to size) say how
            many slots in a row have the k-th gain. Default: the exact gradient.
        ids: int64, any shape; result [*ids.shape, cols].

    >>> place = Fold(seed=0, size=6, offset=0, rows=2, cols=3)
    >>> w = shared_weight(torch.arange(1.0, 7.0), torch.tensor(2.0), sign_table(0), place)
    >>> w.abs().flatten().sort().values  # six slots for six weights: each is used once
    tensor([ 2.,  4.,  6.,  8., 10., 12.])
    """
    flat = torch.ops.rarefy.shared_weight(values, scale, signs, gain, lengths, ids, list(astuple(place)))
    return flat.view(*(ids.shape if ids is not None else (place.rows,)), place.cols)


def use(place: Place, amount: float, size: int) -> Tensor:
    """Return `amount` times how often each slot is used by this weight; float64 [size]."""
    out = torch.zeros(size, dtype=torch.float64, device="cpu")
    place.add(out, torch.full((place.rows * place.cols,), amount, dtype=torch.float64, device="cpu"), None)
    return out


def _entries(place: Place, ids: Tensor) -> Tensor:
    return ids.reshape(-1, 1) * place.cols + torch.arange(place.cols, device=ids.device)


def _read(
    values: Tensor,
    scale: Tensor,
    signs: Tensor,
    gain: Tensor | None,
    lengths: Tensor | None,
    ids: Tensor | None,
    place: list[int],
) -> Tensor:
    where = place_of(place)
    if ids is None:
        return where.read(values, signs).mul_(scale)
    slot, enter = where.slots(_entries(where, ids))
    return (values[slot] * signs[enter]).mul_(scale).view(-1)


def _read_gradient(
    grad: Tensor,
    scale: Tensor,
    signs: Tensor,
    gain: Tensor | None,
    lengths: Tensor | None,
    ids: Tensor | None,
    place: list[int],
) -> Tensor:
    where = place_of(place)
    out, flat = grad.new_zeros(where.size), grad.reshape(-1) * scale
    if ids is None:
        where.add(out, flat, signs)
    else:
        slot, enter = where.slots(_entries(where, ids))
        out.index_add_(0, slot.view(-1), flat * signs[enter].view(-1))
    return out if gain is None else out.mul_(_spread(gain, lengths, out))


def _spread(gain: Tensor, lengths: Tensor | None, like: Tensor) -> Tensor:
    assert lengths is not None
    return gain.to(like.dtype).repeat_interleave(lengths, output_size=like.numel())


def _read_fake(values: Tensor, *rest: Any) -> Tensor:
    ids, place = rest[-2], place_of(rest[-1])
    return values.new_empty((place.rows if ids is None else ids.numel()) * place.cols)


def _gradient_fake(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(place_of(rest[-1]).size)


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, *tensors, ctx.place = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.rarefy.shared_weight_gradient(grad, *ctx.saved_tensors, ctx.place), *[None] * 6


def _gradient_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, _, gain, lengths, _ = ctx.saved_tensors
    if gain is not None:
        grad = grad * _spread(gain, lengths, grad)
    return torch.ops.rarefy.shared_weight(grad, *ctx.saved_tensors, ctx.place), *[None] * 6


for _name, _run, _fake, _derivative in (
    ("shared_weight", _read, _read_fake, _backward),
    ("shared_weight_gradient", _read_gradient, _gradient_fake, _gradient_backward),
):
    _library.impl(_name, _run, "CPU")
    _library.impl(_name, _run, "CUDA")
    torch.library.register_fake(f"rarefy::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"rarefy::{_name}", _derivative, setup_context=_save, lib=_library)
