"""Lottery tickets over trainings of your own: any loop, any optimizer, and a folder to go on from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rarefy
from rarefy.engine import Sparsifier
from rarefy.engine.state import plain
from rarefy.errors import OptionError
from rarefy.methods.lottery import LotteryTicket
from rarefy.schedules import Clock
from rarefy.search.held import Layers, hold
from rarefy.search.stored import packed_masks, read, unpacked_masks, write
from rarefy.training.seeds import derive


@dataclass(frozen=True)
class Training:
    """One training that a search asks for.

    Attributes:
        round: 0 is the dense training, round r follows the r-th pruning.
        rounds: L, the number of prunings.
        sparsity: fraction of zeros over the sparse layers, now.
        start: the step of a whole training to begin at, in schedule and data.
        stop: the step to end before; None: the end.
        rewind: "weights", "learning-rate" or "none" (then every round after 0 trains at the last learning rate).
        seed: of this training, for data order; torch's own generator is seeded with it too.
    """

    round: int
    rounds: int
    sparsity: float
    start: int
    stop: int | None
    rewind: str
    seed: int


Train = Callable[[nn.Module, Sparsifier, Training], Mapping[str, Any] | None]
"""Trains the model in place with an optimizer that it makes, after `sparse.follow(optimizer)`; returns numbers to keep."""


@dataclass(frozen=True)
class Ticket:
    """A round's mask, and what the training on it returned."""

    round: int
    sparsity: float
    masks: dict[str, Tensor] = field(repr=False)
    result: dict[str, Any]


@dataclass(frozen=True)
class Tickets:
    """All rounds of a search.

    Attributes:
        rounds: one `Ticket` each, the dense training first.
        rewound: what the survivors were put back to, by name; None where weights were not rewound.
        trainings: how often the training was called for a round (L + 1).
    """

    rounds: list[Ticket]
    rewound: dict[str, Tensor] | None = field(repr=False)

    @property
    def trainings(self) -> int:
        return len(self.rounds)


class _ByHand(LotteryTicket):
    """The method with its rounds ended by `lottery_ticket` and not by a count of steps."""

    def clock(self, total_steps: int | None) -> Clock:
        return Clock(total=total_steps)

    def initialise(self, sparse: Sparsifier) -> None:
        if self.rewind_to == 0:
            self.remember(sparse)

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        return

    def lr_step(self, step: int, total_steps: int) -> tuple[int, int]:
        return step, total_steps


def lottery_ticket(
    model: nn.Module,
    train: Train,
    method: LotteryTicket,
    *,
    include: Layers = None,
    exclude: Layers = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> Tickets:
    """Find winning tickets: L + 1 trainings with a pruning and a rewinding between two of them. See `LotteryTicket`.

    Args:
        model: at its initial weights; in the end it is the last round's trained network, a plain model with exact zeros.
        train: `train(model, sparse, training)`; see `Train`. With k = method.rewind_to > 0 the dense training is asked for
            in two parts, steps 0 to k and k to the end.
        method: its sparsity, rounds, rewinding, allocation, pattern. `rewind_to` is a number of steps here.
        include, exclude: which layers, as in `rarefy.sparsify`.
        seed: every training gets its own, derived from this one and its round.
        folder: where the state after every training is written, whole or not at all. The same call continues from there,
            and ends bit for bit like one that was never stopped (the model may hold anything then).

    Raises:
        OptionError: a control (`retrain` does those), or a `rewind_to` that is a fraction.
        StateError: the folder holds another search.

    Example:
        >>> import torch, rarefy
        >>> from rarefy.search import lottery_ticket
        >>> x, y = torch.randn(64, 10), torch.randint(3, (64,))
        >>> def train(model, sparse, training):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     sparse.follow(optimizer)
        ...     for step in range(training.start, training.stop or 20):
        ...         loss = torch.nn.functional.cross_entropy(model(x), y)
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...     return {"loss": loss.item()}
        >>> model = torch.nn.Sequential(torch.nn.Linear(10, 50), torch.nn.ReLU(), torch.nn.Linear(50, 3))
        >>> found = lottery_ticket(model, train, rarefy.methods.LotteryTicket(sparsity=0.488, rounds=3, rewind_to=2))
        >>> [round(ticket.sparsity, 2) for ticket in found.rounds], found.trainings
        ([0.0, 0.2, 0.36, 0.49], 4)
    """
    if method.ticket != "winning":
        raise OptionError(f"ticket={method.ticket!r}: find the winning ticket, then call retrain() for its controls.")
    if isinstance(method.rewind_to, float) and method.rewind_to:
        raise OptionError(f"rewind_to={method.rewind_to}: give steps here, the length of a training is not known.")
    start = int(method.rewind_to)
    parts: list[tuple[int, int, int | None]] = [(0, 0, None)]
    if method.rewind == "weights" and start:
        parts = [(0, 0, start), (0, start, None)]
    parts += [(r, 0 if method.rewind == "none" else start, None) for r in range(1, method.prunings + 1)]

    home = None if folder is None else Path(folder) / "tickets.pt"
    same = {"options": {k: plain(v) for k, v in method.options().items()}, "seed": seed}
    saved = None if home is None else read(home, same)
    if saved is not None:
        model.load_state_dict(saved["model"])
    sparse = rarefy.sparsify(
        model,
        _ByHand(**method.options()),
        include=include,
        exclude=exclude,
        seed=derive(seed, "mask"),
        state=None if saved is None else saved["sparse"],
    )
    done = 0 if saved is None else saved["done"]
    rounds: list[dict[str, Any]] = [] if saved is None else saved["rounds"]
    for number, (round, begin, stop) in list(enumerate(parts))[done:]:
        training = Training(
            round, method.prunings, sparse.sparsity, begin, stop, method.rewind, derive(seed, f"round {number}")
        )
        torch.manual_seed(training.seed)
        result = dict(train(model, sparse, training) or {})
        if stop is not None:
            method.remember(sparse)
        else:
            rounds.append({"sparsity": sparse.sparsity, "masks": packed_masks(sparse.masks()), "result": result})
            if round < method.prunings:
                method.next_round(sparse, round + 1)
        sparse.follow([])  # the training and its optimizer are over
        if home is not None:
            state = {"done": number + 1, "rounds": rounds, "model": model.state_dict(), "sparse": sparse.state_dict()}
            write(home, {**same, **state})
    sparse.finalize()
    tickets = [Ticket(r, e["sparsity"], unpacked_masks(e["masks"]), e["result"]) for r, e in enumerate(rounds)]
    return Tickets(tickets, sparse.memory.get("rewound"))


def retrain(
    model: nn.Module,
    train: Train,
    masks: Mapping[str, Tensor],
    *,
    weights: Mapping[str, Tensor] | None = None,
    start: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a model once on given masks: a ticket again, or one of its controls. Returns what `train` returned.

    A control that a winning ticket must beat: other weights on the same masks (a newly built `model`), or the ticket's
    weights (`weights=found.rewound`) on `shuffled` masks. The model ends as a plain one with exact zeros.

    Args:
        weights: values by name as in `Tickets.rewound`, put into the model first; None: it stays as it is.
        start: the step of a whole training to begin at, as the ticket's.
        seed: of the training.
    """
    if weights is not None:
        known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        model.load_state_dict({**model.state_dict(), **{n: w for n, w in weights.items() if n in known}})
    sparse = hold(model, masks)
    training = Training(1, 1, sparse.sparsity, start, None, "weights", derive(seed, "retrain"))
    torch.manual_seed(training.seed)
    try:
        return dict(train(model, sparse, training) or {})
    finally:
        sparse.finalize()


def shuffled(masks: Mapping[str, Tensor], seed: int = 0, within: str = "layers") -> dict[str, Tensor]:
    """Return masks with as many kept weights at random places: the control that keeps the sparsity and no structure.

    Args:
        within: "layers" keeps each layer's count; "all" shuffles over all layers together.
    """
    generator = torch.Generator().manual_seed(derive(seed, "shuffle"))
    if within not in ("layers", "all"):
        raise OptionError(f"within={within!r} must be 'layers' or 'all'.")
    parts = [[name] for name in masks] if within == "layers" else [list(masks)]
    result: dict[str, Tensor] = {}
    for names in parts:
        flat = torch.cat([masks[name].reshape(-1) for name in names])
        flat = flat[torch.randperm(flat.numel(), generator=generator).to(flat.device)]
        for name, part in zip(names, flat.split([masks[name].numel() for name in names]), strict=True):
            result[name] = part.view(masks[name].shape)
    return {name: result[name] for name in masks}
