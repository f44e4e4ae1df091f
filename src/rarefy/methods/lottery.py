"""Train, prune, put back, train again: iterative magnitude pruning with rewinding."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from rarefy.engine import Family, Method, Sparsifier, check_fraction
from rarefy.engine.options import check_allocation, check_count, check_pattern, check_sparsity, check_time
from rarefy.engine.rewinding import learning_rates, rewind, snapshot, start_afresh
from rarefy.engine.sharing import Rule
from rarefy.errors import OptionError
from rarefy.methods.magnitude import prune
from rarefy.patterns import Pattern
from rarefy.schedules import Clock, Time, curve

REWINDS = ("weights", "learning-rate", "none")
TICKETS = ("winning", "reinit", "shuffled")
PAPER_FRACTION = 0.2  # of what is left, pruned in a round


@dataclass(frozen=True, kw_only=True)
class LotteryTicket(Method):
    """Iterative magnitude pruning with rewinding: train, prune a part, put the rest back to where it was, train again.

    Frankle & Carbin 2019, "The Lottery Ticket Hypothesis" (arXiv 1803.03635); rewinding to an early step k > 0: Frankle,
    Dziugaite, Roy & Carbin 2020 (arXiv 1912.05671); rewinding the learning rate alone: Renda, Frankle & Carbin 2020
    (arXiv 2003.02389). One training takes T steps, w_t are all parameters and buffers after t of them, m_0 = 1:

        train densely from w_0 to w_T; remember w_k
        for round r = 1 ... L:
            m_r = the largest |w_T| within m_(r-1), a fraction 1 - s_r of all,   s_r = 1 - (1 - sparsity)^(r / L)
            weights:        w <- m_r w_k, train steps k ... T with the schedule of steps k ... T
            learning-rate:  w <- m_r w_T, train T - k steps with the schedule of steps k ... T
            none:           w <- m_r w_T, train T - k steps at the schedule's last rate (fine-tuning)

    All of it is one run: its `total_steps` are divided, T + L (T - k) = total_steps (steps that do not divide go on at the
    end of the last training), so that a comparison gives every method the same number of steps; for trainings of full
    length give it L + 1 times as many. Every training starts with fresh optimizer state (as the papers' code). Data goes on
    in new order: no two trainings see the same noise. Biases, norms and their running statistics are rewound too. Counts
    are exact, ties go to the lowest index, and a weight that was pruned does not come back; the papers' code drops all
    weights up to a threshold, ties and all.

    The learning rate is the loop's: it must stand where the training stands. `rarefy train` and `compare` do that; in your
    own loop make it a function of

        at, steps = sparse.method.lr_step(step, total_steps)     # 0-based; which step of how many

    for example in a `LambdaLR`. A rate that was not rewound with the rest is warned of. For trainings that are functions of
    their own (any loop, any data order, one process after the other) use `rarefy.search.lottery_ticket`.

    Costs one copy of the network in memory (`sparse.memory`, saved with the rest) where weights are rewound.

    Options:
        sparsity: fraction of zeros over the sparse layers in the end, in [0, 1). Default 0.9.
        rounds: L, prunings. Default: as few as prune no more than 20 % of what is left at a time (the papers' rate).
        rewind: "weights" (default), "learning-rate" or "none".
        rewind_to: k; an int is a step, a float in [0, 1) a fraction of one training. Default 0 (2019). Large networks at large
            learning rates have no tickets at 0: there k is some hundred steps (2020).
        allocation: "global" (default: one ranking over all layers), "uniform" (per layer), or any of `magnitude`.
        pattern: "unstructured" (default), "N:M", "RxC", "channel", "column", "fan-in".
        ticket: what the last training starts from. "winning" (default); or one of two controls that a ticket must beat:
            "reinit" keeps the mask and gives every layer its w_0 in random order (a new draw from the same
            initialisation, where weights are drawn alike), "shuffled" keeps w_k and shuffles the mask within each layer.

    Raises OptionError without total_steps, where they are too few, and for a control of a ticket that is not rewound;
    AllocationError and PatternError as `magnitude`.
    """

    name: ClassVar[str] = "lottery-ticket"
    family: ClassVar[Family] = "dense to sparse"
    sparsity: float = 0.9
    rounds: int | None = None
    rewind: str = "weights"
    rewind_to: Time = 0
    allocation: Rule = "global"
    pattern: str | Pattern = "unstructured"
    ticket: str = "winning"

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        check_sparsity(self.sparsity, self.pattern)
        check_allocation(self.allocation)
        check_time("rewind_to", self.rewind_to)
        if isinstance(self.rewind_to, float):
            check_fraction("rewind_to", self.rewind_to)
        if self.rounds is not None:
            check_count("rounds", self.rounds)
        for name, value, known in (("rewind", self.rewind, REWINDS), ("ticket", self.ticket, TICKETS)):
            if value not in known:
                raise OptionError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}.")
        if self.ticket != "winning" and self.rewind != "weights":
            raise OptionError(f"ticket={self.ticket!r} is a control of rewound weights: it needs rewind='weights'.")

    # --- the rounds -------------------------------------------------------------------------------------------------

    @property
    def prunings(self) -> int:
        """L, the number of prunings; there is one training more."""
        if self.rounds is not None:
            return self.rounds
        return max(1, math.ceil(math.log(1 - self.sparsity) / math.log(1 - PAPER_FRACTION) - 1e-9))

    def level(self, round: int) -> float:
        """Return s_r, the sparsity that round r trains at; 0 in round 0."""
        return curve("exponential")(round / self.prunings, 0.0, self.sparsity)

    def division(self, total_steps: int) -> Division:
        """Return how a run of that many steps is divided into trainings."""
        rounds, k = self.prunings, self.rewind_to
        if isinstance(k, float):
            length = math.floor(total_steps / (1 + rounds * (1 - k)) + 1)
            while length > 0 and length + rounds * (length - math.floor(k * length + 0.5)) > total_steps:
                length -= 1
            k = math.floor(k * length + 0.5)
        else:
            length = (total_steps + rounds * k) // (rounds + 1)
        if length <= k:
            raise OptionError(
                f"total_steps={total_steps} is too few for {rounds + 1} trainings from step {k} on: give more steps, fewer "
                "rounds, or an earlier rewind_to."
            )
        return Division(rounds, length, k)

    def lr_step(self, step: int, total_steps: int) -> tuple[int, int]:
        plan = self.division(total_steps)
        round, done = plan.where(step)
        last = plan.length - 1
        return (last if round > plan.rounds or (round > 0 and self.rewind == "none") else done), plan.length

    def next_round(self, sparse: Sparsifier, round: int) -> None:
        """Prune to the level of this round (1 to L) and put the network where its training starts."""
        prune(sparse, self.level(round), self.allocation)
        ticket = self.ticket if round == self.prunings else "winning"
        if ticket == "shuffled":
            for layer in sparse.layers.values():
                layer.rewire(layer.random(layer.counts(), sparse.generator))
        if self.rewind == "weights":
            rewind(sparse, sparse.memory["rewound"])
        if ticket == "reinit":
            for name, layer in sparse.layers.items():
                first = sparse.memory["initial"][name].reshape(-1)
                order = torch.randperm(first.numel(), generator=sparse.generator).to(first.device)
                layer.set_weight(first[order].view(layer.shape))
        start_afresh(sparse)

    # --- in a run ---------------------------------------------------------------------------------------------------

    def clock(self, total_steps: int | None) -> Clock:
        if total_steps is None:
            raise OptionError(f"{self.name} divides the run into {self.prunings + 1} trainings: pass total_steps.")
        self.division(total_steps)
        return Clock(every=1, total=total_steps)

    def initialise(self, sparse: Sparsifier) -> None:
        if self.ticket == "reinit":
            sparse.memory["initial"] = {name: layer.weight().clone() for name, layer in sparse.layers.items()}
        if self._plan(sparse).start == 0:
            self.remember(sparse)

    def remember(self, sparse: Sparsifier) -> None:
        """Take a copy of the network, to rewind to."""
        if self.rewind == "weights":
            sparse.memory["rewound"] = snapshot(sparse)

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        plan = self._plan(sparse)
        round, done = plan.where(step - 1)
        if round == 0 and done + 1 == plan.start:
            self.remember(sparse)
        if done == plan.start and self.rewind != "none":
            self._compare_rates(sparse, round)
        if done + 1 == plan.length and round < plan.rounds:
            self.next_round(sparse, round + 1)

    def _plan(self, sparse: Sparsifier) -> Division:
        assert sparse.total_steps is not None
        return self.division(sparse.total_steps)

    def _compare_rates(self, sparse: Sparsifier, round: int) -> None:
        """Warn where the first step after rewinding has another learning rate than it had in the first training."""
        now = learning_rates(sparse)
        if round == 0:
            sparse.memory["rates"] = now
        elif now != sparse.memory["rates"] and round <= self.prunings:
            warnings.warn(
                f"{self.name}: after rewinding the learning rate is {now}, and was {sparse.memory['rates']} at the same step "
                "of the first training: make the schedule a function of sparse.method.lr_step(step, total_steps).",
                stacklevel=2,
            )


class Division(NamedTuple):
    """A run divided into trainings: `rounds` prunings, trainings of `length` steps, the later ones from `start` on."""

    rounds: int
    length: int
    start: int

    def where(self, step: int) -> tuple[int, int]:
        """Return (round, steps of that training done) before the run's 0-based step; round L + 1: what did not divide."""
        if step < self.length:
            return 0, step
        rounds, done = divmod(step - self.length, self.length - self.start)
        return min(rounds, self.rounds) + 1, self.start + done
