"""What a saved sparsifier looks like, and the checks that a loaded one must pass before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rarefy.errors import StateError

if TYPE_CHECKING:
    from rarefy.engine.layer import Layer
    from rarefy.engine.method import Method
    from rarefy.engine.sparsifier import Sparsifier

FORMAT = 1

_PARTS: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "options": dict,
    "total_steps": (int, type(None)),
    "seed": int,
    "step": int,
    "generator": Tensor,
    "dense_gradient_steps": int,
    "kept_steps": dict,
    "further_gradients": dict,
    "events": Tensor,
    "memory": dict,
    "layers": dict,
}


def plain(value: Any) -> Any:
    """Return an option as numbers, strings, lists and dicts, as it is saved and compared."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else str(value)


def collect(sparse: Sparsifier) -> dict[str, Any]:
    """Return all that an exact resume needs: tensors, numbers, strings, lists and dicts."""
    index = {name: i for i, name in enumerate(sparse.layers)}
    rows = [[e.step, index[e.layer], e.dropped, e.grown, e.kept] for e in sparse.events]
    return {
        "format": FORMAT,
        "method": sparse.method.name,
        "options": {k: plain(v) for k, v in sparse.method.options().items()},
        "total_steps": sparse.total_steps,
        "seed": sparse.seed,
        "step": sparse.step_count,
        "generator": sparse.generator.get_state(),
        "events": torch.tensor(rows, dtype=torch.int64).reshape(-1, 5),
        "memory": dict(sparse.memory),
        "layers": {name: layer.state_dict() for name, layer in sparse.layers.items()},
    }


def check_state(state: Any, method: Method, total_steps: int | None, layers: Mapping[str, Layer]) -> None:
    """Raise StateError unless a saved state is whole, and of this method, these options and these layers."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise StateError("This is not a sparsifier's state, or it was written by another version of rarefy.")
    _check_parts(state, len(layers))
    mine = {k: plain(v) for k, v in method.options().items()} | {"total_steps": total_steps}
    saved = {**state["options"], "total_steps": state["total_steps"]}
    if state["method"] != method.name:
        raise StateError(f"The state is of method {state['method']!r}, this sparsifier's is {method.name!r}.")
    for option in mine.keys() | saved.keys():
        if mine.get(option) != saved.get(option):
            raise StateError(
                f"{method.name}: option {option} was {saved.get(option)!r} when the state was saved and is "
                f"{mine.get(option)!r} now. Make the sparsifier with the same options."
            )
    if any(list(state[part]) != list(layers) for part in ("layers", "kept_steps", "further_gradients")):
        odd = set(state["layers"]) ^ set(layers)
        raise StateError(
            f"The state is of another model: these layers differ: {', '.join(sorted(odd)) or 'their order'}."
        )
    for name, layer in layers.items():
        layer.check_state(state["layers"][name])


def check_layer(layer: Layer, state: object, *parts: str) -> dict[str, Any]:
    """Return a layer's saved state, or raise StateError unless it has these parts and is of this shape and pattern."""
    if not isinstance(state, dict) or not {"shape", "pattern", *parts} <= state.keys():
        raise StateError(f"{layer.name}: the saved state of this layer is incomplete.")
    for key, mine in (("shape", list(layer.shape)), ("pattern", str(layer.pattern))):
        if state[key] != mine:
            raise StateError(f"{layer.name}: the saved {key} is {state[key]!r}, this model's is {mine!r}.")
    return state


def check_mask(layer: Layer, mask: Tensor) -> None:
    """Raise StateError unless this is a mask of the layer's weight."""
    if tuple(mask.shape) != layer.shape or mask.dtype != torch.bool:
        raise StateError(f"{layer.name}: a mask must be bool {list(layer.shape)}, not {mask.dtype} {list(mask.shape)}.")


def are_bits(bits: object, numel: int) -> bool:
    """Whether this is a bit mask of so many bits, packed."""
    return isinstance(bits, Tensor) and bits.dtype == torch.uint8 and tuple(bits.shape) == (-(-numel // 8),)


def are_positions(flat: object, numel: int) -> bool:
    """Whether these are ascending flat positions, one or more, in a tensor of so many entries."""
    if not isinstance(flat, Tensor) or flat.dtype != torch.int64 or flat.dim() != 1 or not flat.numel():
        return False
    return int(flat[0]) >= 0 and int(flat[-1]) < numel and bool((flat.diff() > 0).all())


def _check_parts(state: dict[str, Any], layers: int) -> None:
    """Raise StateError unless every part is there and is of its kind."""
    missing = _PARTS.keys() - state.keys()
    if missing:
        raise StateError(f"The saved state is incomplete: it lacks {', '.join(sorted(missing))}.")
    for part, kind in _PARTS.items():
        if not isinstance(state[part], kind):
            raise StateError(f"The saved state is damaged: its {part} is a {type(state[part]).__name__}.")
    events = state["events"]
    if events.ndim != 2 or events.shape[1] != 5 or events.dtype != torch.int64 or not _in_range(events[:, 1], layers):
        raise StateError("The saved state is damaged: its events are not a log of this model's layers.")
    try:
        torch.Generator().set_state(state["generator"])
    except (RuntimeError, TypeError) as error:
        raise StateError(f"The saved state is damaged: its generator state is not one ({error}).") from error


def _in_range(values: Tensor, stop: int) -> bool:
    return values.numel() == 0 or (int(values.min()) >= 0 and int(values.max()) < stop)
