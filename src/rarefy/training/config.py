"""What one run is made of: validated, with unknown keys refused by their nearest right name."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rarefy.errors import ConfigError, RarefyError, nearest

if TYPE_CHECKING:
    from rarefy.engine import Method

Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]

#: Fields that say where and how fast a run is done, not what is done: they do not make it another run.
NOT_THE_EXPERIMENT = ("name", "out", "threads", "checkpoint_seconds", "label")


class Part(BaseModel):
    """Base of all configuration parts: no unknown keys, no silent change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class OptimizerConfig(Part):
    """An optimizer of `torch.optim` by its class name (any case), with its own options beside `lr`.

    `momentum`, `nesterov`, `weight_decay`, `betas` and so on are the arguments of that class; one that it does not have
    is refused. Default: SGD, lr 0.1, momentum 0.9 with Nesterov, weight decay 1e-4 (the MNIST flags of the RigL code).
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "sgd"
    lr: Annotated[float, Field(ge=0.0)] = 0.1

    def options(self) -> dict[str, Any]:
        """Return every option but the name, as keyword arguments of the optimizer class."""
        return {"lr": self.lr, **(self.model_extra or {})}

    def cls(self) -> type:
        """Return the optimizer class of `torch.optim`."""
        return _optimizers()[self.name.lower()]

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = _optimizers()
        if name.lower() not in known:
            raise ValueError(f"there is no optimizer {name!r} in torch.optim{nearest(name.lower(), known)}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _sgd_default(cls, given: Any) -> Any:
        if isinstance(given, dict):  # the defaults belong to SGD; another optimizer brings its own
            if str(given.get("name", "sgd")).lower() == "sgd":
                momentum = given.get("momentum", 0.9)
                given = {"momentum": momentum, "nesterov": bool(momentum), "weight_decay": 1e-4, **given}
            elif "lr" not in given and isinstance(given.get("name"), str):
                found = _optimizers().get(given["name"].lower())
                default = inspect.signature(found).parameters["lr"].default if found else inspect.Parameter.empty
                if isinstance(default, (int, float)):
                    given = {**given, "lr": float(default)}
        return given

    @model_validator(mode="after")
    def _has_these_options(self) -> OptimizerConfig:
        extra = self.model_extra or {}
        parameters = set(inspect.signature(self.cls()).parameters) - {"params"}
        for key in extra:
            if key not in parameters:
                raise ValueError(f"torch.optim.{self.cls().__name__} has no option {key!r}{nearest(key, parameters)}")
        return self


class LrSchedule(Part):
    """The learning rate over the steps of a run, as a factor on `optimizer.lr`.

    cosine: half a cosine from 1 to 0; step: times `gamma` at each of `milestones` (steps, or fractions of the run in
    (0, 1)); constant: 1. `warmup_steps`: the factor rises linearly from 1/warmup_steps to 1 before that.
    """

    name: Literal["cosine", "step", "constant"] = "cosine"
    warmup_steps: Whole = 0
    milestones: list[Annotated[float, Field(gt=0.0)]] = []
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1

    @model_validator(mode="after")
    def _milestones_fit(self) -> LrSchedule:
        if self.name == "step" and not self.milestones:
            raise ValueError("lr_schedule 'step' needs milestones, for example [0.5, 0.75]")
        if self.name != "step" and self.milestones:
            raise ValueError(f"lr_schedule {self.name!r} takes no milestones; use name: step")
        return self

    def factor(self, step: int, total: int) -> float:
        """Return the factor on the learning rate for the 0-based optimizer step `step` of `total`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "cosine":
            span = max(1, total - self.warmup_steps)
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - self.warmup_steps) / span)))
        if self.name == "step":
            marks = [m * total if m < 1 else m for m in self.milestones]
            return float(self.gamma ** sum(step >= m for m in marks))
        return 1.0


class EvaluateConfig(Part):
    """What else than accuracy, loss (the NLL) and ECE is measured at the end, on an image set (`result.json`: evaluations).

    ood: foreign images that its confidence should tell from its own: "noise" (uniform pixels), or an image set of the same
    shape; AUROC of the largest softmax probability. attacks: "fgsm", "pgd"; accuracy when no pixel (0..1) is changed by
    more than `eps` (default 8/255), in `steps` steps of 2.5 eps / steps from a random start for pgd.
    """

    ood: list[str] = []
    attacks: list[Literal["fgsm", "pgd"]] = []
    eps: Annotated[float, Field(gt=0.0, le=1.0)] = 8 / 255
    steps: Positive = 10

    @field_validator("ood", "attacks", mode="before")
    @classmethod
    def _one_or_many(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("ood")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        from rarefy import data

        known = ("noise", *data.available())
        for name in names:
            if name not in known:
                raise ValueError(f"there is no data set {name!r}{nearest(name, known)}; use one of {', '.join(known)}")
        return names


class RunConfig(Part):
    """One training run. Every field has a default, so a run is one YAML file, a few flags, or both.

    Lengths are in epochs (passes over the training part) or in optimizer steps; `sparsity` is the fraction of zeros.
    """

    name: str | None = None  # of the run folder under runs/
    out: str | None = None  # the run folder itself
    label: str | None = None  # the method's name in tables; default: method

    model: str = "lenet-300-100"
    model_options: dict[str, Any] = {}
    width: Annotated[float, Field(gt=0.0)] = 1.0

    data: str = "digits"
    data_root: str | None = None
    validation: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # fraction split off the training part
    augment: bool = False
    limit_train: Positive | None = None  # only the first so many training samples (quick runs)
    limit_test: Positive | None = None

    method: str = "dense"
    sparsity: Sparsity | None = None
    method_options: dict[str, Any] = {}
    include: list[str] | None = None
    exclude: list[str] | None = None

    epochs: Positive | None = None
    steps: Positive | None = None
    batch_size: Positive = 100
    accumulate: Positive = 1
    gradient_clip: Annotated[float, Field(gt=0.0)] | None = None  # norm
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, validate_default=True)
    lr_schedule: LrSchedule = LrSchedule()

    seed: Whole = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["32", "bf16", "16"] = "32"
    threads: Positive | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    eval_every: Whole = 1  # epochs between evaluations; 0: only at the end
    checkpoint_seconds: Annotated[float, Field(ge=0.0)] = 30.0  # least time between checkpoints at ends of epochs

    @field_validator("optimizer", mode="before")
    @classmethod
    def _optimizer_defaults(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else {} if given is None else given

    @field_validator("lr_schedule", mode="before")
    @classmethod
    def _lr_schedule_by_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_or_many(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("precision", mode="before")
    @classmethod
    def _precision_as_text(cls, given: Any) -> Any:
        return str(given) if isinstance(given, int) and not isinstance(given, bool) else given

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"give epochs or steps, not both (epochs {self.epochs}, steps {self.steps})")
        if self.method == "dense" and self.sparsity:
            raise ValueError(f"method 'dense' takes no sparsity, but sparsity is {self.sparsity}")
        if self.precision == "16" and self.device == "cpu":
            raise ValueError("precision 16 needs a GPU; on a CPU use bf16 or 32")
        return self

    def length(self) -> tuple[int | None, int | None]:
        """Return (epochs, steps), one of them None; 5 epochs where neither was given."""
        return (None, self.steps) if self.steps is not None else (self.epochs or 5, None)

    def shown(self) -> str:
        """Return the name that tables use for this run's method."""
        return self.label or self.method

    def run_name(self) -> str:
        """Return the folder name: `name`, or one made of data, model, method, sparsity and seed."""
        if self.name:
            return self.name
        level = "" if self.sparsity is None else f"-{self.sparsity:g}"
        return f"{self.data}-{self.model}-{self.shown()}{level}-s{self.seed}"

    def build_method(self) -> Method:
        """Return the method with its options; raises ConfigError where they do not fit."""
        from rarefy import methods

        level = {} if self.sparsity is None else {"sparsity": self.sparsity}
        try:
            return methods.make(self.method, **level, **self.method_options)
        except (RarefyError, TypeError) as error:
            raise ConfigError(f"method {self.method!r}: {error}") from error

    def dump(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, ready for YAML or JSON."""
        return self.model_dump(mode="json")

    @classmethod
    def identity_fields(cls) -> list[str]:
        """Return the fields that decide a run's numbers."""
        return [name for name in cls.model_fields if name not in NOT_THE_EXPERIMENT]

    def identity(self) -> str:
        """Return a digest of everything that decides the run's numbers (not its name, folder or thread count)."""
        plain = {k: v for k, v in self.dump().items() if k in self.identity_fields()}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _optimizers() -> dict[str, type]:
    import torch

    found = {}
    for name, value in vars(torch.optim).items():
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer:
            found[name.lower()] = value
    return found
