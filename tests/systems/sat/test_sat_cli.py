"""`rarefy simulate sat` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rarefy.cli import app

SMALL = ("--model", "resnet-9", "--batch", "4")


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["simulate", "sat", *args], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_the_table_shows_layers_totals_and_reasons() -> None:
    said = run("--model", "ResNet9", "--pattern", "2:8", "--batch", "4")
    assert "resnet-9, 4 x 3x32x32; 2:8 on 32 x 32 PEs at 200 MHz" in said
    assert "res1.0.0" in said and "passes over data" in said and "total" in said and "vs FF only" in said
    assert "dense: conv1.0: first layer" in said and "dense: fc: last layer" in said
    assert "times as fast as dense training" in said and "no measurement" in said


def test_json_schedule_and_parameters(tmp_path: Path) -> None:
    file, steps = tmp_path / "array.yaml", tmp_path / "new" / "steps.json"
    file.write_text("rows: 16\ncolumns: 16\n")
    found = json.loads(run(*SMALL, "--config", str(file), "--set", "bandwidth=12.8", "--image", "16", "--classes", "100",
                           "--dense", "conv2*", "--format", "json", "--schedule", str(steps)))  # fmt: skip
    assert found["model"] == "resnet-9, 4 x 3x16x16"
    assert (found["accelerator"]["rows"], found["accelerator"]["bandwidth"]) == (16, 12.8)
    reasons = {row["layer"]: row["dense_because"] for row in found["layers"]}
    assert reasons["conv2.0.weight"] == "asked to stay dense" and reasons["conv3.0.weight"] is None
    written = json.loads(steps.read_text())
    assert sum(step["cycles"] for step in written) == found["runs"]["sparse"]["cycles"]
    assert {step["stage"] for step in written} == {"FF", "BP", "WU", "UP", "EF", "EB"}
    assert {step["mapping"]["dataflow"] for step in written if step["mapping"]} <= {"output", "weight"}


def test_other_inputs() -> None:
    assert "gpt, 2 x 16 tokens" in run("--model", "gpt", "--batch", "2", "--option", "context=16")
    assert "3x16x16" in run("--model", "vit", "--option", "image_size=16", "--batch", "2")
    assert "3x64x64" in run("--model", "resnet-18", "--option", "stem=small", "--image", "64", "--batch", "2")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--model", "resnet-91"), "did you mean 'resnet-9'"),
        ((*SMALL, "--pattern", "8:2"), "cannot keep 8 of 2"),
        ((*SMALL, "--pattern", "2:9x"), "2:9x"),
        ((*SMALL, "--batch", "0"), "at least one sample"),
        ((*SMALL, "--format", "jsn"), "did you mean 'json'"),
        ((*SMALL, "--set", "rowz=3"), "did you mean 'rows'"),
        ((*SMALL, "--set", "rows=0"), "bad value for 'rows'"),
        ((*SMALL, "--dense", "nothing*"), "fits no layer"),
        ((*SMALL, "--option", "stem=small"), "has no option 'stem'"),
        ((*SMALL, "--image", "4"), "at least 8x8"),
        ((*SMALL, "--image", "0"), "image_size is 0"),
        ((*SMALL, "--config", "none.yaml"), "no configuration file"),
        (("--model", "gpt", "--image", "32"), "reads no images"),
        (("--model", "resnet-18", "--option", "stem=tiny"), "expected one of large, small"),
    ],
)
def test_what_was_asked_wrongly(args: tuple[str, ...], says: str) -> None:
    assert says in run(*args, code=2)
