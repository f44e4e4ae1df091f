"""Reading run folders: what is whole counts, what is not is listed with the reason."""

from __future__ import annotations

import io
import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rarefy.errors import DataError
from rarefy.report import collect, leaderboard, print_leaderboard, write_html
from rarefy.report.overlap import jaccard, overlaps, read_masks

fake = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fake_runs.py"))))


def change(run: Path, **entries: Any) -> None:
    path = run / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_a_comparison_is_read_and_broken_runs_are_listed_with_the_reason(tmp_path: Path) -> None:
    comparison = collect(fake.comparison(tmp_path / "cmp"))
    assert not comparison.single
    assert len(comparison.runs) == 45
    problems = {run.name: (run.status, run.reason or "") for run in comparison.problems}
    assert {name: status for name, (status, _) in problems.items()} == {
        "set-0.98-s2": "failed",
        "magnitude-0.9-s1": "unfinished",
        "gradual-0.98-s0": "corrupt",
        "snip-0.9-s2": "missing",
    }
    assert "scores hold NaN in layer 'fc2.weight'" in problems["set-0.98-s2"][1]
    assert "no result.json" in problems["magnitude-0.9-s1"][1]
    assert "compare.yaml asks for it" in problems["snip-0.9-s2"][1]
    assert any("Fewer than 3 seeds" in warning for warning in comparison.warnings)


def test_a_whole_comparison_has_no_warnings(tmp_path: Path) -> None:
    alike = ("dense", "small-dense", "static", "snip", "set", "rigl")
    comparison = collect(fake.comparison(tmp_path, alike, breakages=False))
    assert comparison.warnings == ()
    assert comparison.problems == ()


def test_one_run_folder_is_read_alone(tmp_path: Path) -> None:
    comparison = collect(fake.run(tmp_path / "mine", "rigl", 0.9, 0))
    assert comparison.single
    (run,) = comparison.runs
    assert (run.label, run.sparsity, run.seed) == ("rigl", 0.9, 0)
    assert len(run.curves.train_steps) == fake.STEPS
    assert set(run.curves.topology) == set(fake.SHAPES)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"accuracy": None}, "accuracy"),
        ({"accuracy": 97.4}, "accuracy"),
        ({"accuracy": math.nan}, "accuracy"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"status": "done"}, "status"),
        ({"seed": "first"}, "seed"),
        ({"layers": [{"name": "a", "shape": [2, 2], "kept": 5, "numel": 4}]}, "'a'"),
        ({"layers": [{"name": "a", "shape": [2, 3], "kept": 1, "numel": 4}]}, "'a'"),
    ],
)
def test_a_result_that_cannot_be_right_is_refused_by_name(tmp_path: Path, entries: dict[str, Any], said: str) -> None:
    change(fake.run(tmp_path / "rigl-0.9-s0", "rigl", 0.9, 0), **entries)
    fake.run(tmp_path / "static-0.9-s0", "static", 0.9, 0)
    comparison = collect(tmp_path)
    assert [run.name for run in comparison.finished] == ["static-0.9-s0"]
    assert said in (comparison.problems[0].reason or "")


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b'"text"'])
def test_garbage_in_any_file_stops_nothing(tmp_path: Path, content: bytes) -> None:
    fake.run(tmp_path / "static-0.9-s0", "static", 0.9, 0)
    broken = fake.run(tmp_path / "rigl-0.9-s0", "rigl", 0.9, 0)
    for file in list(broken.iterdir()):
        file.write_bytes(content)
    for name in ("compare.yaml", "planned.json"):
        (tmp_path / name).write_bytes(content)
    comparison = collect(tmp_path)
    assert [run.status for run in comparison.runs] == ["finished", "corrupt"]
    overlaps(comparison)


def test_an_interrupted_line_of_metrics_is_skipped_and_a_repeated_step_counts_once(tmp_path: Path) -> None:
    run = fake.run(tmp_path / "rigl-0.9-s0", "rigl", 0.9, 0)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 5, "loss": 0.125}\n{"kind": "train", "st')
    (read,) = collect(run).runs
    assert len(read.curves.train_steps) == fake.STEPS
    assert read.curves.train_loss[4] == 0.125
    assert read.notes == ("1 broken line of metrics.jsonl skipped",)


def test_the_same_run_twice_counts_once(tmp_path: Path) -> None:
    fake.run(tmp_path / "rigl-0.9-s0", "rigl", 0.9, 0)
    fake.run(tmp_path / "rigl-0.9-s0-copy", "rigl", 0.9, 0)
    comparison = collect(tmp_path)
    assert [run.status for run in comparison.runs] == ["finished", "duplicate"]


def test_an_unfair_comparison_says_why(tmp_path: Path) -> None:
    for seed in range(3):
        fake.run(tmp_path / f"rigl-0.9-s{seed}", "rigl", 0.9, seed)
        fake.run(tmp_path / f"set-0.9-s{seed}", "set", 0.9, seed, epochs=30, sparsity=0.85, parameters=90_000)
    said = " ".join(collect(tmp_path).warnings)
    lacking = ("no finished dense run", "no finished small-dense and no static")
    for part in (
        *lacking,
        "epochs (3, 30)",
        "unequal: 3 rigl; 30 set.",
        "85 % was reached",
        "parameters kept are unequal",
    ):
        assert part in said, part


def test_the_same_lack_at_many_sparsities_is_said_once(tmp_path: Path) -> None:
    for sparsity in (0.5, 0.8, 0.9):
        fake.run(tmp_path / f"rigl-{sparsity}-s0", "rigl", sparsity, 0)
    fake.run(tmp_path / "static-0.8-s0", "static", 0.8, 0)
    said = [line for line in collect(tmp_path).warnings if "baseline" in line]
    assert said == [
        "At 50 % and 90 % sparsity there is no finished small-dense and no static baseline.",
        "At 80 % sparsity there is no finished small-dense baseline.",
    ]


def test_routes_and_flops_that_are_unlike_are_named(tmp_path: Path) -> None:
    folder = fake.comparison(tmp_path / "mixed", sparsities=(0.9,), breakages=False)
    mixture, training = sorted(collect(folder).warnings, key=len, reverse=True)
    assert "train a dense network first (gradual, magnitude)" in mixture
    assert "sparse from the first step (rigl, set, snip, static)" in mixture
    assert "training FLOPs are unequal: magnitude 0.68x of dense, " in training
    console = Console(file=io.StringIO(), width=1000)
    print_leaderboard(console, leaderboard(collect(folder)), collect(folder))
    page = write_html(folder).read_text(encoding="utf-8")
    for warning in (mixture, training):
        assert f"note: {warning}" in console.file.getvalue()  # type: ignore[attr-defined]
        assert warning in page
    for seed in range(3):  # one allocation costs twice the other at the same sparsity
        change(folder / f"set-0.9-s{seed}", flops=0.2 * 2 * fake.TOTAL)
    assert any("forward FLOPs are unequal: set 0.2x of dense" in said for said in collect(folder).warnings)


def test_sharing_beside_masks_is_told(tmp_path: Path) -> None:
    for seed in range(3):
        fake.run(tmp_path / f"rigl-0.9-s{seed}", "rigl", 0.9, seed)
        fake.run(tmp_path / f"hashed-0.9-s{seed}", "gradual", 0.9, seed, method="stable-rps", label="hashed")
    assert any("hashed shares parameters and has no zeros" in said for said in collect(tmp_path).warnings)


def test_unlike_things_at_different_sparsities_are_not_mixed_up(tmp_path: Path) -> None:
    for seed in range(3):
        fake.run(tmp_path / f"rigl-0.9-s{seed}", "rigl", 0.9, seed)
        fake.run(tmp_path / f"gradual-0.98-s{seed}", "gradual", 0.98, seed)
    said = " ".join(collect(tmp_path).warnings)
    assert "mixes" not in said and "FLOPs are unequal" not in said


def test_a_method_by_its_other_name_has_its_family(tmp_path: Path) -> None:
    for seed in range(3):
        fake.run(tmp_path / f"rigl-0.9-s{seed}", "rigl", 0.9, seed)
        fake.run(tmp_path / f"dst-0.9-s{seed}", "gradual", 0.9, seed, method="dst", label="dst")
    assert "train a dense network first (dst)" in " ".join(collect(tmp_path).warnings)


def test_a_method_that_is_not_known_here_has_no_family(tmp_path: Path) -> None:
    for seed in range(3):
        fake.run(tmp_path / f"rigl-0.9-s{seed}", "rigl", 0.9, seed)
        fake.run(tmp_path / f"other-0.9-s{seed}", "gradual", 0.9, seed, method="other", label="other")
    assert "mixes" not in " ".join(collect(tmp_path).warnings)


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        collect(tmp_path / "nowhere")
    (tmp_path / "notes").mkdir()
    with pytest.raises(DataError, match="holds no run"):
        collect(tmp_path)


def test_overlap_of_masks_is_the_jaccard_index(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second = ({"a": rng.random((7, 11)) < 0.4, "b": rng.random((3, 5, 2)) < 0.2} for _ in range(2))
    for name, masks in (("first", first), ("second", second)):
        fake.write_masks(tmp_path / name, masks)
    common = sum(int((first[name] & second[name]).sum()) for name in first)
    either = sum(int((first[name] | second[name]).sum()) for name in first)
    found = jaccard(read_masks(tmp_path / "first"), read_masks(tmp_path / "second"))
    assert found is not None
    assert found[0] == pytest.approx(common / either, abs=0)
    expected = sum(first[name].sum() * second[name].sum() / first[name].size for name in first)
    kept = sum(int(mask.sum()) for masks in (first, second) for mask in masks.values())
    assert found[1] == pytest.approx(expected / (kept - expected))
    assert jaccard(read_masks(tmp_path / "first"), read_masks(tmp_path / "first")) is not None


def test_masks_that_do_not_fit_are_left_out_and_named(tmp_path: Path) -> None:
    for seed in range(3):
        fake.run(tmp_path / f"rigl-0.9-s{seed}", "rigl", 0.9, seed)
    change(tmp_path / "rigl-0.9-s1", masks="../rigl-0.9-s0/masks.safetensors")
    (tmp_path / "rigl-0.9-s2" / "masks.safetensors").write_bytes(b"\x00" * 40)
    found, notes = overlaps(collect(tmp_path))
    assert found == []
    assert len(notes) == 2 and all(name in " ".join(notes) for name in ("rigl-0.9-s1", "rigl-0.9-s2"))


def test_bits_beyond_the_end_of_a_mask_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.array([0xFF], np.uint8)}, tmp_path / "masks", metadata={"a": "[5]"})
    with pytest.raises(ValueError, match="beyond its 5 weights"):
        read_masks(tmp_path / "masks")


def test_a_dynamic_method_that_never_moved_is_told(tmp_path: Path) -> None:
    run = fake.run(tmp_path / "rigl-0.9-s0", "rigl", 0.9, 0)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(
        "\n".join(line for line in lines if "topology" not in line or '"step": 0' in line)
    )
    assert "The masks of rigl at 90 % never changed during training." in collect(run).warnings
