"""What a run's `result.json` must hold, and what the report keeps of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Status = Literal["finished", "failed", "interrupted", "unfinished", "corrupt", "duplicate", "missing"]

#: How methods are ordered, and so coloured, everywhere; others follow by name.
ORDER = ("dense", "small-dense", "static", "snip", "magnitude", "gradual", "set", "rigl")

#: What a finished run cannot do without; the rest is shown as "-" where a run has not recorded it.
NEEDED = ("accuracy", "sparsity", "parameters", "parameters_dense", "epochs", "steps")

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Whole = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0.0)]


class Layer(BaseModel):
    """One sparse layer of a run: how many of its weights are kept, and its forward FLOPs for one sample."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    name: str
    shape: tuple[int, ...]
    kept: Whole
    numel: Whole
    flops: float | None = None
    flops_dense: float | None = None

    @model_validator(mode="after")
    def _counts_agree(self) -> Layer:
        if math.prod(self.shape) != self.numel or self.kept > self.numel:
            raise ValueError(f"layer {self.name!r} of shape {list(self.shape)} cannot keep {self.kept} of {self.numel}")
        return self


class Result(BaseModel):
    """The contents of `result.json`: accuracies in 0..1, memory and storage in bytes, time in seconds."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    status: Literal["finished", "failed", "interrupted"]
    error: str | None = None
    method: str
    label: str | None = None
    sparsity_asked: Share | None = None
    sparsity: Share | None = None
    seed: int
    dataset: str | None = None
    dataset_note: str | None = None
    model: str | None = None
    accuracy: Share | None = None
    loss: float | None = None
    ece: float | None = None
    evaluations: dict[str, float | None] = Field(default_factory=dict)
    epochs: Whole | None = None
    steps: Whole | None = None
    flops: Amount | None = None
    flops_dense: Amount | None = None
    training_flops: Amount | None = None
    training_flops_dense: Amount | None = None
    parameters: Whole | None = None
    parameters_dense: Whole | None = None
    storage_bytes: dict[str, int | None] = Field(default_factory=dict)
    seconds: Amount | None = None
    cpu_seconds: Amount | None = None
    peak_memory_bytes: Amount | None = None
    explored: float | None = None
    layers: tuple[Layer, ...] = ()
    masks: str | None = None

    @model_validator(mode="after")
    def _finished_is_whole(self) -> Result:
        lacking = [name for name in NEEDED if getattr(self, name) is None]
        if self.status == "finished" and lacking:
            raise ValueError(f"a finished run must give {', '.join(lacking)}")
        return self


def dense_training(runs: Iterable[Run]) -> float | None:
    """Return the FLOPs that training the dense net took among these runs; None where no dense run finished.

    What the others' training FLOPs are measured by: a run of more steps costs more, although of dense training of its own
    length it is no larger part.
    """
    found = [
        run.result.training_flops_dense
        for run in runs
        if run.finished and run.method == "dense" and run.result and run.result.training_flops_dense
    ]
    return sum(found) / len(found) if found else None


def explain(error: ValidationError) -> str:
    """Say in one line what is wrong with a `result.json`, naming at most three fields."""
    faults = []
    for fault in error.errors()[:3]:
        where = ".".join(str(part) for part in fault["loc"])
        said = str(fault["msg"]).removeprefix("Value error, ")
        faults.append(f"{where}: {said}" if where else said)
    more = error.error_count() - len(faults)
    return "; ".join(faults) + (f"; and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Curves:
    """The lines of `metrics.jsonl` by kind, each sorted by step; a step repeated after a resume counts once."""

    train_steps: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    train_loss: np.ndarray = field(default_factory=lambda: np.empty(0))
    evals: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)  # split -> (step, loss, accuracy)
    topology: dict[str, list[tuple[int, int, int, int]]] = field(default_factory=dict)  # layer -> step, -, +, kept
    bad_lines: int = 0


@dataclass(frozen=True)
class Run:
    """One run as the report sees it; `reason` says why it is not `finished`."""

    name: str
    folder: Path
    status: Status
    reason: str | None = None
    result: Result | None = None
    method: str | None = None
    label: str | None = None
    sparsity: float | None = None  # asked; None for a dense run
    seed: int | None = None
    config: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=Curves)
    notes: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the run counts in the table."""
        return self.status == "finished"

    @property
    def key(self) -> tuple[str, float | None]:
        """What the run's seeds are averaged over: its label and the sparsity asked for."""
        return (self.label or self.name, self.sparsity)


@dataclass(frozen=True)
class Comparison:
    """All runs of a folder, finished or not, and what to keep in mind when comparing them."""

    folder: Path
    runs: tuple[Run, ...]
    warnings: tuple[str, ...] = ()
    single: bool = False

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.name or str(self.folder)

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that count in the table."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def problems(self) -> tuple[Run, ...]:
        """The runs that do not count, each with its `reason`."""
        return tuple(run for run in self.runs if not run.finished)
