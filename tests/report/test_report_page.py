"""The page as a file: stand-alone, small, atomic, and inert whatever text the runs hold."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rarefy.report import collect, leaderboard, write_html
from rarefy.report.page import embedded, payload
from rarefy.report.thinning import flip_rates, smoothed, spread_out, thin_topology

fake = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fake_runs.py"))))
HOSTILE = "</script><img src=x onerror=alert(1)><!--{{script}}&amp;\u2028\ud800"


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert len(found) == 1
    data: dict[str, Any] = json.loads(found[0])
    return data


def test_the_page_holds_the_numbers_of_the_leaderboard(tmp_path: Path) -> None:
    folder = fake.comparison(tmp_path / "cmp")
    page = write_html(folder)
    assert page == folder / "report.html"
    rows = {(row.label, row.sparsity_asked): row for row in leaderboard(collect(folder))}
    shown = data_of(page)["rows"]
    assert len(shown) == len(rows)
    for row in shown:
        assert row["accuracy"] == pytest.approx(rows[row["label"], row["sparsity_asked"]].accuracy, rel=1e-8)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//|@import|url\(\s*[\"']?(?!#)", text)
    for tag in ("script", "style"):  # the policy allows exactly what is inside
        body = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        assert body is not None
        digest = base64.b64encode(hashlib.sha256(body.group(1).encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in text
    assert not list(folder.glob(".*"))


def test_hostile_text_stays_inside_the_data(tmp_path: Path) -> None:
    folder = tmp_path / "<b>cmp"
    text = {"label": HOSTILE, "dataset": HOSTILE, "model": HOSTILE, "storage_bytes": {HOSTILE: 1}}
    fake.run(folder / "a-0.9-s0", "rigl", 0.9, 0, **text)
    fake.run(folder / "b-0.9-s0", "static", 0.9, 0, status="failed", error=HOSTILE)
    page = write_html(folder, tmp_path / "out" / "page.html")
    written = page.read_text(encoding="utf-8")
    assert "onerror" in written and "<img" not in written
    assert written.count("</script>") == 2 and "<b>" not in written
    assert HOSTILE in {run["label"] for run in data_of(page)["runs"]}


def test_embedded_json_comes_back_as_it_was() -> None:
    value = {"a": HOSTILE, "b": [1.5, None, "</SCRIPT >", "]]>"]}
    text = embedded(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028") & set(text)


def test_sixty_long_runs_of_many_layers_stay_small(tmp_path: Path) -> None:
    folder = tmp_path / "cmp"
    layers = [f"layer{stage}.{block}.conv{n}.weight" for stage in range(3) for block in range(9) for n in (1, 2)]
    train = '{"kind": "train", "step": %d, "epoch": 0, "loss": %f, "lr": 0.1}'
    lines = [train % (step, 1 / step) for step in range(1, 5000)]
    test = '{"kind": "eval", "step": %d, "epoch": 1, "loss": 0.1, "accuracy": 0.987654321}'
    lines += [test % (9 * step) for step in range(500)]
    event = '{"kind": "topology", "step": %d, "layer": "%s", "dropped": %d, "grown": %d, "kept": 12345}'
    steps = range(100, 5000, 100)
    lines += [event % (step, name, 4000 - step // 2, 4001 - step // 2) for step in steps for name in layers]
    text = "\n".join(lines)
    for seed in range(60):
        run = fake.run(folder / f"rigl-0.9-s{seed}", "rigl", 0.9, seed)
        (run / "metrics.jsonl").write_text(text)
    page = write_html(folder)
    assert page.stat().st_size < 2_000_000
    data = data_of(page)
    assert all(len(run["train"]["steps"]) <= 400 for run in data["runs"])
    assert data["runs"][0]["train"]["steps"][0] == 1 and data["runs"][0]["train"]["steps"][-1] == 4999


def test_a_run_without_numbers_still_makes_a_page(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    (run / "config.yaml").write_text("method: rigl\n")
    data = data_of(write_html(run))
    assert data["single"] and data["rows"] == [] and data["runs"][0]["status"] == "unfinished"


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    run = fake.run(tmp_path / "rigl-0.9-s0", "rigl", 0.9, 0, loss=float("inf"), flops=None)
    (run / "metrics.jsonl").write_text('{"kind":"train","step":1,"loss":NaN}\n{"kind":"train","step":2,"loss":1e400}')
    shown = payload(collect(tmp_path))
    json.dumps(shown, allow_nan=False)
    assert shown["runs"][0]["train"]["loss"] == [None, None]
    assert shown["rows"][0]["loss"] is None and shown["rows"][0]["flops_ratio"] is None


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake.run(tmp_path / "run", "rigl", 0.9, 0)
    page = write_html(folder)
    before = page.read_bytes()

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_html(folder)
    assert page.read_bytes() == before
    assert [path.name for path in folder.glob(".*")] == []


def test_thinning_keeps_ends_and_totals() -> None:
    assert spread_out(5, 9).tolist() == [0, 1, 2, 3, 4]
    picked = spread_out(100_001, 400)
    assert len(picked) == 400 and picked[0] == 0 and picked[-1] == 100_000
    values = np.array([1.0, np.nan, 3.0, 5.0, 7.0])
    assert smoothed(values, 3).tolist() == [1.0, 2.0, 4.0, 5.0, 6.0]
    events = {"a": [(step, 2 * step, step, 50) for step in range(1, 11)], "b": [(4, 7, 7, 9)]}
    thin = thin_topology(events, 5)
    assert thin is not None and thin["joined"] == 2 and thin["steps"] == [2, 4, 6, 8, 10]
    assert sum(thin["dropped"][0]) * 2 == 110
    assert thin["dropped"][1] == [None, 7, None, None, None]
    assert thin_topology({}, 5) is None


def test_flip_rates_add_up_to_all_flips() -> None:
    events = {
        "a": [(0, 50, 0, 50), (100, 6, 4, 48), (200, 0, 0, 48)],
        "b": [(0, 5, 0, 5), (100, 1, 1, 5), (250, 2, 3, 6)],
    }
    rates = flip_rates(events, 200, 99)
    assert rates == {"steps": [100, 200, 250], "rate": [12 / 200 / 100, 0, 5 / 200 / 50]}
    joined = flip_rates(events, 200, 2)
    assert joined == {"steps": [200, 250], "rate": [12 / 200 / 200, 5 / 200 / 50]}
    assert flip_rates({"a": [(0, 50, 0, 50)]}, 100, 9) is None and flip_rates({}, 0, 9) is None
