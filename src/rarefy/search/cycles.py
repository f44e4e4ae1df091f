"""Prune-retrain cycles whose members train side by side from one sparse parent and are averaged: sparse model soups."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import rarefy
from rarefy.engine import Sparsifier
from rarefy.engine.batch_norm import has_statistics, recalibrate
from rarefy.engine.options import check_sparsity
from rarefy.engine.sharing import Rule
from rarefy.errors import OptionError
from rarefy.methods.magnitude import prune
from rarefy.patterns import Pattern
from rarefy.schedules import curve
from rarefy.search.held import Held, Layers, hold
from rarefy.search.members import Workers, run_members
from rarefy.search.soups import average, check_same_masks, greedy, spread, with_state
from rarefy.search.stored import packed_masks, read, unpacked_masks, write
from rarefy.training.seeds import derive

SOUPS = ("uniform", "greedy")


@dataclass(frozen=True)
class Member:
    """One retraining: in which phase, which of the members, its seed, and what of its training differs from the others'.

    Attributes:
        phase: from 1 on.
        number: from 0 on.
        sparsity: fraction of zeros over the sparse layers in this phase.
        seed: its own; torch's generator is seeded with it, take it for the order of the data.
        options: as given to the search, for example {"weight_decay": 1e-3}.
        distance: ||W - W_pruned|| / ||W|| of this phase's pruning, over all parameters (for the schedule "allr").
        fraction: of the remaining weights, pruned in this phase.
    """

    phase: int
    number: int
    sparsity: float
    seed: int
    options: dict[str, Any]
    distance: float = 0.0
    fraction: float = 0.0


Retrain = Callable[[nn.Module, Sparsifier, Member], Mapping[str, Any] | None]
"""Trains the model in place with an optimizer that it makes, after `sparse.follow(optimizer)`; returns numbers to keep."""


@dataclass(frozen=True)
class Phase:
    """What became of one prune-retrain cycle.

    Attributes:
        sparsity: fraction of zeros over the sparse layers.
        masks: by parameter name, True = kept; all members' and the soup's.
        results: what each member's training returned.
        scores: each member's score after recalibration; None without `evaluate`.
        soup_score: that of the average.
        chosen: the members that were averaged.
        spread: distances and angles between the members' sparse weights, see `soups.spread`.
    """

    sparsity: float
    masks: dict[str, Tensor] = field(repr=False)
    results: list[dict[str, Any]]
    scores: list[float] | None
    soup_score: float | None
    chosen: list[int]
    spread: dict[str, float]


def sparse_model_soups(
    model: nn.Module,
    retrain: Retrain,
    *,
    sparsity: float = 0.9,
    phases: int = 3,
    members: int | Sequence[Mapping[str, Any]] = 3,
    soup: str = "uniform",
    evaluate: Callable[[nn.Module], float] | None = None,
    calibration: Iterable[Any] = (),
    allocation: Rule = "global",
    pattern: str | Pattern = "unstructured",
    include: Layers = None,
    exclude: Layers = None,
    workers: Workers | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> list[Phase]:
    """Prune a trained network in phases; in each, retrain several copies side by side and go on from their average.

    Zimmer, Spiegel & Pokutta 2024, "Sparse Model Soups" (arXiv 2306.16788), over the prune-retrain cycles of the same
    authors (arXiv 2111.00843). With p = 1 - (1 - sparsity)^(1 / phases), phase k = 1 ... phases does

        prune:      the fraction p of the remaining weights of smallest |w| (exact counts, ties by index), nested masks
        retrain:    m copies of the one pruned parent, with the same mask, each with its own seed and options
        average:    W <- sum_j lambda_j W_j over all parameters and buffers: uniform 1/m, or greedily by validation score
        recalibrate: all batch-norm statistics on training data (members too, before they are scored)

    Members share mask and basin, so their average is as sparse as they are, and costs what one of them costs. With one
    member this is iterative magnitude pruning. The soup must be compared with that, with the best member, and with one
    member that is retrained m times as long, which on easy tasks is the better use of the same work. Members whose learning
    rate has decayed to 0 on an easy task nearly coincide, and averaging gains nothing.

    For masks found by a method that trains and prunes at once (gradual pruning), call `branch` where the masks are fixed.

    Args:
        model: trained and dense; in the end it is the last soup, a plain model with exact zeros.
        retrain: `retrain(model, sparse, member)`; see `Retrain`. Worker processes import it: a function of a module, or
            a `functools.partial` of one.
        sparsity: of the last phase, in [0, 1).
        phases: prunings.
        members: how many, or one mapping of options each.
        soup: "uniform", or "greedy" (needs `evaluate`).
        evaluate: score of a model on validation data, higher = better; never the test set.
        calibration: batches of training data for the batch norms (the paper's code: a fifth of them, in fixed order); iterated
            once for every model that is recalibrated, so a list or a loader, not a generator.
        allocation, pattern, include, exclude: as in `magnitude` and `rarefy.sparsify`.
        workers: where members run; the numbers are the same anywhere.
        seed: each member's seed comes from this one, its phase and its number.
        folder: finished members and phases are kept there; the same call goes on and ends bit for bit the same.

    Returns:
        One `Phase` each.

    Raises:
        OptionError: an option out of range; "greedy" without `evaluate`; a batch norm without `calibration`.
        MemberError: a member failed.
        StateError: the folder holds another search.
    """
    check_sparsity(sparsity, pattern)
    if phases < 1:
        raise OptionError(f"phases={phases} must be at least 1.")
    given = _options(members)
    _check_soup(soup, evaluate)
    home = None if folder is None else Path(folder)
    same = {
        "sparsity": sparsity, "phases": phases, "members": given, "soup": soup, "allocation": allocation,
        "pattern": str(pattern), "seed": seed,
    }  # fmt: skip
    saved = None if home is None else read(home / "soups.pt", same)
    done: list[dict[str, Any]] = [] if saved is None else saved["done"]
    sparse = rarefy.sparsify(model, Held(pattern=pattern), include=include, exclude=exclude)
    if saved is not None:
        model.load_state_dict(saved["model"])
        for name, mask in unpacked_masks(done[-1]["masks"]).items():
            sparse.layers[name].keep(mask)
    for number in range(len(done) + 1, phases + 1):
        kept, before = sparse.nnz, _length(model)
        prune(sparse, curve("exponential")(number / phases, 0.0, sparsity), allocation)
        # what pruning took away is orthogonal to what it left
        gone = math.sqrt(max(0.0, before**2 - _length(model) ** 2)) / max(before, sys.float_info.min)
        inside = None if home is None else home / f"phase-{number}"
        phase = branch(
            model, sparse.masks(), retrain, members=given, soup=soup, evaluate=evaluate, calibration=calibration,
            workers=workers, seed=seed, folder=inside, phase=number, distance=gone, fraction=1 - sparse.nnz / kept,
        )  # fmt: skip
        done.append({**vars(phase), "masks": packed_masks(phase.masks)})
        if home is not None:
            write(home / "soups.pt", {**same, "done": done, "model": model.state_dict()})
    sparse.finalize()
    return [Phase(**{**entry, "masks": unpacked_masks(entry["masks"])}) for entry in done]


def branch(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    retrain: Retrain,
    *,
    members: int | Sequence[Mapping[str, Any]] = 3,
    soup: str = "uniform",
    evaluate: Callable[[nn.Module], float] | None = None,
    calibration: Iterable[Any] = (),
    workers: Workers | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    phase: int = 1,
    distance: float = 0.0,
    fraction: float = 0.0,
) -> Phase:
    """Retrain copies of one sparse model side by side and put their average into it: one phase, without the pruning.

    Args: as `sparse_model_soups`; `masks` by parameter name are the model's and stay every member's;
    `phase`, `distance` and `fraction` are handed on to the members.
    """
    options = _options(members)
    _check_soup(soup, evaluate)
    kept = sum(int(mask.sum()) for mask in masks.values())
    sparsity = 1 - kept / sum(mask.numel() for mask in masks.values())
    seeds = [derive(seed, f"phase {phase}/member {j}") for j in range(len(options))]
    jobs = [Member(phase, j, sparsity, seeds[j], o, distance, fraction) for j, o in enumerate(options)]
    _check_calibration(model, calibration)
    parent = with_state(model, model.state_dict())
    trained = run_members(partial(_retrain, parent, dict(masks), retrain), jobs, seeds, workers, folder)
    check_same_masks([dict(masks), *(unpacked_masks(entry["masks"]) for entry in trained)])
    states = [entry["state"] for entry in trained]

    def finished(state: Mapping[str, Tensor]) -> nn.Module:
        return recalibrate(with_state(model, state), calibration)

    scores: list[float] | None = None
    chosen = list(range(len(states)))
    if evaluate is not None:
        score = evaluate
        scores = [float(score(finished(state))) for state in states]
        if soup == "greedy":
            chosen = greedy(states, scores, lambda state: float(score(finished(state))))
    mixed = finished(average([states[j] for j in chosen]))
    model.load_state_dict(mixed.state_dict())
    return Phase(
        sparsity=sparsity,
        masks={name: mask.cpu() for name, mask in masks.items()},
        results=[entry["result"] for entry in trained],
        scores=scores,
        soup_score=None if evaluate is None else float(evaluate(mixed)),
        chosen=chosen,
        spread=spread(states, [name for name in masks if name in states[0]]),
    )


def _retrain(parent: nn.Module, masks: dict[str, Tensor], retrain: Retrain, member: Member) -> dict[str, Any]:
    """One member, in a process of its own: the model and the function are this call's copies."""
    sparse = hold(parent, masks)
    result = dict(retrain(parent, sparse, member) or {})
    for layer in sparse.layers.values():  # also where the training forgot to be followed
        layer.enforce()
    held = sparse.masks()
    sparse.finalize()
    return {"state": parent.state_dict(), "masks": packed_masks(held), "result": result}


def _options(members: int | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    options: list[dict[str, Any]] = [{}] * members if isinstance(members, int) else [dict(m) for m in members]
    if not options:
        raise OptionError("members: give at least one.")
    return options


def _length(model: nn.Module) -> float:
    """The L2 norm of all parameters taken as one vector."""
    return math.sqrt(math.fsum(float(p.detach().double().square().sum()) for p in model.parameters()))


def _check_calibration(model: nn.Module, calibration: Iterable[Any]) -> None:
    """Refuse before the members train what would fail after it."""
    if isinstance(calibration, Sized) and len(calibration) == 0 and has_statistics(model):
        raise OptionError(
            "The model has batch norms, whose statistics an average must have anew: pass calibration=batches."
        )


def _check_soup(soup: str, evaluate: object) -> None:
    if soup not in SOUPS:
        raise OptionError(f"soup={soup!r} must be 'uniform' or 'greedy'.")
    if soup == "greedy" and evaluate is None:
        raise OptionError("soup='greedy' chooses by validation score: pass evaluate=...")
