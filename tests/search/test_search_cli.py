"""`rarefy search` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from rarefy.cli import app

SMALL = ["--set", "limit_train=200", "--set", "limit_test=100", "--epochs", "2", "--backend", "here"]


def call(*words: str) -> str:
    result = CliRunner().invoke(app, ["search", *words], env={"COLUMNS": "200"})  # a terminal or not: wide enough
    assert result.exit_code == 0, result.output
    return result.output


def test_random_search_prints_paired_differences_and_goes_on(tmp_path: Path) -> None:
    words = ["random", *SMALL, "--keep", "0.3", "--budget", "6", "--seeds", "2", "--out", str(tmp_path)]
    said = call(*words)
    assert "found - random" in said and "keep 0.3" in said
    result = json.loads((tmp_path / "result.json").read_text())["results"]["keep 0.3"]
    assert [run["seed"] for run in result["runs"]] == [0, 1] and result["runs"][0]["optimizer_steps"] == 0
    before = (tmp_path / "keep-0.3" / "member-0.pt").stat().st_mtime_ns
    assert call(*words) == said
    assert (tmp_path / "keep-0.3" / "member-0.pt").stat().st_mtime_ns == before
    refused = CliRunner().invoke(app, ["search", *words[:-4], "--seeds", "2", "--lr", "0.01", "--out", str(tmp_path)])
    assert refused.exit_code == 2


def test_soups_write_a_sparse_network(tmp_path: Path) -> None:
    words = ["soups", *SMALL, "--sparsity", "0.8", "--phases", "2", "--members", "2", "--retrain-epochs", "1"]
    said = call(*words, "--out", str(tmp_path / "a"))
    assert "phase 2: sparsity 0.80" in said
    state = load_file(tmp_path / "a" / "soup.safetensors")
    weights = [t for n, t in state.items() if n.endswith("weight")]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(0.8, abs=1e-3)
    call(*words, "--out", str(tmp_path / "b"), "--backend", "processes", "--jobs", "2")
    other = load_file(tmp_path / "b" / "soup.safetensors")
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert len(result["phases"]) == 2 and 0 < result["accuracy"] <= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["random", "--keep", "0.5", "--sparsity", "0.9"], "give one of them"),
        (["random", "--objective", "lose"], "did you mean 'loss'"),
        (["random", "--objective", "loss-after"], "loss-after:10"),
        (["random", "--backend", "rays"], "did you mean 'ray'"),
        (["soups", "--schedule", "lwr"], "'lwr' is not known"),
        (["soups", "--set", "method=rigl"], "leave out method"),
    ],
)
def test_bad_words_end_with_code_2_and_a_mend(words: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["search", *words, "--out", str(tmp_path)])
    assert result.exit_code == 2 and said in result.output.replace("\n", " ")
