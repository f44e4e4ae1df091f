"""Places that must move together, as a graph; and the groups of interchangeable units that follow from it.

An *atom* is one place of one dimension of a parameter. Operations bind atoms: a channel of a sum is a channel of each term.
A connected component of that graph is a *unit*: its atoms move together or not at all. Two units may change places when there
is one way to match their atoms that respects the dimensions and every binding. Colour refinement (Weisfeiler & Leman 1968)
finds it: atoms start with a colour for their dimension, and take in their neighbours' colours until nothing changes. Units with
equal colours are interchangeable if no colour is there twice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.coupling.groups import Group, Member, Pinned

Words = NDArray[np.uint64]
Places = NDArray[np.int64]
_ROUNDS = 1000
FIXED = 0  # the label of what does not move


class Key(NamedTuple):
    """A dimension of a parameter, all of it or inside some rows."""

    name: str
    dim: int
    rows: tuple[int, int] | None


class Atoms:
    """The graph. Labels are int64 tensors of atoms; 0 stands for what does not move."""

    def __init__(self) -> None:
        self._count = 1
        self._starts: dict[Key | int, tuple[int, int]] = {}
        self._calls = 0
        self._edges: list[tuple[Places, Places, Words]] = []
        self._tags: list[tuple[Places, Words]] = []
        self._pins: list[tuple[Places, str]] = []
        self._pinned_dims: dict[tuple[str, int], str] = {}

    def along(self, name: str, dim: int, size: int, rows: tuple[int, int] | None = None) -> Tensor:
        """Return the labels of a parameter's dimension [size]."""
        return self._make(Key(name, dim, rows), size)

    def constants(self, size: int) -> Tensor:
        """Return labels for places that all hold one constant [size]: they may move, and need nothing to be done."""
        return self._make(self._call(), size)

    def _make(self, key: Key | int, size: int) -> Tensor:
        start, _ = self._starts.setdefault(key, (self._count, size))
        self._count = max(self._count, start + size)
        return torch.arange(start, start + size)

    def _call(self) -> int:
        self._calls += 1
        return self._calls

    def bind(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Let the places of two label tensors of one (broadcast) shape move together."""
        one, two = (t.reshape(-1).numpy() for t in torch.broadcast_tensors(a, b))
        differ = one != two
        for mine, other in ((one, two), (two, one)):
            if bool((lone := differ & (other == FIXED)).any()):
                self._pins.append((np.unique(mine[lone]), reason))
        if bool((both := differ & (one != FIXED) & (two != FIXED)).any()):
            kind = _mix(np.uint64(self._call()) + _mix(_rank(one)) + _mix(_mix(_rank(two))))
            self._edges.append((one[both], two[both], kind[both]))

    def separate(self, labels: Tensor, part: Tensor) -> None:
        """Forbid that units of different parts (int64, broadcast to the labels) change places."""
        a, p = (t.reshape(-1).numpy() for t in torch.broadcast_tensors(labels, part))
        self._tags.append((a, _mix(_mix(np.uint64(self._call())) + p.astype(np.uint64))))

    def pin(self, labels: Tensor, reason: str) -> None:
        """Say that these places do not move."""
        fixed = np.unique(labels.numpy())
        if len(fixed := fixed[fixed != FIXED]):
            self._pins.append((fixed, reason))

    def pin_dim(self, name: str, dim: int, reason: str) -> None:
        """Say that no place of a parameter's dimension moves, whatever else is found about it."""
        self._pinned_dims.setdefault((name, dim), reason)

    def solve(self) -> tuple[tuple[Group, ...], tuple[Pinned, ...]]:
        """Return the groups, in the order of their first members, and the dimensions that no group or only some hold."""
        keys = list(self._starts)
        key_of, place = np.full(self._count, -1), np.zeros(self._count, np.int64)
        for i, key in enumerate(keys):
            start, size = self._starts[key]
            key_of[start : start + size], place[start : start + size] = i, np.arange(size)
        u, v, kind = self._all_edges()
        component = _components(self._count, u, v)
        why = self._reasons(component, keys)
        free = ~np.isin(component, list(why))
        colour = self._colours(key_of, u, v, kind, free)
        units: dict[bytes, list[Places]] = {}
        atoms = np.flatnonzero(free)
        atoms = atoms[np.lexsort((colour[atoms], component[atoms]))]
        for mine in np.split(atoms, np.flatnonzero(np.diff(component[atoms])) + 1) if len(atoms) else []:
            if len(np.unique(colour[mine])) < len(mine):
                why[int(component[mine[0]])] = "channels meet in a way that cannot be told apart"
            else:
                units.setdefault(colour[mine].tobytes(), []).append(mine)
        groups = [g for found in units.values() if (g := _group(np.stack(found), keys, key_of, place)) is not None]
        return tuple(sorted(groups, key=lambda g: self._first(g))), self._not_moving(keys, component, why)

    def _first(self, group: Group) -> tuple[int, int]:
        first = group.members[0]
        return self._starts[Key(first.name, first.dim, first.rows)][0], int(first.index[0, 0])

    def _all_edges(self) -> tuple[Places, Places, Words]:
        if not self._edges:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64)
        u, v, kind = (np.concatenate(part) for part in zip(*self._edges, strict=True))
        return u, v, kind

    def _reasons(self, component: Places, keys: list[Key | int]) -> dict[int, str]:
        why = {int(component[FIXED]): "fixed"}
        for atoms, reason in self._pins:
            for c in np.unique(component[atoms]).tolist():
                why.setdefault(c, reason)
        for key in keys:
            if isinstance(key, Key) and (reason := self._pinned_dims.get((key.name, key.dim), "")):
                start, size = self._starts[key]
                for c in np.unique(component[start : start + size]).tolist():
                    why.setdefault(c, reason)
        return why

    def _colours(self, key_of: Places, u: Places, v: Places, kind: Words, free: NDArray[np.bool_]) -> Words:
        colour = _mix(key_of.astype(np.uint64))
        with np.errstate(over="ignore"):
            for atoms, tag in self._tags:
                np.add.at(colour, atoms, tag)
        inside = free[u]
        u, v, kind = u[inside], v[inside], kind[inside]
        count = 0
        for _ in range(_ROUNDS):
            found = len(np.unique(colour[free]))
            if found == count:
                break
            count = found
            heard = np.zeros_like(colour)
            np.add.at(heard, u, _mix(kind + colour[v]))
            np.add.at(heard, v, _mix(_mix(kind) + colour[u]))
            colour = _mix(_mix(colour) + heard)
        return colour

    def _not_moving(self, keys: list[Key | int], component: Places, why: dict[int, str]) -> tuple[Pinned, ...]:
        found: dict[tuple[str, int], str] = {}
        for key in keys:
            if isinstance(key, Key):
                start, size = self._starts[key]
                for c in np.unique(component[start : start + size]).tolist():
                    if c in why:
                        found.setdefault((key.name, key.dim), why[c])
        return tuple(Pinned(name, dim, reason) for (name, dim), reason in found.items())


def _group(units: Places, keys: list[Key | int], key_of: Places, place: Places) -> Group | None:
    """Turn atoms [units, slots], slots in one order, into a group."""
    slots = sorted(range(units.shape[1]), key=lambda s: (key_of[units[0, s]], place[units[0, s]]))
    named = [s for s in slots if isinstance(keys[key_of[units[0, s]]], Key)]
    if not named:
        return None
    units = units[np.argsort(place[units[:, named[0]]], kind="stable")]
    members: dict[int, list[int]] = {}
    for slot in named:
        members.setdefault(int(key_of[units[0, slot]]), []).append(slot)
    result = []
    for which, mine in members.items():
        key = keys[which]
        assert isinstance(key, Key)
        result.append(Member(key.name, key.dim, torch.from_numpy(place[units[:, mine]]), key.rows))
    return Group(len(units), tuple(result))


def _components(count: int, u: Places, v: Places) -> Places:
    """Label every atom with the smallest atom of its component."""
    root = np.arange(count)
    while True:
        low = np.minimum(root[u], root[v])
        new = root.copy()
        np.minimum.at(new, root[u], low)
        np.minimum.at(new, root[v], low)
        while not np.array_equal(new, jumped := new[new]):
            new = jumped
        if np.array_equal(new, root):
            return root
        root = new


def _rank(labels: Places) -> Words:
    """How often each entry has been there before."""
    order = np.argsort(labels, kind="stable")
    ranked = labels[order]
    begins = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    since = np.arange(len(labels)) - np.repeat(begins, np.diff(np.r_[begins, len(labels)]))
    rank = np.empty(len(labels), np.uint64)
    rank[order] = since.astype(np.uint64)
    return rank


def _mix(x: Words | np.uint64) -> Words:
    """Scramble 64 bits (SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
