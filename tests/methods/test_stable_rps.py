"""STABLE-RPS as a method: built, trained, measured, stopped and resumed by the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from rarefy import models
from rarefy.errors import OptionError, SelectionError
from rarefy.methods import StableRPS
from rarefy.nn import SharedArray, SharedModule
from rarefy.training.config import RunConfig
from rarefy.training.finished import finished_network
from rarefy.training.loop import train
from tests.training.test_run import differences

RUN: dict[str, Any] = {
    "data": "digits",
    "limit_train": 400,
    "limit_test": 100,
    "method": "stable-rps",
    "sparsity": 0.9375,
    "epochs": 2,
    "threads": 1,
    "device": "cpu",
}


def test_a_run_counts_full_flops_and_the_arrays_parameters(tmp_path: Path) -> None:
    result = train(RunConfig.model_validate(RUN), tmp_path / "run")
    weights = 64 * 300 + 300 * 100 + 100 * 10
    assert result["parameters_dense"] == weights + 410
    assert result["parameters"] == weights // 16 + 410
    assert result["storage_bytes"]["csr"] == 4 * result["parameters"]
    assert result["flops"] == result["flops_dense"] == 2 * weights
    assert result["training_flops"] == result["training_flops_dense"]
    assert result["sparsity"] == 0.0 and result["sparsity_asked"] == 0.9375
    model, inputs = finished_network(tmp_path / "run")
    assert sum(isinstance(m, SharedModule) for m in model.modules()) == 3
    assert model(inputs.example).shape == (1, 10)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    from rarefy.training import task
    from rarefy.training.signals import Interrupted

    whole = train(RunConfig.model_validate(RUN), tmp_path / "whole")

    def stop_early(step: int, total: int, numbers: dict[str, float]) -> None:
        if step == 3:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    before, task.REPORT_SECONDS = task.REPORT_SECONDS, 0
    try:
        with pytest.raises(Interrupted):
            train(RunConfig.model_validate(RUN), tmp_path / "cut", report=stop_early)
    finally:
        task.REPORT_SECONDS = before
    resumed = train(RunConfig.model_validate(RUN), tmp_path / "cut", resume=True)
    states = [torch.load(tmp_path / n / "checkpoint.ckpt", weights_only=True) for n in ("whole", "cut")]
    assert not differences(states[0]["state_dict"], states[1]["state_dict"])
    assert not differences(states[0]["optimizer_states"], states[1]["optimizer_states"])
    assert whole["accuracy"] == resumed["accuracy"]


def test_sparsity_zero_trains_as_the_dense_network(tmp_path: Path) -> None:
    dense = train(RunConfig.model_validate({**RUN, "method": "dense", "sparsity": None}), tmp_path / "dense")
    shared = train(RunConfig.model_validate({**RUN, "sparsity": 0.0}), tmp_path / "shared")
    assert (dense["loss"], dense["accuracy"]) == (shared["loss"], shared["accuracy"])


def test_the_sparsifier_manages_nothing_and_says_so() -> None:
    torch.manual_seed(0)
    method = StableRPS(sparsity=0.75, smallest=1001)
    model = method.model(lambda width: models.build("lenet-300-100", width=width))
    assert isinstance(model.fc3, nn.Linear)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, method, optimizer=optimizer)
    for _ in range(3):
        F.cross_entropy(model(torch.randn(8, 1, 28, 28)), torch.arange(8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparse.step_count == 3 and not sparse.layers and sparse.sparsity == 0 and sparse.explored() == 1
    text = str(sparse.summary(torch.zeros(1, 1, 28, 28)))
    assert "stable-rps makes no zeros: fc3.weight" in text and "an array that layers share: fc1.shared.values" in text
    saved = sparse.state_dict()
    rarefy.sparsify(sparse.finalize(), method, state=saved)
    with pytest.raises(SelectionError, match="none to choose"):
        rarefy.sparsify(model, method, exclude="fc1")


def test_a_plain_network_is_refused() -> None:
    model = models.build("lenet-300-100")
    with pytest.raises(OptionError, match="share_"):
        rarefy.sparsify(model, "stable-rps", sparsity=0.75)


@pytest.mark.parametrize("bad", [{"sparsity": 1.0}, {"mapping": "x"}, {"tile": 0}, {"scaler": "v0"}, {"scope": "x"}])
def test_bad_options(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        StableRPS(**bad)


def test_the_hash_seed_moves_the_weights() -> None:
    arrays = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = StableRPS(sparsity=0.5, hash_seed=seed).model(lambda width: models.build("lenet-5"))
        (array,) = (m for m in model.modules() if isinstance(m, SharedArray))
        arrays.append(array.weight(1).detach())
    assert torch.equal(arrays[0], arrays[1]) and not torch.equal(arrays[0], arrays[2])
