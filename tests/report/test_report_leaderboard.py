"""The numbers of the leaderboard against independent ones, on the terminal and in table.json."""

from __future__ import annotations

import io
import json
import runpy
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from rarefy.cli import app
from rarefy.errors import OptionError
from rarefy.report import collect, leaderboard, markdown, print_leaderboard, write_table
from rarefy.report.numbers import duration, points, si, times

fake = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fake_runs.py"))))


def result(folder: Path, name: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / name / "result.json").read_text())
    return found


def test_means_spreads_and_paired_differences_agree_with_scipy(tmp_path: Path) -> None:
    folder = fake.comparison(tmp_path, breakages=False, seeds=range(5))
    rows = {(row.label, row.sparsity_asked): row for row in leaderboard(collect(folder))}
    assert len(rows) == 15
    row = rows["rigl", 0.98]
    ours = [result(folder, f"rigl-0.98-s{seed}") for seed in range(5)]
    accuracy = [one["accuracy"] for one in ours]
    assert row.n == row.total == 5 and row.seeds == (0, 1, 2, 3, 4)
    assert row.accuracy == pytest.approx(statistics.mean(accuracy), rel=1e-14)
    assert row.accuracy_sd == pytest.approx(statistics.stdev(accuracy), rel=1e-12)
    assert row.flops_ratio == pytest.approx(ours[0]["flops"] / ours[0]["flops_dense"])
    assert row.seconds == pytest.approx(statistics.mean(one["seconds"] for one in ours))
    assert row.cpu_seconds == pytest.approx(statistics.mean(one["cpu_seconds"] for one in ours))
    for name in ("static", "small-dense"):
        base = [result(folder, f"{name}-0.98-s{seed}")["accuracy"] for seed in range(5)]
        test = stats.ttest_rel(accuracy, base)
        found = row.against[name]
        assert found is not None
        low, high = test.confidence_interval(0.95)
        assert (found.low, found.high, found.p) == pytest.approx((low, high, test.pvalue), rel=1e-9)
        assert found.p_holm is not None and found.p is not None and found.p_holm >= found.p
    assert "static" not in rows["static", 0.98].against
    assert rows["dense", None].against == {}


def test_pairs_are_made_by_seed_even_where_some_are_lacking(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 0.5), (1, 0.6), (2, 0.7)):
        fake.run(tmp_path / f"static-0.9-s{seed}", "static", 0.9, seed, accuracy=accuracy)
    for seed, accuracy in ((1, 0.65), (2, 0.73), (7, 0.1)):
        fake.run(tmp_path / f"rigl-0.9-s{seed}", "rigl", 0.9, seed, accuracy=accuracy)
    row = next(row for row in leaderboard(collect(tmp_path)) if row.label == "rigl")
    found = row.against["static"]
    assert found is not None and found.n == 2
    assert found.mean == pytest.approx(0.04)


def test_a_method_without_a_finished_run_keeps_its_row(tmp_path: Path) -> None:
    fake.run(tmp_path / "static-0.9-s0", "static", 0.9, 0)
    fake.run(tmp_path / "set-0.9-s0", "set", 0.9, 0, status="failed", error="no memory", accuracy=None)
    rows = leaderboard(collect(tmp_path))
    assert [(row.label, row.n, row.total, row.accuracy is None) for row in rows] == [
        ("static", 1, 1, False),
        ("set", 0, 1, True),
    ]
    assert rows[0].accuracy_sd is None


def test_runs_of_versions_that_kept_no_processor_time_have_rows(tmp_path: Path) -> None:
    for seed in (0, 1):
        fake.run(tmp_path / f"static-0.9-s{seed}", "static", 0.9, seed)
    old = result(tmp_path, "static-0.9-s1")
    del old["cpu_seconds"]
    (tmp_path / "static-0.9-s1" / "result.json").write_text(json.dumps(old))
    comparison = collect(tmp_path)
    (row,) = leaderboard(comparison)
    assert not comparison.problems and row.n == 2
    assert row.cpu_seconds == result(tmp_path, "static-0.9-s0")["cpu_seconds"]


def test_training_flops_are_those_of_the_dense_run_even_where_a_run_is_longer(tmp_path: Path) -> None:
    costs: dict[str, float] = {"training_flops": 1e9, "training_flops_dense": 1e9}
    fake.run(tmp_path / "dense-s0", "dense", None, 0, **costs)
    fake.run(tmp_path / "set-0.9-s0", "set", 0.9, 0, training_flops=1e8, training_flops_dense=1e9)
    fake.run(
        tmp_path / "rigl-0.9-s0", "rigl", 0.9, 0, training_flops=5e8, training_flops_dense=5e9
    )  # five times as long
    comparison = collect(tmp_path)
    rows = {row.label: row.training_flops_ratio for row in leaderboard(comparison)}
    assert rows == pytest.approx({"dense": 1.0, "set": 0.1, "rigl": 0.5})
    assert any("training FLOPs are unequal: rigl 0.5x of dense, set 0.1x" in said for said in comparison.warnings)


def test_a_sparsity_that_was_not_asked_for_has_its_place(tmp_path: Path) -> None:
    fake.run(tmp_path / "dense-s0", "dense", None, 0)
    fake.run(tmp_path / "static-0.9-s0", "static", 0.9, 0)
    fake.run(tmp_path / "static-0.98-s0", "static", 0.98, 0)
    fake.run(tmp_path / "own-s0", "rigl", 0.98, 0, label="own", sparsity_asked=None, sparsity=0.95)
    comparison = collect(tmp_path)
    rows = leaderboard(comparison)
    assert [(row.label, row.level) for row in rows] == [
        ("dense", None),
        ("static", 0.9),
        ("own", 0.95),
        ("static", 0.98),
    ]
    out = io.StringIO()
    print_leaderboard(Console(file=out, width=190), rows, comparison)
    assert [line.strip() for line in out.getvalue().splitlines() if "sparsity" in line][1:4] == [
        "90 % sparsity",
        "sparsity of its own",
        "98 % sparsity",
    ]
    assert "| (95.0 %) | own |" in markdown(rows)


def test_the_markdown_table_says_what_the_rows_say(tmp_path: Path) -> None:
    rows = leaderboard(collect(fake.comparison(tmp_path, breakages=False)))
    lines = markdown(rows, without=["seconds"]).splitlines()
    head, rule, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(body) == len(rows) and all(len(line) == len(head) == len(rule) for line in body)
    assert "seconds" not in head and "CPU seconds" in head
    for row, line in zip(rows, body, strict=True):
        cells = dict(zip(head, line, strict=True))
        assert (
            cells["method"] == row.label
            and cells["accuracy %"] == f"{points(row.accuracy)} ± {points(row.accuracy_sd)}"
        )
        assert cells["training FLOPs"] == f"{row.training_flops_ratio:.3f}"
        assert cells["CPU seconds"] == f"{row.cpu_seconds:.0f}"
        found = row.against.get("static")
        assert cells["against static"].startswith("–" if found is None else points(found.mean, sign=True))
    printed = CliRunner().invoke(app, ["report", str(tmp_path), "--markdown", "--without", "seconds, size"])
    assert printed.exit_code == 0 and printed.output == markdown(rows, without=["seconds", "size"])
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(OptionError, match=r"no column 'second'.*seconds"):
        markdown(rows, without=["second"])


def test_labels_separate_variants_of_one_method(tmp_path: Path) -> None:
    for label in ("static", "static (uniform)"):
        fake.run(tmp_path / f"{label}-0.9-s0", "static", 0.9, 0, label=label)
    rows = {row.label: row for row in leaderboard(collect(tmp_path))}
    found = rows["static (uniform)"].against["static"]
    assert found is not None and found.mean == 0.0 and found.low is None


def test_table_json_is_plain_and_whole(tmp_path: Path) -> None:
    comparison = collect(fake.comparison(tmp_path / "cmp"))
    rows = leaderboard(comparison)
    path = write_table(tmp_path / "cmp" / "table.json", comparison, rows)
    read = json.loads(path.read_text())
    assert len(read["rows"]) == len(rows) == 15
    assert read["rows"][0]["accuracy"] == rows[0].accuracy
    assert {entry["run"] for entry in read["not_counted"]} == {run.name for run in comparison.problems}
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("width", [70, 76, 80, 84, 90, 100, 120, 190])
def test_the_terminal_table_fits_its_width_and_takes_text_as_text(tmp_path: Path, width: int) -> None:
    folder = fake.comparison(tmp_path / "cmp")
    fake.run(folder / "odd-0.9-s0", "rigl", 0.9, 0, label="[red]\x1b[31mrigl[/red]\ud800", accuracy=0.91)
    fake.run(folder / "bad-0.9-s0", "rigl", 0.9, 0, label="bad", status="failed", error="[bold]\x1b[2J", accuracy=None)
    comparison = collect(folder)
    out = io.StringIO()
    print_leaderboard(Console(file=out, width=width, force_terminal=False), leaderboard(comparison), comparison)
    text = out.getvalue()
    text.encode("utf-8")
    assert "\x1b" not in text
    assert "[red]" in text and "[bold]" in text
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    row = next(row for row in leaderboard(comparison) if row.label == "rigl" and row.sparsity_asked == 0.9)
    assert f"{points(row.accuracy)} ± {points(row.accuracy_sd)}" in text
    assert ("left out for the terminal" in text) == (width < 190)


def test_further_evaluations_have_their_columns(tmp_path: Path) -> None:
    for seed, share in ((0, 0.25), (1, 0.75), (2, None)):
        fake.run(tmp_path / f"rigl-0.9-s{seed}", "rigl", 0.9, seed, evaluations={"fgsm_accuracy": share})
        fake.run(tmp_path / f"static-0.9-s{seed}", "static", 0.9, seed)
    comparison = collect(tmp_path)
    rows = leaderboard(comparison)
    assert {row.label: row.evaluations for row in rows} == {"rigl": {"fgsm_accuracy": 0.5}, "static": {}}
    out = io.StringIO()
    print_leaderboard(Console(file=out, width=250), rows, comparison)
    assert "fgsm_accuracy %" in out.getvalue() and "50.00" in out.getvalue()
    assert json.loads(write_table(tmp_path / "table.json", comparison, rows).read_text())["rows"][0]["evaluations"] == {
        "fgsm_accuracy": 0.5
    }


def test_numbers_are_short() -> None:
    assert [si(value) for value in (0, 12, 999, 1000, 26611, 266610, 1.2e9)] == [
        "0",
        "12",
        "999",
        "1.00 k",
        "26.6 k",
        "267 k",
        "1.20 G",
    ]
    assert si(1_066_440, "B") == "1.07 MB" and si(None) == "-"
    assert (times(0.1023), times(1.0), times(None)) == ("0.102x", "1.00x", "-")
    assert (points(0.97413), points(0.0042, sign=True), points(-0.0042, sign=True)) == ("97.41", "+0.42", "-0.42")
    assert [duration(value) for value in (9.71, 125.4, 7300.0)] == ["9.7 s", "2 min 5 s", "2 h 1 min"]
