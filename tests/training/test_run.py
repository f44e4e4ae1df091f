"""One run: its folder, its numbers, and that stopping and resuming changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rarefy.errors import ConfigError, StateError
from rarefy.kernels import unpack_mask
from rarefy.report import collect, leaderboard
from rarefy.training import inputs, robustness, task
from rarefy.training.config import RunConfig
from rarefy.training.folder import RunFolder
from rarefy.training.loop import train
from rarefy.training.signals import Interrupted

SMALL: dict[str, Any] = {
    "data": "digits",
    "limit_train": 400,
    "limit_test": 100,
    "validation": 0.1,
    "method": "rigl",
    "sparsity": 0.9,
    "method_options": {"every": 2},
    "epochs": 3,
    "threads": 1,
    "device": "cpu",
}


def small(**keys: Any) -> RunConfig:
    return RunConfig.model_validate({**SMALL, **keys})


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics without their clock times."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in read]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        same = a.keys() == b.keys()
        return [d for k in a for d in differences(a[k], b[k], f"{path}/{k}")] if same else [f"{path} keys"]
    if isinstance(a, list | tuple):
        same = len(a) == len(b)
        return (
            [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
            if same
            else [path]
        )
    return [] if a == b or "seconds" in path or "metrics_bytes" in path else [f"{path}: {a} {b}"]


def checkpoint(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoint.ckpt", weights_only=True)  # holds nothing that runs
    return state


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a real SIGINT while optimizer step number `step` ends."""
    original = task.Watch.on_train_batch_end

    def hook(self: task.Watch, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == step and self._step < step:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, trainer, *rest)

    monkeypatch.setattr(task.Watch, "on_train_batch_end", hook)


def test_the_folder_holds_what_the_report_reads(tmp_path: Path) -> None:
    result = train(small(), tmp_path / "rigl-0.9-s0")
    home = RunFolder(tmp_path / "rigl-0.9-s0")
    assert home.read_config() == small()
    assert home.read_result() == json.loads(json.dumps(result))
    assert result["status"] == "finished" and result["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert result["accuracy"] > 0.3 and 0 < result["explored"] <= 1
    assert result["flops"] < 0.2 * result["flops_dense"] and result["parameters"] < 0.2 * result["parameters_dense"]
    assert result["steps"] == 12 and result["epochs"] == 3
    assert "held out for validation" in result["dataset_note"] and "only the first 400" in result["dataset_note"]
    environment = json.loads(home.environment_file.read_text())
    assert {"python", "torch", "rarefy", "cpu", "threads", "native", "platform", "started"} <= environment.keys()
    with safe_open(home.masks_file, "pt") as file:
        shapes = file.metadata()
        kept = {name: int(unpack_mask(file.get_tensor(name), json.loads(shapes[name])).sum()) for name in shapes}
    assert kept == {layer["name"]: layer["kept"] for layer in result["layers"]}
    read = lines(home.path)
    assert [e["split"] for e in read if e["kind"] == "eval"] == ["val", "val", "test"]  # tested once, at the end
    assert read[-1]["accuracy"] == result["accuracy"]
    assert sum(e["kind"] == "topology" for e in read) > 3
    assert collect(home.path).runs[0].finished and not collect(home.path).runs[0].notes
    with pytest.raises(ConfigError, match="already holds a finished run"):
        train(small(), home.path)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"steps": 8, "epochs": None},
        {"accumulate": 2},
        {
            "model": "vit",
            "model_options": {"image_size": 8, "dim": 12, "depth": 1},
            "limit_train": 120,
            "batch_size": 30,
            "optimizer": "adamw",
            "gradient_clip": 1.0,
        },
        {"model": "mobilenet-v2", "width": 0.1, "limit_train": 60, "batch_size": 20, "epochs": 2},
        {"method": "movement", "method_options": {}},
        {"method": "dst", "sparsity": None, "method_options": {"alpha": 0.01}, "precision": "bf16"},
        {"method": "pgf", "sparsity": 0.75, "method_options": {"pattern": "1:4", "recipe": "sdgf-stepwise"}},
    ],
    ids=[
        "epochs",
        "steps",
        "accumulate",
        "vit-adam-clip",
        "dropout-and-batch-norm",
        "trained-scores",
        "thresholds",
        "frames",
    ],
)
def test_a_resumed_run_ends_bit_for_bit_the_same(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(**keys)
    whole = train(config, tmp_path / "whole")
    for step in (1, whole["steps"] // 3, whole["steps"] // 2 + 1):  # in mid-epoch and, for some, at an epoch's end
        folder = tmp_path / f"stopped-{step}"
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Interrupted):
                train(config, folder)
        home = RunFolder(folder)
        assert home.status() == "interrupted" and checkpoint(folder)["global_step"] >= step
        resumed = train(config, folder, resume=True)
        assert not differences(checkpoint(tmp_path / "whole"), checkpoint(folder))
        assert lines(folder) == lines(tmp_path / "whole")
        for key in ("accuracy", "loss", "training_flops", "explored", "layers"):
            assert resumed[key] == whole[key]


def test_what_came_after_the_checkpoint_is_written_again(tmp_path: Path) -> None:
    """As after a kill: lines that the checkpoint does not know are dropped, and only the measuring is repeated."""
    train(small(), tmp_path)
    before = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99')
    (tmp_path / "result.json").unlink()
    train(small(), tmp_path, resume=True)
    assert lines(tmp_path) == before


def test_both_clocks_go_on_over_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Interrupted):
            train(small(), tmp_path)
    state = checkpoint(tmp_path)
    kept = state["callbacks"]["Watch"]
    assert kept["seconds"] > 0 and kept["cpu_seconds"] > 0
    kept.update(seconds=1000.0, cpu_seconds=2000.0)
    torch.save(state, tmp_path / "checkpoint.ckpt")
    result = train(small(), tmp_path, resume=True)
    assert 1000 < result["seconds"] < 1900 and result["cpu_seconds"] > 2000
    kept = checkpoint(tmp_path)["callbacks"]["Watch"]
    assert 1000 < kept["seconds"] <= result["seconds"] and 2000 < kept["cpu_seconds"] <= result["cpu_seconds"]


def test_a_checkpoint_of_a_version_without_processor_time_goes_on(tmp_path: Path) -> None:
    train(small(), tmp_path)
    state = checkpoint(tmp_path)
    del state["callbacks"]["Watch"]["cpu_seconds"]
    torch.save(state, tmp_path / "checkpoint.ckpt")
    (tmp_path / "result.json").unlink()
    result = train(small(), tmp_path, resume=True)
    assert result["seconds"] > 0 and result["cpu_seconds"] is None
    assert collect(tmp_path).runs[0].finished


def test_a_run_without_a_checkpoint_starts_again(tmp_path: Path) -> None:
    train(small(), tmp_path / "a")
    RunFolder(tmp_path / "b").write_config(small())
    train(small(), tmp_path / "b", resume=True)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    train(small(), tmp_path)
    with pytest.raises(ConfigError, match="another configuration"):
        train(small(seed=5), tmp_path, resume=True)

    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"global_step": 1, "callbacks": Evil()}, tmp_path / "checkpoint.ckpt")
    with pytest.raises(StateError, match="cannot be read as a checkpoint"):
        train(small(), tmp_path, resume=True)
    assert not (tmp_path / "owned").exists()


def test_paired_runs_share_weights_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    original = task.Task.training_step

    def step(self: task.Task, batch: Any, batch_idx: int) -> Any:
        seen.setdefault(name, []).append(batch[0].sum().item())
        weights.setdefault(name, self.net.state_dict()["fc1.bias"].clone())
        return original(self, batch, batch_idx)

    monkeypatch.setattr(task.Task, "training_step", step)
    weights: dict[str, Any] = {}
    for name, keys in {
        "dense": {"method": "dense", "sparsity": None, "method_options": {}},
        "set": {"method": "set"},
        "snip": {"method": "snip", "method_options": {}},
    }.items():
        train(small(**keys), tmp_path / name)
    assert seen["dense"] == seen["set"] == seen["snip"]
    assert torch.equal(weights["dense"], weights["set"]) and torch.equal(weights["dense"], weights["snip"])


def test_a_loss_that_is_no_number_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(task.TrainingFailed, match="try a lower optimizer"):
        train(small(optimizer={"lr": 1e12}), tmp_path)
    result = RunFolder(tmp_path).read_result()
    assert result["status"] == "failed" and "loss is" in result["error"] and result["seed"] == 0
    assert collect(tmp_path).runs[0].status == "failed"


def test_small_dense_is_counted_against_the_full_net(tmp_path: Path) -> None:
    result = train(small(method="small-dense", method_options={}), tmp_path / "small")
    sparse = train(small(method="static", method_options={}), tmp_path / "static")
    assert 0.9 * sparse["parameters"] < result["parameters"] <= sparse["parameters"]
    assert result["parameters_dense"] == sparse["parameters_dense"] > 8 * result["parameters"]
    assert result["flops"] < 0.12 * result["flops_dense"] and result["sparsity"] == 0.0


def test_a_tiny_run_in_bf16(tmp_path: Path) -> None:
    result = train(small(precision="bf16", epochs=1), tmp_path)
    assert result["status"] == "finished" and result["sparsity"] == pytest.approx(0.9, abs=1e-3)


def test_further_evaluations_change_no_run_and_are_reported(tmp_path: Path) -> None:
    plain = train(small(), tmp_path / "rigl-0.9-s0")
    asked = {"ood": "noise", "attacks": ["fgsm", "pgd"], "eps": 0.1, "steps": 3}
    result = train(small(evaluate=asked), tmp_path / "rigl-0.9-s1")
    assert not differences(checkpoint(tmp_path / "rigl-0.9-s0"), checkpoint(tmp_path / "rigl-0.9-s1"))
    assert plain["evaluations"] == {} and plain["accuracy"] == result["accuracy"]
    found = result["evaluations"]
    assert list(found) == ["ood_auroc_noise", "fgsm_accuracy", "pgd_accuracy"]
    assert 0 <= found["pgd_accuracy"] <= found["fgsm_accuracy"] < result["accuracy"]
    assert 0 < found["ood_auroc_noise"] <= 1
    (tmp_path / "rigl-0.9-s1" / "result.json").unlink()  # as after a kill: only the measuring is repeated
    assert train(small(evaluate=asked), tmp_path / "rigl-0.9-s1", resume=True)["evaluations"] == found
    (row,) = leaderboard(collect(tmp_path / "rigl-0.9-s1"))
    assert row.evaluations == pytest.approx(found)


def test_evaluations_that_cannot_be_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = inputs.bundle_of("digits", None)
    large = dataclasses.replace(one, name="large", test_x=torch.zeros(3, 1, 28, 28, dtype=torch.uint8))
    original = robustness.bundle_of
    monkeypatch.setattr(robustness, "bundle_of", lambda name, root: large if name == "mnist" else original(name, root))
    with pytest.raises(ConfigError, match=r"images of mnist are \[1, 28, 28\], those of digits \[1, 8, 8\]"):
        train(small(evaluate={"ood": ["mnist"]}), tmp_path)
    assert not (tmp_path / "checkpoint.ckpt").exists()
