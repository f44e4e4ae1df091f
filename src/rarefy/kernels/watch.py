"""See the factors of a sparse weight's gradient: dense gradients are made of them, and only by who wants one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

See = Callable[..., None]
_watchers: dict[
    int, list[See]
] = {}  # by the address of `crow`, which survives changes in place and every kind of tracing


def watch(crow: Tensor, see: See) -> Callable[[], None]:
    """Call `see(x, dy, *geometry)` whenever the gradient of values indexed by this `crow` is computed.

    `x` and `dy` are what the operator got (for a convolution with its geometry): copy what must outlive the call.
    Returns a function that ends the watch.
    """
    place = crow.data_ptr()
    _watchers.setdefault(place, []).append(see)

    def end() -> None:
        if see in (found := _watchers.get(place, [])):
            found.remove(see)
            if not found:
                del _watchers[place]

    return end


def watched(gradient: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the values-gradient operator with a look-out for watchers."""

    def run(x: Tensor, dy: Tensor, crow: Tensor, col: Tensor, *geometry: Any) -> Tensor:
        if _watchers:
            for see in _watchers.get(crow.data_ptr(), ()):
                see(x, dy, *geometry)
        return gradient(x, dy, crow, col, *geometry)

    return run
