"""A network whose own weights stand still while something beside them is trained."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


class Freezer:
    """Makes a model's own parameters stand still, and lets those go again that moved before."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._frozen: list[nn.Parameter] = []
        self.on = False

    def set(self, on: bool, besides: Collection[int] = ()) -> None:
        """Freeze all but the parameters with these ids, or thaw what was frozen."""
        if on == self.on:
            return
        self.on = on
        if on:
            self._frozen = [p for p in self._model.parameters() if p.requires_grad and id(p) not in besides]
        for parameter in self._frozen:
            parameter.requires_grad_(not on)
            if on:
                parameter.grad = None  # an optimizer moves whatever has a gradient, be it zero
        if not on:
            self._frozen = []
