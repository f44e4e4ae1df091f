"""Native index structures of sparse weights, made once per topology and kept as long as its index tensors live unchanged."""

from __future__ import annotations

import atexit
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

MOST = 1024  # layers times the shapes they are used with


class _Entry(NamedTuple):
    versions: tuple[int, int]
    storages: tuple[StorageWeakRef, StorageWeakRef]
    plan: Any


class PlanCache:
    """Plans by the memory that holds `crow` and `col`: a change in place, or memory that was freed, makes a plan invalid.

    Threads may share it; what two of them miss at once is made twice.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._plans: OrderedDict[tuple[Hashable, Hashable], _Entry] = OrderedDict()
        self._lock = threading.Lock()
        atexit.register(self._plans.clear)  # before the native module goes

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, crow: Tensor, col: Tensor, use: Hashable, make: Callable[[], Any]) -> Any:
        """Return the plan for this topology and use, made by `make` when there is none."""
        if crow.is_inference() or col.is_inference():  # these do not count their changes
            return make()
        place = tuple((t.data_ptr(), t.numel()) for t in (crow, col))
        versions = (crow._version, col._version)
        with self._lock:
            found = self._plans.get((place, use))
            if found is not None and found.versions == versions and not _expired(found):
                self._plans.move_to_end((place, use))
                return found.plan
            self._drop_dead(place, versions)
        plan = make()
        storages = (StorageWeakRef(crow.untyped_storage()), StorageWeakRef(col.untyped_storage()))
        with self._lock:
            self._plans[place, use] = _Entry(versions, storages, plan)
            while len(self._plans) > self._most:
                self._plans.popitem(last=False)
        return plan

    def _drop_dead(self, place: Hashable, versions: tuple[int, int]) -> None:
        """Forget plans whose topology is gone, and those of this one before it was changed in place."""
        dead = [
            key
            for key, entry in self._plans.items()
            if _expired(entry) or (key[0] == place and entry.versions != versions)
        ]
        for key in dead:
            del self._plans[key]


class Seen:
    """Remembers some tensors by memory and version, to tell whether the next ones are the same and unchanged."""

    def __init__(self) -> None:
        self._seen: tuple[tuple[int, int], ...] = ()
        self._storages: tuple[StorageWeakRef, ...] = ()

    def again(self, *tensors: Tensor) -> bool:
        """Return whether these are what was seen last; from now on they are."""
        if any(t.is_inference() for t in tensors):  # these do not count their changes
            self._seen = ()
            return False
        seen = tuple((t.data_ptr(), t._version) for t in tensors)
        same = seen == self._seen and not any(storage.expired() for storage in self._storages)
        if not same:
            self._seen, self._storages = seen, tuple(StorageWeakRef(t.untyped_storage()) for t in tensors)
        return same


def _expired(entry: _Entry) -> bool:
    return any(storage.expired() for storage in entry.storages)
