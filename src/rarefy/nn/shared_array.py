"""The small array that all layers of a network read their weights from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import OptionError, nearest
from rarefy.kernels.shared_weight import Fold, Place, Tile, shared_weight, sign_table, use

MAPPINGS = ("fold", "tile")

# What stands for the scale of a slot: from the sum of its weights' scales, the sum of their squares, and their number.
SCALERS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "v1": lambda total, squares, count: total.square() / count,
    "v2": lambda total, squares, count: total,
    "v3": lambda total, squares, count: total / count,
    "v4": lambda total, squares, count: squares.sqrt(),
    "v5": lambda total, squares, count: squares,
    "none": lambda total, squares, count: torch.ones_like(total),
}


class SharedArray(nn.Module):
    """A trainable array, and where each weight of the network stands in it.

    Weight l [rows, cols] is scales[l] * sign * values[slot], see `rarefy.kernels.shared_weight`.

    Attributes:
        values: the parameter, float [size]; gradients and optimizer state have its shape.
        scales: buffer, float [weights]; fixed.
        layout: buffer, int64: mapping, seed, tile and shapes. A state of another layout is refused when it is loaded.

    Args:
        size: slots.
        shapes: (rows, cols) of every weight, in order.
        scales: a positive scale for every weight.
        mapping: "fold" or "tile".
        tile: (height, width) of every weight's tiles; used by "tile".
        scaler: how the gradient of a slot is divided by the scales of the weights there, one of `SCALERS`; "v1" makes an
            SGD step on a weight the mean over its sharers, whatever the scales; "none" leaves the exact gradient.
        seed: of the hash.
    """

    values: nn.Parameter
    scales: Tensor
    layout: Tensor
    signs: Tensor
    gain: Tensor | None
    lengths: Tensor | None

    def __init__(
        self,
        size: int,
        shapes: Sequence[tuple[int, int]],
        scales: Sequence[float],
        *,
        mapping: str = "fold",
        tile: Sequence[tuple[int, int]] | None = None,
        scaler: str = "v1",
        seed: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_mapping(mapping, scaler)
        self.size, self.mapping, self.scaler, self.seed = size, mapping, scaler, seed
        self.places: list[Place] = []
        offset = 0
        for i, (rows, cols) in enumerate(shapes):
            if mapping == "fold":
                self.places.append(Fold(seed, size, offset, rows, cols))
            else:
                assert tile is not None
                height, width = tile[i]
                if height * width >= size:
                    raise OptionError(
                        f"an array of {size} values is not larger than a tile of {height}x{width}: take smaller tiles, "
                        "more memory, or mapping='fold'."
                    )
                self.places.append(Tile(seed, size, offset, rows, cols, height, width))
            offset += rows * cols
        self.values = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.register_buffer("scales", torch.tensor(scales, device=device, dtype=self.values.dtype))
        numbers = [MAPPINGS.index(mapping), *(n for p in self.places for n in vars(p).values())]
        self.register_buffer("layout", torch.tensor(numbers, device=device))
        self.register_buffer("signs", sign_table(seed).to(device), persistent=False)
        self.register_buffer("gain", None, persistent=False)
        self.register_buffer("lengths", None, persistent=False)
        self._stabilise()

    @property
    def represented(self) -> int:
        """Number of weights that the array stands for."""
        return sum(place.rows * place.cols for place in self.places)

    def weight(self, index: int, ids: Tensor | None = None) -> Tensor:
        """Return weight number `index`, [rows, cols], or its rows `ids` [..., cols]; differentiable."""
        return shared_weight(
            self.values,
            self.scales[index],
            self.signs,
            self.places[index],
            gain=self.gain,
            lengths=self.lengths,
            ids=ids,
        )

    def slot_scales(self) -> Tensor:
        """Return v, what the scaler divides every slot's gradient by (1 where no weight reads it); float64 [size]."""
        total, squares, count = (torch.zeros(self.size, dtype=torch.float64) for _ in range(3))
        for place, scale in zip(self.places, self.scales.tolist(), strict=True):
            here = use(place, 1.0, self.size)
            count += here
            total += scale * here
            squares += scale * scale * here
        return torch.where(count > 0, SCALERS[self.scaler](total, squares, count.clamp(min=1)), 1.0)

    @torch.no_grad()
    def _stabilise(self) -> None:
        """Hold 1 / v as runs of equal values: a few numbers for each chunk or tile."""
        if self.scaler == "none":
            return
        gain, lengths = torch.unique_consecutive(self.slot_scales().reciprocal(), return_counts=True)
        self.gain, self.lengths = gain.to(self.scales), lengths.to(self.scales.device)

    @torch.no_grad()
    def take(self, weights: Sequence[Tensor]) -> None:
        """Write these weights into the array: the last one of a slot's sharers stays, all where none is shared."""
        for place, scale, weight in zip(self.places, self.scales, weights, strict=True):
            slot, enter = place.slots(torch.arange(weight.numel(), device=weight.device))
            self.values[slot] = weight.reshape(-1).to(self.values) / scale * self.signs[enter]

    def extra_repr(self) -> str:
        return (
            f"size={self.size}, represented={self.represented}, mapping={self.mapping!r}, scaler={self.scaler!r}, "
            f"seed={self.seed}"
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, meta: Any, strict: bool, *lists: list[str]
    ) -> None:
        layout = state_dict.get(f"{prefix}layout")
        if isinstance(layout, Tensor) and not torch.equal(layout.to(self.layout.device), self.layout):
            lists[2].append(
                f"{prefix}layout: the saved array has another mapping, seed, size, tile or other layers: its values would be "
                "read at wrong places."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, meta, strict, *lists)
        self._stabilise()


def check_mapping(mapping: str, scaler: str) -> None:
    """Raise OptionError for an unknown mapping or scaler."""
    if not isinstance(mapping, str) or mapping not in MAPPINGS:
        raise OptionError(f"mapping={mapping!r} is not known{nearest(str(mapping), MAPPINGS)}; it is 'fold' or 'tile'.")
    if not isinstance(scaler, str) or scaler not in SCALERS:
        raise OptionError(
            f"scaler={scaler!r} is not known{nearest(str(scaler), SCALERS)}; it is one of {', '.join(SCALERS)}."
        )


def power_of_two(scale: float) -> float:
    """Return the power of two next to a positive number (on the logarithmic scale)."""
    return 2.0 ** round(math.log2(scale))
