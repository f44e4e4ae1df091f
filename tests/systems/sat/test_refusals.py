"""What cannot be simulated, and accelerators from files: said clearly, with the mend."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.errors import ConfigError, ModelError, OptionError, PatternError, SelectionError
from rarefy.metrics import Product
from rarefy.patterns import NM
from rarefy.systems.sat import Accelerator, Gemm, accelerator, read_accelerator, simulate
from rarefy.systems.sat.gemms import layers


def mlp(*widths: int) -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def samples(batch: int, width: int) -> Tensor:
    return torch.empty(batch, width, device="meta")


@pytest.mark.parametrize(
    ("pattern", "error", "says"),
    [
        ("8:2", PatternError, "cannot keep 8 of 2"),
        ("0:4", PatternError, "must be 1 or more"),
        ("4x1", OptionError, "such as 2:8, not 4x1"),
        ("2:4@0", OptionError, "not 2:4@0"),
        ("two", OptionError, "two"),
        ("4:32", OptionError, "selects from 16 activations"),
    ],
)
def test_patterns_that_the_accelerator_does_not_run(pattern: str, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        simulate(mlp(16, 32, 10), samples(4, 16), pattern)


def test_networks_that_cannot_be_simulated() -> None:
    with pytest.raises(ModelError, match="no matrix product"):
        simulate(nn.ReLU(), torch.zeros(2, 3))
    with pytest.raises(ModelError, match=r"none .* can be read: model: recurrent layers"):
        simulate(nn.LSTM(8, 8), torch.zeros(4, 2, 8))
    with pytest.raises(ModelError, match=r"0.weight multiplies nothing"):
        simulate(mlp(16, 32, 10), samples(0, 16))
    with pytest.raises(SelectionError, match=r"dense='1.wight' fits no layer.*'1.weight'"):
        simulate(mlp(16, 32, 10), samples(4, 16), dense=["1.wight"])
    with pytest.raises(OptionError, match="size zero"):
        Gemm("FF", 0, 1, 1)
    with pytest.raises(OptionError, match="2:8 does not fit a reduction of length 12"):
        Gemm("FF", 1, 12, 1, n=2, m=8)
    with pytest.raises(ModelError):
        layers([], NM(2, 4))
    product = Product("a", "a", "linear", 1, 4, 8, 1, 8, 32, 32, True, True)
    assert layers([product], NM(2, 4), ends=False)[0].dense_because is None


def test_accelerators_from_files(tmp_path: Path) -> None:
    file = tmp_path / "array.yaml"
    file.write_text("rows: 16\nbandwidth: 12.8\nelementwise: false\n")
    array = read_accelerator(file)
    assert (array.rows, array.columns, array.bandwidth, array.elementwise) == (16, 32, 12.8, False)
    assert Accelerator().peak_gflops == pytest.approx(409.6) and Accelerator().bytes_per_cycle == pytest.approx(128)
    for text, says in (
        ("rowz: 16\n", r"unknown key 'rowz' in array.yaml \(did you mean 'rows'\?\)"),
        ("rows: 0\n", "bad value for 'rows' in array.yaml: 0"),
        ("mhz: .inf\n", "bad value for 'mhz'"),
        ("bandwidth: -1\n", "bad value for 'bandwidth'"),
        ("pipeline: 2\n", "pipeline is 2, shorter than its adder"),
        ("rows: [1]\n", "bad value for 'rows'"),
        ("rows: 16\nrows: 8\n", "given twice"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=says):
            read_accelerator(file)
    with pytest.raises(ConfigError, match="no configuration file"):
        read_accelerator(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="'columns'"):
        accelerator({"columns": 0}, "here")
