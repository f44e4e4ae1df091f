"""A hook on `load_state_dict` that stays with its own model."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from rarefy.errors import SelectionError

if TYPE_CHECKING:
    from rarefy.engine.selection import Target


class Loadable(Protocol):
    def after_load(self) -> None: ...


class AfterLoad:
    """Calls its owner's `after_load()`; never follows its module into a copy or a pickle.

    So a deepcopy or an averaged model of a sparse model is a plain model. (A whole model that is pickled before
    `finalize()` names this class, so rarefy must be installed where it is loaded; a state dict does not.)
    """

    def __init__(self, owner: Loadable | None = None) -> None:
        self._owner = None if owner is None else weakref.ref(owner)

    @property
    def owner(self) -> Loadable | None:
        """The object that is called, while it lives."""
        return None if self._owner is None else self._owner()

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        if (owner := self.owner) is not None:
            owner.after_load()

    def __deepcopy__(self, memo: dict[int, Any]) -> AfterLoad:
        return AfterLoad()

    def __reduce__(self) -> tuple[type[AfterLoad], tuple[()]]:
        return AfterLoad, ()


def check_free(targets: Sequence[Target]) -> None:
    """Refuse weights that another sparsifier still manages: the two would undo each other's work."""
    for target in targets:
        for hook in target.module._load_state_dict_post_hooks.values():
            managed = getattr(hook.owner, "target", None) if isinstance(hook, AfterLoad) else None
            if managed is not None and managed.attribute == target.attribute:
                raise SelectionError(
                    f"{target.name} {list(target.shape)} is sparse already: call finalize() or detach() of the sparsifier "
                    "that manages it first, or exclude it."
                )
