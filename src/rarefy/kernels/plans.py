"""Native index structures of sparse weights, made once per topology and kept as long as its index tensors live unchanged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

MOST = 1024  # layers times the shapes they are used with


class PlanCache:
    """Plans by the memory that holds `crow` and `col`: a change in place, or memory that was freed, makes a plan invalid."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._plans: OrderedDict[Hashable, tuple[tuple[StorageWeakRef, ...], Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, crow: Tensor, col: Tensor, use: Hashable, make: Callable[[], Any]) -> Any:
        """Return the plan for this topology and use, made by `make` when there is none."""
        if crow.is_inference() or col.is_inference():  # these do not count their changes
            return make()
        place = tuple((t.data_ptr(), t.numel(), t._version) for t in (crow, col))
        key = (place, use)
        found = self._plans.get(key)
        if found is not None and not any(storage.expired() for storage in found[0]):
            self._plans.move_to_end(key)
            return found[1]
        plan = make()
        self._drop_dead()
        self._plans[key] = (tuple(StorageWeakRef(t.untyped_storage()) for t in (crow, col)), plan)
        while len(self._plans) > self._most:
            self._plans.popitem(last=False)
        return plan

    def _drop_dead(self) -> None:
        """Forget plans whose topology is gone, or was changed in place since."""
        dead = [key for key, (storages, _) in self._plans.items() if any(s.expired() for s in storages)]
        for key in dead:
            del self._plans[key]
