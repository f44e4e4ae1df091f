"""The network that a run has trained."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from rarefy.errors import StateError
from rarefy.training.folder import RunFolder
from rarefy.training.inputs import Inputs


def finished_network(path: str | os.PathLike[str]) -> tuple[nn.Module, Tensor]:
    """Return a run's network with its last checkpoint's weights, in eval mode, and one example of its input.

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
    return net.eval(), inputs.example
