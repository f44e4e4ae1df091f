"""How masks move along a run: what each update replaced, how far they came from the first, what was tried."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rarefy.analysis.checkpoint import read_masks
from rarefy.engine.events import Event
from rarefy.errors import DataError, OptionError, SelectionError, nearest
from rarefy.kernels import pack_mask, unpack_mask
from rarefy.metrics._masks import Masks
from rarefy.metrics.overlap import Explored, overlap


@dataclass(frozen=True)
class Turn:
    """One update, over all layers together or of one: weights kept before and after it, dropped and grown by it."""

    step: int
    before: int
    dropped: int
    grown: int
    kept: int

    @property
    def churn(self) -> float:
        """Share of the kept weights that the update dropped."""
        return self.dropped / self.before if self.before else 0.0

    @property
    def flips(self) -> int:
        """Weights that the update dropped or grew: the SAD of one update (arXiv 2102.04010).

        A mask that moves at every step is logged once in 100 steps; then this is the sum of their step-to-step SADs.
        """
        return self.dropped + self.grown


def churn(events: Iterable[Event], layer: str | None = None) -> list[Turn]:
    """Return the updates of a run, in order; the first mask (step 0) is where it starts, no update.

    Args:
        events: `Sparsifier.events`, or `run_events(folder)`.
        layer: a weight's name, or None for all layers together. A layer whose mask never changed leaves no event and is
            not in the sums.

    Raises SelectionError where no event is of `layer`.

    >>> log = [Event(0, "w", 6, 0, 4), Event(10, "w", 1, 1, 4), Event(20, "w", 2, 0, 2)]
    >>> [(turn.step, turn.churn) for turn in churn(log)]
    [(10, 0.25), (20, 0.5)]
    """
    log = sorted(events, key=lambda event: event.step)  # stable: the order within a step stays
    names = dict.fromkeys(event.layer for event in log)
    if layer is not None and layer not in names:
        raise SelectionError(f"no event is of layer {layer!r}{nearest(layer, names)}")
    log = [event for event in log if layer in (None, event.layer)]
    kept: dict[str, int] = {}
    for event in log:  # what a layer kept before its first event
        kept.setdefault(event.layer, event.kept + event.dropped - event.grown)
    turns: list[Turn] = []
    for step in dict.fromkeys(event.step for event in log):
        now = [event for event in log if event.step == step]
        before = sum(kept.values())
        kept |= {event.layer: event.kept for event in now}
        if step > 0:
            dropped, grown = sum(event.dropped for event in now), sum(event.grown for event in now)
            turns.append(Turn(step, before, dropped, grown, sum(kept.values())))
    return turns


@dataclass(frozen=True)
class Move:
    """One recorded set of masks beside the one before it, the first, the last, and all so far.

    SAD, the sparse architecture divergence of two times (Zhou et al. 2021, arXiv 2102.04010), is the number of mask bits in
    which they differ, ||E_a - E_b||^2 over all layers.

    Attributes:
        step: when it was recorded.
        sad_previous, sad_first, sad_last: SAD since the record before, since the first record, and to the last one.
        flip_rate: share of all weights whose state changed since the record before.
        jaccard_previous, jaccard_first: |A and B| / |A or B| with the record before, and with the first.
        survivors: share of the first mask's weights that are kept now.
        returned: share of the weights grown since the record before that had been kept at some earlier record; 0 where
            none were grown.
        explored: R_s, share of all weights that were kept at some record so far (ITOP, arXiv 2102.02887).
    """

    step: int
    sad_previous: int
    sad_first: int
    sad_last: int
    flip_rate: float
    jaccard_previous: float
    jaccard_first: float
    survivors: float
    returned: float
    explored: float


class MaskHistory:
    """Masks recorded along a run, one bit a weight.

    >>> import torch
    >>> history = MaskHistory()
    >>> for step, bits in enumerate(([1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0])):
    ...     history.record(step, {"w": torch.tensor(bits).bool()})
    >>> last = history.moves()[-1]
    >>> last.survivors, last.returned, last.explored
    (1.0, 1.0, 0.75)
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._packed: list[dict[str, tuple[Tensor, tuple[int, ...]]]] = []

    def record(self, step: int, masks: Masks) -> None:
        """Add the masks of a step (bool by name, copied); steps must rise, and names and shapes stay (OptionError)."""
        if self.steps and step <= self.steps[-1]:
            raise OptionError(f"step {step} does not come after step {self.steps[-1]}, the last that was recorded")
        packed = {name: (pack_mask(mask), tuple(mask.shape)) for name, mask in masks.items()}
        if self._packed and {n: s for n, (_, s) in packed.items()} != {n: s for n, (_, s) in self._packed[0].items()}:
            raise OptionError(f"the masks of step {step} have other names or shapes than those of step {self.steps[0]}")
        self.steps.append(step)
        self._packed.append(packed)

    def __len__(self) -> int:
        return len(self.steps)

    def masks(self, index: int) -> dict[str, Tensor]:
        """Return the masks of one record; bool, by name."""
        return {name: unpack_mask(bits, shape) for name, (bits, shape) in self._packed[index].items()}

    def moves(self) -> list[Move]:
        """Compare every record but the first with the ones before it."""
        if not self._packed:
            return []
        first = previous = self.masks(0)
        final = self.masks(len(self) - 1)
        seen = Explored(first)
        result = []
        for index in range(1, len(self)):
            now = self.masks(index)
            ever = seen.state_dict()
            grown = sum(int((now[n] & ~previous[n]).sum()) for n in now)
            returned = sum(int((now[n] & ~previous[n] & ever[n]).sum()) for n in now)
            seen.update(now)
            near, far = overlap(now, previous).total, overlap(now, first).total
            survivors = far.both / far.kept_b if far.kept_b else 1.0
            share = returned / grown if grown else 0.0
            result.append(
                Move(
                    step=self.steps[index],
                    sad_previous=near.flips,
                    sad_first=far.flips,
                    sad_last=overlap(now, final).total.flips,
                    flip_rate=near.flip_rate,
                    jaccard_previous=near.jaccard,
                    jaccard_first=far.jaccard,
                    survivors=survivors,
                    returned=share,
                    explored=seen.share,
                )
            )
            previous = now
        return result


def run_events(folder: str | os.PathLike[str]) -> list[Event]:
    """Read the topology events of a run folder's `metrics.jsonl`; a broken line is skipped.

    Raises DataError where there is no such file.
    """
    path = Path(folder) / "metrics.jsonl"
    events: dict[tuple[int, str], Event] = {}
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                    if entry["kind"] == "topology":
                        event = Event(*(entry[name] for name in Event._fields))
                        events[event.step, event.layer] = event  # a step repeated after a resume counts once
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return list(events.values())


def run_masks(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the final masks of a run folder (`masks.safetensors`), bool by name: for `rarefy.metrics.overlap` of two runs.

    Raises DataError where there is no such file, StateError where it is damaged.
    """
    return read_masks(Path(folder) / "masks.safetensors")
