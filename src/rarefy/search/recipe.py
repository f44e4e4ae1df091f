"""A run's configuration as the trainings that searches ask for; picklable, so that worker processes can do them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy import data, models
from rarefy.data import Batches, TextBatches
from rarefy.engine import Sparsifier
from rarefy.errors import ConfigError
from rarefy.schedules import retraining
from rarefy.search.cycles import Member
from rarefy.search.tickets import Training
from rarefy.training.config import RunConfig
from rarefy.training.evaluate import evaluate
from rarefy.training.inputs import Inputs
from rarefy.training.seeds import derive

CALIBRATION_FRACTION = 0.2  # of the training batches, as the soups' paper recalibrates


@dataclass(frozen=True)
class Recipe:
    """Plain float32 trainings on the CPU as a `RunConfig` describes them: data, network, optimizer, schedule, length.

    Attributes:
        config: of the dense training.
        retrain_steps: length of a retraining; None: the dense training's.
        schedule: of the learning rate of a retraining, see `rarefy.schedules.retraining`.
        published: name of the weights that the network begins with (a key of `rarefy.models.PUBLISHED`), with inputs prepared
            as they expect; None: initial weights of the configuration's network.
    """

    config: RunConfig
    retrain_steps: int | None = None
    schedule: str = "llr"
    published: str | None = None

    def inputs(self) -> Inputs:
        return _inputs(self.config.model_dump_json(), self.published)

    def batches(self, seed: int) -> Batches | TextBatches:
        """Return the training loader with the order of one seed; the validation split stays the configuration's."""
        inputs, config = self.inputs(), self.config
        augment = "default" if config.augment else None
        return data.train_batches(inputs.bundle, config.batch_size, seed, augment=augment)

    def search_set(self, samples: int) -> tuple[Tensor, Tensor]:
        """Return the first training samples as one batch, not augmented."""
        bundle = self.inputs().bundle
        count = min(samples, len(bundle.train_x))
        x, y = bundle.train_x[:count], bundle.train_y[:count]
        return next(iter(Batches(x, y, count, shuffle=False, mean=bundle.mean, std=bundle.std)))

    def calibration(self) -> list[Tensor]:
        """Return inputs of a fifth of the training batches, in fixed order, for batch norms: augmented as they were trained on.

        Images that were not cropped have other statistics: the published ResNet-20 loses 3 points with theirs.
        """
        inputs, config, bundle = self.inputs(), self.config, self.inputs().bundle
        augment = bundle.augment if config.augment else None
        seed = derive(config.seed, "calibration")
        loader = Batches(
            bundle.train_x, bundle.train_y, config.batch_size, seed, False, augment, mean=bundle.mean, std=bundle.std
        )
        wanted = math.ceil(CALIBRATION_FRACTION * len(inputs.train))
        return [x for (x, _), _ in zip(loader, range(wanted), strict=False)]

    @property
    def steps(self) -> int:
        """Optimizer steps of a whole training."""
        epochs, steps = self.config.length()
        return steps if steps is not None else len(self.inputs().train) * (epochs or 0)

    def rates(self) -> list[float]:
        """Return the learning rate of every step of the dense training."""
        schedule, lr = self.config.lr_schedule, self.config.optimizer.lr
        return [lr * schedule.factor(step, self.steps) for step in range(self.steps)]

    # --- what searches call -----------------------------------------------------------------------------------------

    def build(self, seed: int) -> nn.Module:
        """Build the network at its initial weights, or with the published ones."""
        torch.manual_seed(seed)
        if self.published is not None:
            return models.load_published(self.published)
        return self.inputs().build(self.config.width)

    def train(self, model: nn.Module, sparse: Sparsifier | None, seed: int) -> dict[str, Any]:
        """Train from the start to the end, scored on the test set after every epoch."""
        curve: list[float] = []

        def score() -> None:
            curve.append(self.score(model))

        loss = self.fit(model, sparse, seed, self.rates(), each_epoch=score)
        if not curve or self.steps % len(self.inputs().train):
            score()
        return {"score": curve[-1], "curve": curve, "loss": loss}

    def train_round(self, model: nn.Module, sparse: Sparsifier, training: Training) -> dict[str, Any]:
        """One training of a lottery-ticket search; all rounds see the same order of the data, from the same step on."""
        rates = self.rates()
        if training.rewind == "none" and training.round:
            rates = [rates[-1]] * len(rates)
        loss = self.fit(model, sparse, self.config.seed, rates, training.start, training.stop)
        return {"loss": loss, "score": self.score(model)}

    def retrain(self, model: nn.Module, sparse: Sparsifier, member: Member) -> dict[str, Any]:
        """One member of a soup: its own order of the data, its own `weight_decay`, `steps` or `schedule` where given."""
        options = dict(member.options)
        steps = int(options.pop("steps", self.retrain_steps or self.steps))
        schedule = str(options.pop("schedule", self.schedule))
        rate = retraining(
            schedule, self.rates(), steps, warm_up=self.config.lr_schedule.warmup_steps,
            distance=member.distance, fraction=member.fraction,
        )  # fmt: skip
        return {"loss": self.fit(model, sparse, member.seed, [rate(t) for t in range(steps)], options=options)}

    def fit(
        self,
        model: nn.Module,
        sparse: Sparsifier | None,
        seed: int,
        rates: Sequence[float],
        start: int = 0,
        stop: int | None = None,
        *,
        options: dict[str, Any] | None = None,
        each_epoch: Callable[[], None] | None = None,
    ) -> float:
        """Train steps start ... stop with these learning rates, from that place in the data on; return the mean loss."""
        given = self.config.optimizer
        try:
            optimizer = given.cls()(model.parameters(), **{**given.options(), **(options or {})})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"torch.optim.{given.cls().__name__} cannot be built as asked: {error}") from error
        if sparse is not None:
            sparse.follow(optimizer)
        loader = self.batches(seed)
        epoch, batch = divmod(start, len(loader))
        loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "batch": batch})
        step, end, total = start, len(rates) if stop is None else stop, torch.zeros((), dtype=torch.float64)
        smoothing, clip = self.config.label_smoothing, self.config.gradient_clip
        model.train()
        while step < end:
            for x, y in loader:
                for group in optimizer.param_groups:
                    group["lr"] = rates[step]
                out = model(x)
                loss = nn.functional.cross_entropy(out.flatten(0, -2), y.flatten(), label_smoothing=smoothing)
                loss.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach()
                step += 1
                if step == end:
                    break
            if each_epoch is not None and step % len(loader) == 0:
                each_epoch()
                model.train()
        return float(total) / max(1, end - start)

    def score(self, model: nn.Module) -> float:
        """Return the accuracy on the test set."""
        return evaluate(model, self.inputs().test)["accuracy"]

    def validate(self, model: nn.Module) -> float:
        """Return the accuracy on the validation part."""
        held = self.inputs().val
        if held is None:
            raise ConfigError("nothing is held out for validation: set validation, for example 0.1")
        return evaluate(model, held)["accuracy"]


@functools.lru_cache(maxsize=4)
def _inputs(config: str, published: str | None) -> Inputs:
    if published is None:
        return Inputs(RunConfig.model_validate_json(config))
    normalise = models.published_normalisation(published)
    return Inputs(RunConfig.model_validate_json(config), normalise=normalise)
