"""The Lightning side of a run: the module that is trained, and the callback that logs, saves and stops."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from rarefy.errors import ConfigError, RarefyError
from rarefy.training._needs import missing
from rarefy.training.callback import SparsityCallback
from rarefy.training.config import RunConfig
from rarefy.training.folder import Metrics
from rarefy.training.signals import Interrupted, Stop
from rarefy.training.stopwatch import Time

try:
    import lightning.pytorch as pl
    from lightning.pytorch.profilers import PassThroughProfiler
except ImportError as error:
    raise missing("lightning", "train") from error

Report = Callable[[int, int, dict[str, float]], None]
"""Called now and then with (step, steps in all, the latest numbers)."""

LOGGED_POINTS = 100  # training-loss lines of a run, about
REPORT_SECONDS = 0.2


class Resumable(Protocol):
    """A loader that can name its next batch, and go on there."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class TrainingFailed(RarefyError):
    """The training itself went wrong, for example its loss is not a number any more."""


class Task(pl.LightningModule):
    """Classification by cross entropy with one optimizer and one learning-rate schedule."""

    def __init__(self, net: nn.Module, config: RunConfig, total_steps: int) -> None:
        super().__init__()
        self.net = net
        self.config = config
        self.method = config.build_method()
        self.total_steps = total_steps
        self.loss_sum = torch.zeros((), dtype=torch.float64)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; Lightning's note of the current hook (forty a step) without nn.Module's bookkeeping."""
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        x, y = batch
        loss = cross_entropy(self.net(x), y, self.config.label_smoothing)
        self.loss_sum += loss.detach()
        return loss

    def on_train_start(self) -> None:
        """Keep the running loss beside the parameters."""
        self.loss_sum = self.loss_sum.to(self.device)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule, stepped after every optimizer step."""
        given = self.config.optimizer
        try:
            optimizer = given.cls()(self.net.parameters(), **given.options())
        except (TypeError, ValueError) as error:
            raise ConfigError(f"torch.optim.{given.cls().__name__} cannot be built as asked: {error}") from error
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.lr_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_factor(self, step: int) -> float:
        """Return the factor on the learning rate for the 0-based optimizer step, where the method says that it stands."""
        return self.config.lr_schedule.factor(*self.method.lr_step(step, self.total_steps))

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients."""
        optimizer.zero_grad(set_to_none=True)


class NoProfiler(PassThroughProfiler):
    """Times nothing, and takes no time: Lightning asks its profiler sixty times a step."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        """Return a block that does nothing."""
        return self._nothing


class Watch(pl.Callback):
    """Logs losses and topology, evaluates at ends of epochs, writes checkpoints, and stops when asked to.

    Everything that a resume needs beside weights, optimizer and sparsifier is in its state: random generators, the
    length of metrics.jsonl, the running loss and the time so far.
    """

    def __init__(
        self,
        config: RunConfig,
        total_steps: int,
        loader: Resumable,
        metrics: Metrics,
        checkpoint: Path,
        sparsity: SparsityCallback,
        evaluate: Callable[[], dict[str, Any]],
        stop: Stop,
        report: Report | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.total_steps = total_steps
        self.loader = loader
        self.metrics = metrics
        self.checkpoint = checkpoint
        self.sparsity = sparsity
        self.evaluate = evaluate
        self.stop = stop
        self.report = report
        self.latest: dict[str, float] = {}
        self.time_before = self.time_at_end = Time(0.0, 0.0)
        self._every = max(1, total_steps // LOGGED_POINTS)
        self._step = 0
        self._batches = 0  # in the running loss
        self._events = 0  # written
        self._evaluated = -1
        self._restored: dict[str, Any] | None = None
        self._began = Time.now()
        self._saved_at = self._reported_at = self._began.seconds

    # --- the hooks, in their order ----------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue the random streams where the checkpoint left them."""
        self._began = Time.now()
        self._saved_at = self._began.seconds
        self._step = trainer.global_step
        state = self._restored
        if state is not None:
            _running(pl_module).copy_(state["loss_sum"])
            self._batches, self._evaluated = state["batches"], state["evaluated"]
            # Lightning restores a loader in mid-epoch only; at the end of an epoch it would repeat the first order.
            self.loader.load_state_dict(state["loader"])
            self._events = len(self.sparsity.sparse.events) if self.sparsity.sparse is not None else 0
            torch.set_rng_state(state["cpu_generator"])
            if state["cuda_generator"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda_generator"], pl_module.device)
            self._restored = None
        self.stop.catch()  # Lightning has put its own handlers there
        self.stop.gentle = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log and stop, only after whole optimizer steps."""
        self._batches += 1
        step = trainer.global_step
        if step == self._step:  # gradients are still being accumulated
            return
        self._step = step
        if step % self._every == 0 or step == self.total_steps:
            self._log(trainer, pl_module)
        if self.report is not None and time.perf_counter() - self._reported_at > REPORT_SECONDS:
            self._tell()
        if step >= self.total_steps:
            trainer.should_stop = True  # not max_steps: with it Lightning resumes inexactly at the end of an epoch
        if self.stop.asked and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and step < self.total_steps:
            self.save(trainer)
            raise Interrupted("stopped while training")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate, then save if it is time."""
        epoch = trainer.current_epoch + 1
        every = self.config.eval_every
        last = self._step >= self.total_steps
        if every and epoch % every == 0 and not last and self._evaluated != self._step:
            self._evaluated = self._step
            found = self.evaluate()
            self.latest.update({k: found[k] for k in ("accuracy",)})
            self._topology()
            self.metrics.write({"kind": "eval", "step": self._step, "epoch": epoch, **found})
        if last:
            return
        if self.stop.asked or time.perf_counter() - self._saved_at > self.config.checkpoint_seconds:
            self.save(trainer)
            if self.stop.asked:
                raise Interrupted("stopped between epochs")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the last checkpoint, and from here on be stopped at once."""
        self.save(trainer)
        self.stop.gentle = False
        self.time_at_end = self.time()
        if self.report is not None:
            self._tell()

    # --- what they do -----------------------------------------------------------------------------------------------

    def time(self) -> Time:
        """Return the time that training took so far, over all resumes."""
        return self.time_before + (Time.now() - self._began)

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint, whole or not at all."""
        self._topology()
        temporary = self.checkpoint.with_name(f".{self.checkpoint.name}.{os.getpid()}.tmp")
        try:
            trainer.save_checkpoint(temporary)
            os.replace(temporary, self.checkpoint)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._saved_at = time.perf_counter()

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        loss = float(_running(module)) / self._batches
        _running(module).zero_()
        self._batches = 0
        self._topology()
        assert isinstance(module, Task)
        lr = self.config.optimizer.lr * module.lr_factor(self._step - 1)
        epoch = trainer.current_epoch + 1
        line = {
            "kind": "train",
            "step": self._step,
            "epoch": epoch,
            "loss": loss,
            "lr": lr,
            "seconds": self.time().seconds,
        }
        if (sparse := self.sparsity.sparse) is not None and sparse.has_penalty:
            line["penalty"] = sparse.penalty()
        self.metrics.write(line)
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the training loss is {loss} at step {self._step}: try a lower optimizer.lr (now "
                f"{self.config.optimizer.lr:g}), gradient_clip, or lr_schedule.warmup_steps"
            )
        self.latest["loss"] = loss

    def _topology(self) -> None:
        sparse = self.sparsity.sparse
        if sparse is not None and len(sparse.events) > self._events:
            new = sparse.events[self._events :]
            self._events = len(sparse.events)
            self.metrics.write(*({"kind": "topology", **event._asdict()} for event in new))

    def _tell(self) -> None:
        self._reported_at = time.perf_counter()
        if self.report is not None:
            self.report(self._step, self.total_steps, dict(self.latest))

    # --- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what else an exact resume needs; tensors and plain values only."""
        return {
            "cpu_generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
            "loader": self.loader.state_dict(),
            "metrics_bytes": self.metrics.length(),
            "batches": self._batches,
            "evaluated": self._evaluated,
            **asdict(self.time()),
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the running loss, which the module holds."""
        checkpoint["callbacks"][self.state_key]["loss_sum"] = _running(pl_module).detach().cpu().clone()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state; it is applied when training starts."""
        self._restored = state_dict
        self.time_before = Time.of(state_dict)


def _running(module: pl.LightningModule) -> Tensor:
    assert isinstance(module, Task)
    return module.loss_sum


def cross_entropy(outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy over all positions; outputs [..., classes], labels [...]."""
    flat = outputs.flatten(0, -2).float()
    return functional.cross_entropy(flat, labels.flatten(), label_smoothing=smoothing)
