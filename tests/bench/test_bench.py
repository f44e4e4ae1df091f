"""The kernel table: its numbers, its picture, and the command that prints it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rarefy.bench import Ceilings, Product, Row, as_json, break_even, ceilings, measure, speedups_svg
from rarefy.cli import app


def row(product: str, sparsity: float, speedup: float) -> Row:
    return Row(product, sparsity, 1, 1.0, speedup, "torch", 1.0, 0.1, 0.1)


def test_ceilings_are_positive() -> None:
    machine = ceilings(2, seconds=1e-4, repeats=1)
    assert machine.threads == 2 and machine.gflops > 0
    assert list(machine.bandwidth) == ["L1", "L2", "L3", "DRAM"] and min(machine.bandwidth.values()) > 0


def test_a_row_counts_kept_weights() -> None:
    machine = Ceilings(1, 100.0, {"DRAM": 10.0})
    for product in (Product(20, 30, 17), Product(20, 30, 5, "linear"), Product(8, 8, 1, "linear")):
        (found,) = measure(machine, [product], [0.5], seconds=1e-4)
        flops = 2 * round(0.5 * product.rows * product.cols) * product.columns
        assert found.gflops == pytest.approx(flops / found.seconds / 1e9)
        assert found.share_of_peak == pytest.approx(found.gflops / 100)
        assert found.share_of_dram > 0 and found.dense_seconds > 0 and found.dense in ("torch", "oneDNN")


def test_break_even_lies_between_the_neighbours() -> None:
    rows = [row("a", 0.7, 0.5), row("a", 0.9, 2.0), row("b", 0.7, 1.5), row("c", 0.9, 0.9)]
    assert break_even(rows) == {"a": pytest.approx(0.8), "b": 0.7}


def test_the_picture_is_well_formed_and_names_every_product() -> None:
    svg = speedups_svg([row("a<b", 0.7, 0.5), row("a<b", 0.9, 4.0), row("c", 0.9, 1.0)], "x & y")
    texts = [e.text for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"a<b", "c", "x & y", "70 %", "4x", "0.5x"} <= set(texts)
    assert json.dumps(as_json([Ceilings(1, 1.0, {})], [row("a", 0.7, 2.0)]))


def test_the_command_writes_what_it_measures(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.svg")]
    sizes = ["--product", "16x16x40", "--product", "8x8x2:linear", "--sparsity", "0.5", "--sparsity", "0.9"]
    done = CliRunner().invoke(app, ["bench", "--threads", "1", "--seconds", "0.0001", *sizes, *files])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "t.json").read_text())
    assert [r["product"] for r in found["rows"]] == ["16x16 planes 40"] * 2 + ["8x8 linear 2"] * 2
    assert found["machine"][0]["threads"] == 1 and "<svg" in (tmp_path / "t.svg").read_text()


@pytest.mark.parametrize(
    "wrong", [["--product", "3x4"], ["--product", "3x4x5:rows"], ["--sparsity", "1"], ["--threads", "0"]]
)
def test_nonsense_is_refused(wrong: list[str]) -> None:
    done = CliRunner().invoke(app, ["bench", *wrong])
    assert done.exit_code == 2
