"""What a saved sparsifier looks like, and the checks that a loaded one must pass before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.errors import StateError

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


def check_plain_parts(state: dict[str, Any], layers: int) -> None:
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
