"""One run from its configuration to its folder: train, resume, measure."""

from __future__ import annotations

import logging
import math
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rarefy
from rarefy.engine import Sparsifier
from rarefy.errors import ConfigError, RarefyError, StateError
from rarefy.metrics import PeakMemory
from rarefy.training import account
from rarefy.training.config import RunConfig
from rarefy.training.evaluate import evaluate
from rarefy.training.folder import Metrics, RunFolder, environment, write_json
from rarefy.training.inputs import Inputs
from rarefy.training.robustness import Robustness
from rarefy.training.seeds import derive
from rarefy.training.signals import Interrupted, Stop
from rarefy.training.stopwatch import Time
from rarefy.training.task import NoProfiler, Report, SparsityCallback, Task, Watch, pl

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def train(
    config: RunConfig,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    threads: int | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Train one network as `config` says and write its run folder; returns what result.json holds.

    Args:
        config: what to do; see `RunConfig`.
        folder: the run folder; default `config.out`, else runs/<name>.
        resume: continue from the folder's checkpoint (from the start where there is none): the end is bit for bit that
            of a run that was never stopped.
        force: replace a run that is there already.
        threads: torch threads; default `config.threads`, else as many as torch has.
        report: called now and then with (step, steps, latest numbers).

    Raises:
        Interrupted: SIGINT or SIGTERM came; the folder holds a resumable checkpoint and status "interrupted".
        RarefyError: the configuration cannot be run, or training failed; result.json then has status "failed".
        ConfigError: the folder holds another run.
    """
    home = RunFolder(folder or config.out or Path("runs") / config.run_name())
    if resume:
        if home.exists() and home.read_config().identity() != config.identity():
            raise ConfigError(
                f"{home.path} was started with another configuration: it can only be resumed with its own"
            )
    elif home.exists() and not force:
        if home.status() == "finished":
            raise ConfigError(f"{home.path} already holds a finished run: choose another name, or ask for --force")
        if home.status() != "failed" and home.checkpoint_file.exists():
            raise ConfigError(f"{home.path} holds an unfinished run: go on with --resume, or start again with --force")
    before = torch.get_num_threads()
    with Stop() as stop, PeakMemory() as memory, _quiet():
        try:
            torch.set_num_threads(threads or config.threads or before)
            if not resume:
                home.start_afresh()
            home.write_config(config)
            write_json(home.environment_file, environment(torch.get_num_threads()))
            run = _Run(config, home, stop, report)
            result = run.go(resume)
        except (KeyboardInterrupt, SystemExit) as error:
            home.write_result(_ended(config, "interrupted", "stopped from outside; resume it to go on"))
            raise Interrupted(f"{home.path} was stopped") from error
        except Exception as error:
            said = str(error) if isinstance(error, RarefyError) else "".join(traceback.format_exception(error))
            home.write_result(_ended(config, "failed", said or type(error).__name__))
            raise
        finally:
            torch.set_num_threads(before)
    result["peak_memory_bytes"] = memory.cuda_bytes or memory.bytes
    home.write_result(result)
    return result


class _Run:
    """The parts of one run, built in the order that its seeds ask for."""

    def __init__(self, config: RunConfig, home: RunFolder, stop: Stop, report: Report | None) -> None:
        self.config, self.home, self.stop, self.report = config, home, stop, report
        self.method = config.build_method()
        self.device = _device(config.device)
        self.inputs = Inputs(config, self.device)
        self.robustness = Robustness(config, self.inputs, self.device)
        self.net = self.method.model(self._build, self.inputs.example)
        batches = math.ceil(len(self.inputs.train) / config.accumulate)
        epochs, steps = config.length()
        self.steps = steps if steps is not None else batches * (epochs or 0)
        self.epochs = math.ceil(self.steps / batches)
        torch.manual_seed(derive(config.seed, "torch"))

    def _build(self, width: float) -> nn.Module:
        torch.manual_seed(derive(self.config.seed, "init"))
        return self.inputs.build(self.config.width * width)

    def go(self, resume: bool) -> dict[str, Any]:
        config, home = self.config, self.home
        checkpoint = home.checkpoint_file if resume and home.checkpoint_file.exists() else None
        state = None if checkpoint is None else _read(checkpoint)
        metrics = Metrics(home.metrics_file, 0 if state is None else state["callbacks"]["Watch"]["metrics_bytes"])
        try:
            if state is not None and state["global_step"] >= self.steps:
                sparse, took = self._restore(state), Time.of(state["callbacks"]["Watch"])
            else:
                sparse, took = self._fit(metrics, checkpoint)
            final = evaluate(self.net.to(self.device), self.inputs.test, device=self.device, autocast=self._autocast())
            metrics.write({"kind": "eval", "step": self.steps, "epoch": self.epochs, "split": "test", **final})
        finally:
            metrics.close()
        evaluations = self.robustness(self.net)
        self.net.to("cpu")
        account.save_masks(home.masks_file, sparse.masks())
        with torch.random.fork_rng(devices=[]):
            full = self._build(1.0)
        samples = self.inputs.samples / max(1, math.ceil(len(self.inputs.train) / config.accumulate))
        counted = account.count(self.net, full, sparse, self.inputs.example, samples, self.steps)
        return {
            **_ended(config, "finished", None),
            "dataset": self.inputs.name,
            "dataset_note": self.inputs.note,
            **final,
            "evaluations": evaluations,
            "epochs": self.epochs,
            "steps": self.steps,
            **counted,
            **asdict(took),
            "peak_memory_bytes": 0,
            "masks": home.masks_file.name,
        }

    def _fit(self, metrics: Metrics, checkpoint: Path | None) -> tuple[Sparsifier, Time]:
        config = self.config
        sparsity = SparsityCallback(
            self.method,
            submodule="net",
            include=config.include,
            exclude=config.exclude,
            calibration=self.inputs.calibration(self.method.keeps_calibration)
            if self.method.needs_calibration
            else None,
            total_steps=self.steps,
            seed=derive(config.seed, "mask"),
        )
        watch = Watch(
            config,
            self.steps,
            self.inputs.train,
            metrics,
            self.home.checkpoint_file,
            sparsity,
            self._evaluate,
            self.stop,
            self.report,
        )
        trainer = pl.Trainer(
            max_epochs=self.epochs,
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            precision=PRECISIONS[config.precision],
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.gradient_clip,
            callbacks=[sparsity, watch],
            default_root_dir=str(self.home.path),
            profiler=NoProfiler(),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            inference_mode=False,
        )
        task = Task(self.net, config, self.steps)
        trainer.fit(task, self.inputs.train, ckpt_path=checkpoint, weights_only=True)
        if sparsity.sparse is None:
            raise StateError("training ended before it began")
        return sparsity.sparse, watch.time_at_end

    def _evaluate(self) -> dict[str, Any]:
        split, batches = ("val", self.inputs.val) if self.inputs.val is not None else ("test", self.inputs.test)
        return {"split": split, **evaluate(self.net, batches, device=self.device)}

    def _autocast(self) -> Any:
        if self.config.precision == "32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.config.precision == "bf16" else torch.float16)

    def _restore(self, state: dict[str, Any]) -> Sparsifier:
        """Rebuild the end of training from a checkpoint that was written there: only the measuring was cut off."""
        weights = {k.removeprefix("net."): v for k, v in state["state_dict"].items()}
        self.net.load_state_dict(weights)
        sparse = rarefy.sparsify(
            self.net,
            self.method,
            include=self.config.include,
            exclude=self.config.exclude,
            total_steps=self.steps,
            seed=derive(self.config.seed, "mask"),
            state=state["callbacks"]["SparsityCallback"]["sparsifier"],
        )
        sparse.finalize()
        return sparse


def _read(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running anything that it may hold."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state["callbacks"]["Watch"]["metrics_bytes"], state["global_step"]
    except Exception as error:
        raise StateError(f"{path} cannot be read as a checkpoint of a run: {str(error).splitlines()[0]}") from error
    return state


def _device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device: use device auto or cpu")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def _ended(config: RunConfig, status: str, error: str | None) -> dict[str, Any]:
    return {
        "status": status,
        "error": error,
        "method": config.method,
        "label": config.shown(),
        "sparsity_asked": config.sparsity,
        "seed": config.seed,
        "dataset": config.data,
        "model": config.model,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's notes and tips off the terminal; warnings of rarefy itself stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning.*")
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
