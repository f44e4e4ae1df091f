"""Sparse training inside the Hugging Face Trainer: one callback."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import rarefy
from rarefy._files import atomic_write
from rarefy.engine import Loss, Method, Sparsifier
from rarefy.errors import StateError
from rarefy.nn.reparametrisation import reparametrised
from rarefy.training._needs import missing

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise missing("transformers", "hf") from error

STATE_FILE = "sparsifier.pt"
TRAINED = "trained"  # beside the sparsifier's own state in that file
PER_PARAMETER = ("params", "param_names")  # lists of an optimizer's group with an entry for each parameter


class HFSparsityCallback(TrainerCallback):
    """Makes the model sparse when the Hugging Face Trainer starts, keeps it so, and is saved with each checkpoint.

        trainer = transformers.Trainer(model, args, callbacks=[HFSparsityCallback("rigl", sparsity=0.9, every=50)])
        trainer.train()                                # or trainer.train(resume_from_checkpoint=True)

    The sparsifier's state lies beside the rest of a checkpoint as `sparsifier.pt` (read with `weights_only=True`).
    Schedules that are fractions of the run count in `state.max_steps`.
    Where a method computes the weights from what it trains (`movement`, `trainable-threshold`), that file holds what is
    trained too, and the checkpoint's optimizer that of a plain model: this Trainer restores model and optimizer before a
    callback can prepare them, so they are filled up afterwards. It warns then of weights that it does not know.

    Args:
        method: a method's name or a `rarefy.engine.Method`.
        sparsity: fraction of zeros in [0, 1).
        include, exclude: which layers, as in `rarefy.sparsify`; embeddings and heads are often left out by name.
        calibration, loss: batches and their loss, for methods that look at data before training (SNIP).
        seed: of the sparsifier's own random choices.
        finalize: leave a plain model, free of hooks, when training ends.
        options: the method's own options.

    Attributes:
        sparse: the `Sparsifier`, from the start of training on; None before.

    Raises StateError when training resumes from a checkpoint that was written without this callback.
    """

    def __init__(
        self,
        method: str | Method,
        *,
        sparsity: float | None = None,
        include: Any = None,
        exclude: Any = None,
        calibration: Iterable[Any] | None = None,
        loss: Loss | None = None,
        seed: int = 0,
        finalize: bool = True,
        **options: Any,
    ) -> None:
        self.method = method
        self.sparsity = sparsity
        self.include = include
        self.exclude = exclude
        self.calibration = calibration
        self.loss = loss
        self.seed = seed
        self.finalize = finalize
        self.options: dict[str, Any] = options
        self.sparse: Sparsifier | None = None
        self._optimizer: Optimizer | None = None
        self._saving: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the model sparse; on a resume, with the masks of the checkpoint at step `state.global_step`."""
        model: nn.Module = kwargs["model"]
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper steps the one inside
        saved = _saved_state(args, state) if state.global_step > 0 else None
        trained = None if saved is None else saved.pop(TRAINED, None)
        if self.sparse is not None:  # trained before with this callback: that is over
            self.sparse.detach()
            self._leave_optimizer()
        options = self.options if self.sparsity is None else {"sparsity": self.sparsity, **self.options}
        self.sparse = rarefy.sparsify(
            model,
            self.method,
            optimizer=optimizer,
            include=self.include,
            exclude=self.exclude,
            calibration=self.calibration,
            loss=self.loss,
            total_steps=state.max_steps if state.max_steps > 0 else None,
            seed=self.seed,
            state=saved,  # weights and optimizer are restored by now
            **options,
        )
        if trained is not None:
            _put_back(self.sparse, optimizer, trained)
        self._optimizer = optimizer
        if any(layer.extras for layer in self.sparse.layers.values()):
            self._saving = optimizer.register_state_dict_post_hook(partial(_without_extras, self.sparse))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the sparsifier's state beside the checkpoint that was just saved."""
        if self.sparse is not None and state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                assert self._optimizer is not None
                trained = _trained(self.sparse, self._optimizer)
                with atomic_write(folder / STATE_FILE) as file:
                    torch.save({**self.sparse.state_dict(), **({TRAINED: trained} if trained["weights"] else {})}, file)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the sparsity to what the Trainer logs."""
        if self.sparse is not None and logs is not None:
            logs["sparsity"] = self.sparse.sparsity
            if state.log_history:  # the Trainer has already copied its logs there
                state.log_history[-1]["sparsity"] = self.sparse.sparsity

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave a plain model with exact zeros."""
        if self.sparse is not None and self.finalize:
            self.sparse.finalize()
            self._leave_optimizer()

    def _leave_optimizer(self) -> None:
        if self._saving is not None:
            self._saving.remove()
        self._saving = None


def _trained(sparse: Sparsifier, optimizer: Optimizer) -> dict[str, Any]:
    """Return what a plain model and its optimizer cannot hold: weights that others are computed from, and state of extras."""
    layers = {name: layer for name, layer in sparse.layers.items() if reparametrised(layer.module)}
    return {
        "weights": {name: layer.trained().clone() for name, layer in layers.items()},
        "optimizer": {
            name: {extra: dict(optimizer.state.get(p, {})) for extra, p in layer.extras.items()}
            for name, layer in layers.items()
        },
    }


@torch.no_grad()
def _put_back(sparse: Sparsifier, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Fill in what `_trained` returned."""
    for name, weight in saved["weights"].items():
        layer = sparse.layers[name]
        layer.trained().copy_(weight)
        for extra, parameter in layer.extras.items():
            state = saved["optimizer"][name][extra]
            if state:
                optimizer.state[parameter] = {key: _beside(value, parameter) for key, value in state.items()}
        layer.after_load()  # masks that follow from these weights have not moved: they are as they were saved


def _beside(value: Any, parameter: nn.Parameter) -> Any:
    """Return a saved state tensor where the parameter is; a count of steps stays where it was made, as torch has it."""
    return value.to(parameter.device) if isinstance(value, Tensor) and value.shape == parameter.shape else value


def _without_extras(sparse: Sparsifier, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state dict as it would be if nothing had joined the weights."""
    extras = {id(p) for layer in sparse.layers.values() for p in layer.extras.values()}
    groups, gone = [], set()
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        stays = [id(p) not in extras for p in group["params"]]
        gone |= {index for index, here in zip(saved["params"], stays, strict=True) if not here}
        groups.append({**saved, **{key: list(compress(saved[key], stays)) for key in PER_PARAMETER if key in saved}})
    kept = {index: entry for index, entry in state["state"].items() if index not in gone}
    return {**state, "state": kept, "param_groups": groups}


def _saved_state(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Return the state saved at this step, from the folder that training resumes from."""
    given = args.resume_from_checkpoint
    name = f"checkpoint-{state.global_step}"
    places = [Path(given)] if isinstance(given, str) else []
    places.append(Path(str(args.output_dir)) / name)
    for folder in places:
        if (folder / STATE_FILE).is_file():
            loaded: dict[str, Any] = torch.load(folder / STATE_FILE, weights_only=True, map_location="cpu")
            return loaded
    raise StateError(
        f"training resumes at step {state.global_step}, but there is no {STATE_FILE} in {places[0]}: that checkpoint "
        "was saved without HFSparsityCallback, or lies elsewhere. Keep the Trainer's output_dir, or do not resume."
    )
