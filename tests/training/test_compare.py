"""Comparisons: complete, repeatable, and not stopped by one bad run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rarefy.errors import ConfigError
from rarefy.report import collect, leaderboard
from rarefy.training import task
from rarefy.training.compare import compare
from rarefy.training.folder import RunFolder
from rarefy.training.plan import CompareConfig
from rarefy.training.pool import Notice
from rarefy.training.signals import Interrupted

BASE: dict[str, Any] = {"data": "digits", "limit_train": 300, "limit_test": 100, "epochs": 2, "device": "cpu"}


def config(**keys: Any) -> CompareConfig:
    lists = {"methods": ["dense", "small-dense", "static", "rigl"], "sparsities": [0.8], "seeds": 2}
    return CompareConfig.model_validate({**lists, "base": {**BASE, "method_options": {"every": 2}}, **keys})


def results(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text())
        found[path.parent.name] = {
            k: v for k, v in result.items() if k not in ("seconds", "cpu_seconds", "peak_memory_bytes")
        }
    return found


def test_side_by_side_is_one_after_the_other(tmp_path: Path) -> None:
    seen: list[Notice] = []
    one = compare(config(), tmp_path / "one", threads=1, notify=seen.append)
    two = compare(config(), tmp_path / "two", threads=2, jobs=2)
    assert sorted(one.finished) == sorted(two.finished) and len(one.finished) == 8 and not one.failed and not two.failed
    assert results(tmp_path / "one") == results(tmp_path / "two")
    assert [n.kind for n in seen if n.kind in ("start", "finished")] == ["start", "finished"] * 8
    assert yaml.safe_load((tmp_path / "one/compare.yaml").read_text())["seeds"] == [0, 1]
    read = collect(tmp_path / "one")
    assert not read.problems and len(leaderboard(read)) == 4
    again = compare(config(), tmp_path / "one", threads=1)
    assert not again.finished and len(again.skipped) == 8
    more = compare(config(seeds=[0, 1, 2], methods=["dense", "static"]), tmp_path / "one", threads=1)
    assert more.finished == ["dense-s2", "static-0.8-s2"]


def test_patterns_stand_side_by_side_at_one_sparsity(tmp_path: Path) -> None:
    entries: Any = ["dense", "sr-ste", {"method": "asp", "patterns": ["2:8"]}]
    asked = config(
        methods=entries, patterns=["1:4", "2:8"], seeds=1, overrides={"asp": {"method_options": {"start": 1}}}
    )
    outcome = compare(asked, tmp_path, threads=1)
    assert sorted(outcome.finished) == ["asp-2of8-s0", "dense-s0", "sr-ste-1of4-s0", "sr-ste-2of8-s0"]
    rows = {row.label: row.sparsity for row in leaderboard(collect(tmp_path))}
    assert rows == {"dense": 0.0, "sr-ste 1:4": 0.75, "sr-ste 2:8": 0.75, "asp 2:8": 0.75}
    assert not compare(asked, tmp_path, threads=1).finished
    for file in (tmp_path / "asp-2of8-s0").iterdir():
        file.unlink()
    (tmp_path / "asp-2of8-s0").rmdir()
    (lost,) = collect(tmp_path).problems
    assert (lost.name, lost.status) == ("asp-2of8-s0", "missing")


def test_another_configuration_is_not_mixed_in(tmp_path: Path) -> None:
    compare(config(methods=["dense"]), tmp_path, threads=1)
    other = config(methods=["dense"], base={**BASE, "epochs": 1, "batch_size": 50})
    with pytest.raises(ConfigError, match=r"dense-s0 \(epochs, batch_size\).*--force"):
        compare(other, tmp_path)
    assert RunFolder(tmp_path / "dense-s0").read_config().epochs == 2
    assert compare(other, tmp_path, force=True, threads=1).finished == ["dense-s0", "dense-s1"]
    assert results(tmp_path)["dense-s0"]["epochs"] == 1


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_run_does_not_stop_the_rest(jobs: int, tmp_path: Path) -> None:
    bad = config(methods=["static", "rigl"], seeds=1, overrides={"static": {"optimizer": {"lr": 1e12}}})
    outcome = compare(bad, tmp_path, jobs=jobs, threads=jobs)
    assert outcome.finished == ["rigl-0.8-s0"] and "loss is" in outcome.failed["static-0.8-s0"]
    (problem,) = collect(tmp_path).problems
    assert problem.status == "failed"
    assert compare(bad, tmp_path, threads=1).failed  # a failed run is tried again


def test_an_interrupted_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(config(methods=["dense", "rigl"], seeds=1), tmp_path / "whole", threads=1)
    original = task.Watch.on_train_batch_end

    def hook(self: task.Watch, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 4 and self.config.method == "rigl":
            self.stop.asked = True
        original(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(task.Watch, "on_train_batch_end", hook)
        with pytest.raises(Interrupted):
            compare(config(methods=["dense", "rigl"], seeds=1), tmp_path / "cut", threads=1)
    plans: list[Any] = []
    compare(config(methods=["dense", "rigl"], seeds=1), tmp_path / "cut", threads=1, on_plan=plans.extend)
    assert [plan.action for plan in plans] == ["skip", "resume"]
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
