"""A hook on `load_state_dict` that stays with its own model."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import nn


class Loadable(Protocol):
    def after_load(self) -> None: ...


class AfterLoad:
    """Calls its owner's `after_load()`; never follows its module into a copy or a pickle.

    So a deepcopy, an averaged model or a saved file of a sparse model is a plain model.
    """

    def __init__(self, owner: Loadable | None = None) -> None:
        self._owner = None if owner is None else weakref.ref(owner)

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        owner = self._owner() if self._owner is not None else None
        if owner is not None:
            owner.after_load()

    def __deepcopy__(self, memo: dict[int, Any]) -> AfterLoad:
        return AfterLoad()

    def __reduce__(self) -> tuple[type[AfterLoad], tuple[()]]:
        return AfterLoad, ()
