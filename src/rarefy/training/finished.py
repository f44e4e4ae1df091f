"""Networks that are trained already: by a run, or by others."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from rarefy import models
from rarefy.errors import OptionError, StateError
from rarefy.training.config import RunConfig
from rarefy.training.folder import RunFolder
from rarefy.training.inputs import Inputs


def finished_network(path: str | os.PathLike[str]) -> tuple[nn.Module, Inputs]:
    """Return a run's network with its last checkpoint's weights, in eval mode, and what the run reads.

    Raises ConfigError where `path` is no run folder, StateError where its checkpoint is missing or damaged.
    """
    home = RunFolder(Path(path))
    config = home.read_config()
    if not home.checkpoint_file.exists():
        raise StateError(f"{home.path}: the run has no checkpoint; was it finished?")
    try:
        state = torch.load(home.checkpoint_file, map_location="cpu", weights_only=True)["state_dict"]
    except (OSError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise StateError(f"{home.checkpoint_file} cannot be read: {error}") from error
    inputs = Inputs(config)
    net = config.build_method().model(lambda width: inputs.build(config.width * width), inputs.example)
    try:
        net.load_state_dict({name.removeprefix("net."): tensor for name, tensor in state.items()})
    except RuntimeError as error:
        raise StateError(f"{home.checkpoint_file} is not of this run's network: {error}") from error
    return net.eval(), inputs


def published_network(name: str) -> tuple[nn.Module, Inputs]:
    """Return the network with published weights (a key of `rarefy.models.PUBLISHED`), in eval mode, and its data set.

    Images are normalised as the weights expect. Raises ModelError for an unknown name, or one whose inputs cannot be prepared
    here, and DataError where the weights or the data set are not there.
    """
    entry = models.published_entry(name)
    normalise = models.published_normalisation(name)
    config = RunConfig(model=entry.model, model_options=dict(entry.options), data=entry.dataset)
    return models.load_published(name), Inputs(config, normalise=normalise)


def some_inputs(inputs: Inputs, samples: int) -> list[Tensor]:
    """Return the inputs of so many training samples, the first of epoch 0, in batches as they are trained on.

    For text a sample is a window. Fewer where the data set has fewer.
    """
    if samples < 1:
        raise OptionError(f"samples is {samples}: at least one is needed")
    loader, found, missing = inputs.train, [], samples
    position = loader.state_dict()
    try:
        loader.set_epoch(0)
        for x, _ in loader:
            found.append(x[:missing])
            missing -= len(found[-1])
            if not missing:
                break
    finally:
        loader.load_state_dict(position)
    return found
