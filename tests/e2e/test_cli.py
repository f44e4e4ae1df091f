"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rarefy.cli import app
from rarefy.training.plan import CompareConfig, decide, expand
from rarefy.training.reading import read_mapping, validate

DIGITS = [
    "--data",
    "digits",
    "--set",
    "limit_train=300",
    "--set",
    "limit_test=100",
    "--threads",
    "1",
    "--device",
    "cpu",
]


def run(*args: str, code: int = 0) -> str:
    """Run a command in this process; return all it printed."""
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def start(*args: str) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    command = [sys.executable, "-m", "rarefy", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_help_version_methods_config() -> None:
    assert run("--version").startswith("rarefy ")
    assert "compare" in run("--help")
    table = run("methods")
    assert all(
        name in table for name in ("dense", "small-dense", "static", "magnitude", "gradual", "snip", "set", "rigl")
    )
    places = [
        table.index(f"\n{family} ") for family in ("before training", "sparse to sparse", "dense to sparse", "baseline")
    ]
    assert places == sorted(places) and places[1] < table.index("  rigl ") < places[2]
    told = run("methods", "rigl")
    assert "rarefy.methods.RigL; sparse to sparse" in told
    assert "1911.11134" in told and "drop_fraction" in told and "0.3" in told
    assert "did you mean 'rigl'" in run("methods", "rigel", code=2)
    assert "torch" in run("config")


def test_convert(tmp_path: Path) -> None:
    import torch

    import rarefy
    from rarefy.training.finished import finished_network

    folder = tmp_path / "run"
    run("train", "--model", "lenet-300-100", *DIGITS, "--epochs", "2", "--out", str(folder))
    said = run(
        "convert",
        str(folder),
        "--pattern",
        "1:4",
        "--samples",
        "50",
        "--exclude",
        "fc1.*",
        "--include",
        "fc[123].weight",
    )
    assert "fc2.weight" in said and "fc3.weight" in said and "fc1.weight" not in said.split("dense:")[0]
    found = rarefy.load(folder / "model-1of4.safetensors")
    net, inputs = finished_network(folder)
    for name, weight in found.items():
        before = net.get_parameter(name)
        if name in ("fc2.weight", "fc3.weight"):
            kept = weight.view(len(weight), -1, 4).count_nonzero(-1)
            assert int(kept.max()) == 1 and not torch.equal(weight, before)
        elif name == "fc1.weight":
            assert torch.equal(weight, before)
    net.load_state_dict(found)
    with torch.no_grad():
        right = torch.cat([net(x).argmax(1) == y for x, y in inputs.test]).double().mean()
    assert f"{right:.2%} now" in said and "1:4, LeastSquares" in said
    masks = run(
        "convert",
        str(folder),
        "--pattern",
        "1:4",
        "--solver",
        "none",
        "--include",
        "fc2.weight",
        "--out",
        str(tmp_path / "m.safetensors"),
    )
    assert "masks alone" in masks
    alone = rarefy.load(tmp_path / "m.safetensors")["fc2.weight"]
    before = finished_network(folder)[0].get_parameter("fc2.weight")
    assert torch.equal(alone, before * (alone != 0))
    assert "not both" in run("convert", code=2) and "not both" in run(
        "convert", str(folder), "--published", "x", code=2
    )
    assert "samples is 0" in run("convert", str(folder), "--samples", "0", code=2)
    assert "7" in run("convert", str(folder), "--pattern", "2:7", code=2)
    assert "squeezenet-imagenet-pruned expects" in run("convert", "--published", "squeezenet-imagenet-pruned", code=2)
    assert "did you mean 'resnet-20-cifar10'" in run("convert", "--published", "resnet20-cifar10", code=2)


def test_inspect(tmp_path: Path) -> None:
    import torch

    weight = torch.randn(32, 64)
    weight.view(32, 16, 4)[..., 2:] = 0
    torch.save({"fc.weight": weight, "fc.bias": torch.zeros(32)}, tmp_path / "net.pt")
    said = run("inspect", str(tmp_path / "net.pt"))
    assert "fc.weight" in said and "32x64" in said and "50.00%" in said and "column" in said
    found = json.loads(run("inspect", str(tmp_path / "net.pt"), "--json"))
    assert (found["sparsity"], found["weights"][0]["zeros"], found["others"]) == (0.5, 1024, 1)
    (tmp_path / "net.pt").write_bytes((tmp_path / "net.pt").read_bytes()[:700])
    assert "net.pt" in run("inspect", str(tmp_path / "net.pt"), code=2)
    assert "No such file" in run("inspect", str(tmp_path / "none.pt"), code=2)


def test_train_report_and_refusals(tmp_path: Path) -> None:
    out = tmp_path / "r"
    said = run("train", "--method", "set", "--sparsity", "0.8", "--epochs", "2", "--set", "method_options.every=2",
               "--lr", "0.05", *DIGITS, "--out", str(out))  # fmt: skip
    assert "accuracy" in said and "sparsity 0.8" in said and "digits" in said
    assert "optimizer:" in (out / "config.yaml").read_text()
    assert "report:" in run("report", str(out), "--out", str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").stat().st_size > 1000
    assert "already holds a finished run" in run("train", "--method", "set", *DIGITS, "--out", str(out), code=2)
    assert "nothing to resume" in run("train", "--resume", str(out))
    assert "leave out seed" in run("train", "--resume", str(out), "--seed", "3", code=2)
    run("train", "--method", "dense", "--steps", "2", *DIGITS, "--out", str(out), "--force")
    assert json.loads((out / "result.json").read_text())["steps"] == 2


def test_yaml_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: digits\nlimit_train: 200\nsparsty: 0.5\n")
    assert "unknown key 'sparsty' in run.yaml (did you mean 'sparsity'?)" in run("train", str(file), code=2)
    file.write_text("data: digits\nlimit_train: 200\nlimit_test: 100\nepochs: 5\nmethod: static\nsparsity: 0.5\n")
    run("train", str(file), "--steps", "2", "--sparsity", "0.7", "--threads", "1", "--out", str(tmp_path / "a"))
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert result["steps"] == 2 and result["sparsity_asked"] == 0.7
    for args, said in (
        (["train", "--method", "rigl", "--set", "method_options.evry=3"], "did you mean 'every'"),
        (["train", "--sparsity", "1.5", "--method", "static"], "less than 1"),
        (["train", "--data", "diggits"], "did you mean 'digits'"),
        (["train", "--model", "lenet-6"], "did you mean 'lenet-5'"),
        (["train", str(tmp_path / "none.yaml")], "there is no configuration file"),
        (["train", "--resume", str(tmp_path)], "is no run folder"),
        (["report", str(tmp_path / "none")], "there is no folder"),
        (["compare"], "nothing to compare"),
        (["compare", "--recipe", "mnist"], "did you mean 'mnist-lenet'"),
        (["compare", "--methods", "rigl,statik"], "did you mean 'static'"),
    ):
        fresh = args[0] == "train" and "--resume" not in args
        assert said in run(*args, *(["--out", str(tmp_path / "x")] if fresh else []), code=2), args


def test_compare_prints_the_table_and_writes_the_page(tmp_path: Path) -> None:
    base = ["--data", "digits", "--epochs", "1", "--set", "base.limit_train=300", "--set", "base.limit_test=100"]
    args = ["compare", *base, "--sparsities", "0.8", "--seeds", "2", "--threads", "1", "--out", str(tmp_path)]
    said = run(*args, "--methods", "dense,small-dense,static,rigl", "--set", "base.method_options.every=1")
    assert "8 to do" in said and "rigl" in said and "accuracy" in said
    table = json.loads((tmp_path / "table.json").read_text())
    assert {row["label"] for row in table["rows"]} == {"dense", "small-dense", "static", "rigl"}
    assert (tmp_path / "report.html").stat().st_size > 1000
    said = run(*args, "--methods", "dense,static", "--set", "overrides.static.optimizer.lr=1e12",
               "--set", "overrides.static.steps=3", "--set", "overrides.static.epochs=null", "--force", code=1)  # fmt: skip
    assert "2 of the runs failed" in said and "2 finished before" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_resumable_run(number: signal.Signals, tmp_path: Path) -> None:
    args = ["--method", "rigl", "--sparsity", "0.9", "--steps", "2000", "--set", "method_options.every=50", *DIGITS]
    process = start("train", *args, "--set", "eval_every=0", "--out", str(tmp_path))
    _wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and '"train"' in (tmp_path / "metrics.jsonl").read_text())
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "rarefy train --resume" in said and "Traceback" not in said
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "checkpoint.ckpt").exists() and not list(tmp_path.glob(".*.tmp"))
    if number == signal.SIGINT:
        assert "go on with --resume" in run("train", *args, "--out", str(tmp_path), code=2)
        assert "accuracy" in run("train", "--resume", str(tmp_path))
        assert json.loads((tmp_path / "result.json").read_text())["steps"] == 2000


def test_a_stopped_comparison_in_workers_goes_on(tmp_path: Path) -> None:
    base = ["--data", "digits", "--steps", "200000", "--set", "base.limit_train=300", "--set", "base.eval_every=0"]
    args = ["compare", *base, "--methods", "dense,static", "--sparsities", "0.8", "--seeds", "1", "--jobs", "2"]
    args += ["--threads", "2", "--out", str(tmp_path)]
    process = start(*args)
    files = [tmp_path / name / "metrics.jsonl" for name in ("dense-s0", "static-0.8-s0")]
    _wait_for(lambda: all(file.exists() and '"train"' in file.read_text() for file in files))
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 130, said
    assert "the same command again" in said and "Traceback" not in said
    status = [json.loads((file.parent / "result.json").read_text())["status"] for file in files]
    assert status == ["interrupted", "interrupted"]
    config = validate(CompareConfig, read_mapping(tmp_path / "compare.yaml"), "compare.yaml")
    assert [run.action for run in decide(expand(config, tmp_path))] == ["resume", "resume"]


def _wait_for(there: Any, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
