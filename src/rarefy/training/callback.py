"""Sparse training inside anyone's Lightning code: one callback."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import rarefy
from rarefy.engine import Loss, Method, Sparsifier
from rarefy.errors import OptionError, StateError
from rarefy.nn.reparametrisation import plain_state_dict
from rarefy.training._needs import missing

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise missing("lightning", "train") from error


class SparsityCallback(pl.Callback):
    """Makes the module sparse when training starts, keeps it so, and travels with Lightning's checkpoints.

    Works with automatic optimisation (closures), manual optimisation, gradient accumulation and clipping, every
    precision, and `trainer.fit(..., ckpt_path=...)` at any step. The zeros stay in the module's own parameters: its
    forward pass, its names and its state dict do not change.

        trainer = lightning.Trainer(callbacks=[SparsityCallback("rigl", sparsity=0.9, every=100)])

    Args:
        method: a method's name or a `rarefy.engine.Method`.
        sparsity: fraction of zeros in [0, 1); None for methods without one, or when `method` already holds it.
        submodule: dotted name of the part of the module to make sparse, such as "encoder"; by default all of it.
        include, exclude: which layers, as in `rarefy.sparsify`.
        calibration, loss: batches and their loss, for methods that look at data before training (SNIP).
        total_steps: optimizer steps of the whole run; by default `trainer.estimated_stepping_batches`.
        seed: of the sparsifier's own random choices.
        finalize: leave a plain module, free of hooks, when training ends.
        options: the method's own options.

    Attributes:
        sparse: the `Sparsifier`, from the start of training on; None before.

    Logs "sparsity" at the end of every epoch where the trainer has a logger. Raises what `rarefy.sparsify` raises, at
    the start of training.
    """

    def __init__(
        self,
        method: str | Method,
        *,
        sparsity: float | None = None,
        submodule: str | None = None,
        include: Any = None,
        exclude: Any = None,
        calibration: Iterable[Any] | None = None,
        loss: Loss | None = None,
        total_steps: int | None = None,
        seed: int = 0,
        finalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.method = method
        self.sparsity = sparsity
        self.submodule = submodule
        self.include = include
        self.exclude = exclude
        self.calibration = calibration
        self.loss = loss
        self.total_steps = total_steps
        self.seed = seed
        self.finalize = finalize
        self.options: dict[str, Any] = options
        self.sparse: Sparsifier | None = None
        self._saved: dict[str, Any] | None = None

    # By now weights are restored and optimizers exist; their state is restored after this hook, into all that has joined them.
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the module sparse, or continue where the checkpoint was taken."""
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._begin(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same, under strategies that restore weights late."""
        if trainer.strategy.restore_checkpoint_after_setup:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        saved = self._saved
        if saved is None and self.sparse is not None:  # a second trainer.fit with the same callback goes on
            saved = self.sparse.state_dict()
            self.sparse.detach()
        if saved is None and trainer.ckpt_path is not None:
            raise StateError(
                f"{trainer.ckpt_path} holds no sparsifier's state: it was saved without SparsityCallback. "
                "To make a trained dense module sparse, load its weights and call trainer.fit without ckpt_path."
            )
        self.sparse = self._sparsify(trainer, pl_module, saved)
        self._saved = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the sparsity reached."""
        if self.sparse is not None and trainer.loggers:
            pl_module.log("sparsity", self.sparse.sparsity, rank_zero_only=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave a plain module with exact zeros; the state stays readable for checkpoints that are written later."""
        if self.sparse is not None and self.finalize:
            self.sparse.finalize()

    def state_dict(self) -> dict[str, Any]:
        """Return the sparsifier's state (tensors, numbers, strings); empty before training starts."""
        return {} if self.sparse is None else {"sparsifier": self.sparse.state_dict()}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save computed weights as the ones they are made from, under their plain names: the rest is in this state."""
        checkpoint["state_dict"] = plain_state_dict(pl_module, checkpoint["state_dict"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint; it is applied when training starts."""
        self._saved = state_dict.get("sparsifier")

    def _target(self, module: nn.Module) -> nn.Module:
        if self.submodule is None:
            return module
        try:
            return module.get_submodule(self.submodule)
        except AttributeError:
            names = ", ".join(name for name, _ in module.named_children()) or "none"
            raise OptionError(f"the module has no part {self.submodule!r}; its parts: {names}") from None

    def _sparsify(self, trainer: pl.Trainer, module: pl.LightningModule, state: dict[str, Any] | None) -> Sparsifier:
        steps: float | int | None = self.total_steps
        if steps is None:
            steps = trainer.estimated_stepping_batches
        total = int(steps) if steps is not None and math.isfinite(steps) and steps > 0 else None
        training = module.training
        options = self.options if self.sparsity is None else {"sparsity": self.sparsity, **self.options}
        with torch.enable_grad():  # SNIP and its kind need gradients of the calibration batches
            sparse = rarefy.sparsify(
                self._target(module),
                self.method,
                optimizer=trainer.optimizers,
                include=self.include,
                exclude=self.exclude,
                calibration=self.calibration,
                loss=self.loss,
                total_steps=total,
                seed=self.seed,
                state=state,
                **options,
            )
        module.train(training)
        return sparse
