"""The systolic array, cycle by cycle: what `timing.py` says in closed form, done register by register.

Nothing here reads a formula for a result: operands enter at the edges when the static schedule says so and move one PE
a cycle; a PE multiplies what arrives, in FP16, and adds it to one of its FP32 accumulators, which is taken until the
adder has finished. An addition to an accumulator that is taken, operands that do not belong together, a weight that is
overwritten before its use, or two results in one drain register are a `Hazard`. Every value and cycle count that comes
out has gone through the registers, so a schedule that is wrong gives an error or another result. For small arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rarefy.errors import OptionError, RarefyError
from rarefy.systems.sat.config import Accelerator
from rarefy.systems.sat.gemms import Gemm
from rarefy.systems.sat.pregeneration import Packed
from rarefy.systems.sat.timing import Beat, Mapping, beat, tiles

Half = NDArray[np.float16]
Single = NDArray[np.float32]
Places = NDArray[np.uint8]
NOTHING = -1


class Hazard(RarefyError, RuntimeError):
    """The schedule asks for something that is not there yet, or not there any more."""


@dataclass(frozen=True)
class ArrayRun:
    """What came out of the array [P, Q], and in how many cycles."""

    result: Single
    cycles: int


def run_array(
    left: Half, right: Packed | Half, mapping: Mapping, array: Accelerator, schedule: Beat | None = None
) -> ArrayRun:
    """Run left [P, K] times right [K, Q] (dense FP16, or packed N:M) through the array and count cycles.

    `schedule` replaces the rhythm of `timing.beat`: one that is too fast raises Hazard. Raises OptionError where shapes
    do not fit, or the mapping needs more accumulators or a larger window than the array has.

    >>> ones = np.ones((2, 4), np.float16)
    >>> array = Accelerator(rows=2, columns=2, adder_latency=1, pipeline=0, interleave=1)
    >>> done = run_array(ones, ones.T, Mapping("output"), array)
    >>> done.result.tolist(), done.cycles  # 2 R + C + K - 2
    ([[4.0, 4.0], [4.0, 4.0]], 8)
    """
    if isinstance(right, Packed):
        values, places, m = right.values, right.places, right.m
    else:
        values, places, m = right[:, None], np.zeros((right.shape[0], 1, right.shape[1]), np.uint8), 1
    groups, n, columns = values.shape
    if left.shape[1] != groups * m:
        raise OptionError(f"left has {left.shape[1]} columns, right {groups * m} rows")
    if mapping.interleave > array.interleave or mapping.held * m > array.window:
        raise OptionError(f"{mapping} does not fit: {array.interleave} accumulators, window {array.window}")
    gemm = Gemm("FF", left.shape[0], groups * m, columns, n=n, m=m)
    rhythm = schedule or beat(gemm, mapping, array)
    run = _Output if mapping.dataflow == "output" else _Weight
    return run(left, values, places, gemm, mapping, array, rhythm).run()


class _Array:
    """The operands, and the registers that both dataflows have; activations go east in both."""

    def __init__(
        self, left: Half, values: Half, places: Places, gemm: Gemm, mapping: Mapping, array: Accelerator, rhythm: Beat
    ) -> None:
        self.left = left.astype(np.float16).reshape(gemm.rows, -1, gemm.m)  # [P, groups, m]
        self.values, self.places = values, places  # [groups, n, Q]
        self.gemm, self.array, self.rhythm = gemm, array, rhythm
        self.depth, self.held, self.chain = mapping.interleave, mapping.held, mapping.held * gemm.n
        self.cut = tiles(gemm, mapping, array)
        self.rows, self.columns = array.rows, array.columns
        self.result = np.zeros((gemm.rows, gemm.columns), np.float32)
        shape = (self.rows, self.columns)
        self.slot = np.full(shape, NOTHING)  # to which cycle of the schedule the activations in a PE belong
        self.data = np.zeros((*shape, gemm.m * self.held), np.float16)
        self.sums = np.zeros((*shape, self.depth), np.float32)  # accumulators
        self.ready = np.zeros((*shape, self.depth), np.int64)  # from which cycle each sum can be used

    def beat(self, slot: int) -> tuple[int, int, int] | None:
        """Return tile, step within it and output of a cycle of the schedule; None between tiles.

        Outputs beyond those interleaved are the cycles of a step in which a PE waits for its adder.
        """
        number, within = divmod(slot, self.rhythm.spacing)
        if not 0 <= number < self.cut.number or within >= self.rhythm.tile:
            return None
        return number, *divmod(within, self.rhythm.step)

    def window(self, row: int, group: int) -> Half:
        """Return the activations of `held` groups, zeros beyond the edges."""
        found = np.zeros((self.held, self.gemm.m), np.float16)
        if row < self.gemm.rows and group < self.left.shape[1]:
            part = self.left[row, group : group + self.held]
            found[: len(part)] = part
        return found.reshape(-1)

    def weight(self, group: int, k: int, column: int) -> tuple[np.float16, int]:
        """Return the k-th kept value of a group and its place, zero beyond the edges."""
        if group < self.values.shape[0] and column < self.gemm.columns:
            return self.values[group, k, column], int(self.places[group, k, column])
        return np.float16(0), 0

    def add(self, r: int, c: int, i: int, old: np.float32 | None, place: int, weight: np.float16, now: int) -> None:
        """Start a multiply-add to `old`, or (None) to the accumulator's own sum, which must be there."""
        if old is None:
            if self.ready[r, c, i] > now:
                raise Hazard(f"cycle {now}: PE ({r}, {c}) adds to accumulator {i} before its last sum is there")
            old = self.sums[r, c, i]
        self.sums[r, c, i] = old + np.float32(self.data[r, c, place]) * np.float32(weight)
        self.ready[r, c, i] = now + self.array.adder_latency

    def enter(self, now: int) -> None:
        """Move the activations one PE east, and let the next ones enter."""
        self.slot[:, 1:], self.data[:, 1:] = self.slot[:, :-1].copy(), self.data[:, :-1].copy()
        for r in range(self.rows):
            slot = now - self.first_cycle() - r * self.rhythm.skew
            at = self.beat(slot)
            self.slot[r, 0] = slot if at else NOTHING
            if at:
                self.data[r, 0] = self.activations(r, *at)

    def first_cycle(self) -> int:
        """Return the cycle in which the first activations enter."""
        return 0

    def activations(self, r: int, number: int, step: int, output: int) -> Half:
        """Return what enters row r."""
        raise NotImplementedError

    def run(self) -> ArrayRun:
        """Go through all cycles."""
        raise NotImplementedError


class _Output(_Array):
    """Outputs stay in their PE: weights go south, results are shifted out at the bottom."""

    def activations(self, r: int, number: int, step: int, output: int) -> Half:
        return self.window(self._row(r, number, output), step // self.gemm.n)

    def _row(self, r: int, number: int, output: int) -> int:
        return (number // self.cut.columns * self.rows + r) * self.depth + output

    def _column(self, c: int, number: int) -> int:
        return number % self.cut.columns * self.columns + c

    def run(self) -> ArrayRun:
        steps = self.values.shape[0] * self.gemm.n
        slot = np.full((self.rows, self.columns), NOTHING)
        weight = np.zeros((self.rows, self.columns), np.float16)
        place = np.zeros((self.rows, self.columns), np.intp)
        done: dict[int, list[tuple[int, int, int, Single]]] = {}  # cycle -> PEs whose results it gives, of which tile
        drain: dict[tuple[int, int], tuple[int, int, Single]] = {}  # PE -> row and tile of the results in its register
        shifts: dict[int, int] = {}  # column -> cycles for which it still shifts
        now = finished = left = 0
        end = self.cut.number * self.rhythm.spacing + 2 * self.rows + self.columns + self.array.pipeline
        while finished < self.cut.number * self.rows * self.columns:
            if now > end:
                raise Hazard(f"cycle {now}: the schedule is over, and {finished} results have left the array")
            self.enter(now)
            slot[1:], weight[1:], place[1:] = slot[:-1].copy(), weight[:-1].copy(), place[:-1].copy()
            for c in range(self.columns):
                at = self.beat(now - c)
                slot[0, c] = now - c if at else NOTHING
                if at:
                    group, k = divmod(at[1], self.gemm.n)
                    weight[0, c], place[0, c] = self.weight(group, k, self._column(c, at[0]))
            if (self.slot != slot).any():
                raise Hazard(f"cycle {now}: activations and weights of different times meet")
            for r, c in np.argwhere(slot != NOTHING):
                at = self.beat(int(slot[r, c]))
                assert at is not None
                number, step, i = at
                if i < self.depth:
                    self.add(r, c, i, None if step else np.float32(0), place[r, c], weight[r, c], now)
                if step == steps - 1 and i == self.rhythm.step - 1:
                    done.setdefault(now + 1 + self.array.pipeline, []).append((r, c, number, self.sums[r, c].copy()))
            for r, c, number, sums in done.pop(now, ()):
                if (r, c) in drain:
                    raise Hazard(f"cycle {now}: PE ({r}, {c}) has results, but others are in its drain register")
                drain[r, c] = r, number, sums
                if r == self.rows - 1:  # a column's last PE: now all of its results leave, one PE a cycle
                    shifts[c] = 0
            for c in list(shifts):
                r, number, sums = drain.pop((self.rows - 1, c))
                for i, value in enumerate(sums):
                    p, q = self._row(r, number, i), self._column(c, number)
                    if p < self.gemm.rows and q < self.gemm.columns:
                        self.result[p, q] = value
                finished, left = finished + 1, now + 1
                for r in range(self.rows - 1, shifts[c], -1):  # those above wait: they are of the next tile
                    drain[r, c] = drain.pop((r - 1, c))
                shifts[c] += 1
                if shifts[c] == self.rows:
                    del shifts[c]
            now += 1
        return ArrayRun(self.result, left)


class _Weight(_Array):
    """Weights stay in their PE: sums go south and leave at the bottom, to be added up over slices of the reduction."""

    def first_cycle(self) -> int:
        return self.rows * self.chain

    def _group(self, r: int, number: int) -> int:
        return (number % self.cut.reduction * self.rows + r) * self.held

    def _column(self, c: int, number: int) -> int:
        return number // self.cut.reduction * self.columns + c

    def activations(self, r: int, number: int, step: int, output: int) -> Half:
        return self.window(step // self.chain * self.depth + output, self._group(r, number))

    def _loaded(self, now: int, c: int) -> tuple[int, int] | None:
        """Return which tile's weights column c takes in this cycle, and the how many-th, counted from the bottom."""
        size = self.rows * self.chain
        if 0 <= now - c < size:
            return 0, now - c
        # from the second tile on: once the last row has begun the tile before
        number, at = divmod(now - c - self.first_cycle() - (self.rows - 1) * self.rhythm.skew, self.rhythm.spacing)
        return (number + 1, at) if 0 <= number < self.cut.number - 1 and at < size else None

    def run(self) -> ArrayRun:
        size = self.rows * self.chain
        shadow: list[list[tuple[int, int, np.float16, int]]] = [[] for _ in range(self.columns)]  # top first
        active: dict[tuple[int, int], list[tuple[int, int, np.float16, int]]] = {}
        south: dict[tuple[int, int, int, int], tuple[int, np.float32]] = {}  # PE, tile, output -> from when, sum
        now = left = 0
        last = (self.cut.number - 1) * self.rhythm.spacing + self.rhythm.tile - 1
        while self.slot[-1, -1] != last:
            self.enter(now)
            for r, c in np.argwhere(self.slot != NOTHING):
                at = self.beat(int(self.slot[r, c]))
                assert at is not None
                number, step, i = at
                if r == self.rows - 1:
                    left = now + 1 + self.array.pipeline
                block, k = divmod(step, self.chain)
                p = block * self.depth + i
                if i >= self.depth or p >= self.gemm.rows:
                    continue
                if k == 0 and p == 0:  # a tile begins: its weights are taken over
                    active[r, c] = shadow[c][r * self.chain : (r + 1) * self.chain]
                if k >= len(active[r, c]) or active[r, c][k][:2] != (number, r):
                    raise Hazard(f"cycle {now}: PE ({r}, {c}) does not hold its weights of tile {number}")
                old = None if k else np.float32(0)
                if k == 0 and r:
                    since, old = south.pop((r - 1, c, number, p), (now + 1, np.float32(0)))
                    if since > now:
                        raise Hazard(f"cycle {now}: PE ({r}, {c}) needs a sum that the PE above has not finished")
                _, _, value, place = active[r, c][k]
                self.add(r, c, i, old, k // self.gemm.n * self.gemm.m + place, value, now)
                if k < self.chain - 1:
                    continue
                if r < self.rows - 1:
                    south[r, c, number, p] = int(self.ready[r, c, i]), self.sums[r, c, i]
                    continue
                if (q := self._column(c, number)) < self.gemm.columns:
                    self.result[p, q] += self.sums[r, c, i]
            for c in range(self.columns):  # weights are pushed down, the bottom row's first
                if loaded := self._loaded(now, c):
                    number, push = loaded
                    r, k = divmod(size - 1 - push, self.chain)
                    h, n = divmod(k, self.gemm.n)
                    weight = self.weight(self._group(r, number) + h, n, self._column(c, number))
                    shadow[c] = [(number, r, *weight), *shadow[c][: size - 1]]
            now += 1
        return ArrayRun(self.result, left)
