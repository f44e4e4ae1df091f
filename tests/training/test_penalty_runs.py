"""Methods with a penalty in `rarefy train`: its value is logged beside the loss, and a search sees the whole training set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rarefy.training.config import RunConfig
from rarefy.training.inputs import Inputs
from rarefy.training.loop import train

SMALL: dict[str, Any] = {
    "data": "digits",
    "limit_train": 300,
    "limit_test": 100,
    "batch_size": 50,
    "steps": 48,
    "threads": 1,
    "device": "cpu",
    "sparsity": 0.8,
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def run(folder: Path, **keys: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    result = train(RunConfig.model_validate({**SMALL, **keys}), folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result, [line for line in lines if line["kind"] == "train"]


def test_the_penalty_is_logged_beside_the_loss(tmp_path: Path) -> None:
    result, lines = run(tmp_path / "a", method="wgsef", method_options={"every": 6, "strength": 1.0}, exclude=["fc3"])
    assert result["status"] == "finished"
    assert all(line["penalty"] > 0 for line in lines if line["step"] < 36)
    assert all(line["penalty"] == 0 for line in lines if line["step"] >= 36)  # after the projection
    _, lines = run(tmp_path / "b", method="static")
    assert all("penalty" not in line for line in lines)


def test_prescribed_counts_from_the_command_lines_loop(tmp_path: Path) -> None:
    options = {"every": 18, "solves": 2}
    result, lines = run(tmp_path, method="l1-prescribed", method_options=options, lr_schedule="cosine")
    assert abs(result["sparsity"] - 0.8) < 1e-3
    rates = {line["step"]: line["lr"] for line in lines}
    assert rates[1] == rates[19] == 0.1 > rates[18]  # the schedule begins again with each solve


def test_a_search_gets_every_batch_and_others_one(tmp_path: Path) -> None:
    import torch

    inputs = Inputs(RunConfig.model_validate({**SMALL, "method": "l1-prescribed"}), torch.device("cpu"))
    whole = inputs.calibration(whole=True)
    assert sum(len(y) for _, y in whole) == 300
    assert len(list(inputs.calibration())) == 1
