"""The report in a real browser: opened from a file, clicked through, compared with the numbers that Python computes."""

from __future__ import annotations

import os
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from rarefy.report import collect, leaderboard, write_html
from rarefy.report.numbers import duration, points
from rarefy.report.overlap import overlaps
from rarefy.report.page import payload

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Locator, Page

fake = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "report" / "fake_runs.py")))
HOSTILE = "<img src=x onerror=alert(1)>"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def found_chromium() -> str | None:
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = found_chromium()
    lacking = "no chromium" if path is None else None
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking = "no playwright"
    if lacking:
        said = f"{lacking}: install it (Debian: apt-get install chromium), or name the browser in CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(said)
        pytest.skip(said)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = fake.comparison(tmp_path_factory.mktemp("report") / "cmp")
    return made


class Opened:
    """A page with all that it said on the console and all that it asked for."""

    def __init__(self, browser: Browser, file: Path, **options: Any) -> None:
        self.page: Page = browser.new_page(viewport={"width": 1300, "height": 1000}, **options)
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", self._dialog)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def _dialog(self, dialog: Dialog) -> None:
        self.trouble.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def close(self) -> None:
        self.page.close()
        assert self.trouble == []
        assert [url for url in self.requests if not url.startswith("file://")] == []
        assert len(self.requests) == 1


@pytest.fixture
def opened(browser: Browser, folder: Path, tmp_path: Path) -> Iterator[Page]:
    report = Opened(browser, write_html(folder, tmp_path / "report.html"))
    yield report.page
    report.close()


def column(page: Page, key: str) -> list[str]:
    return values(page.locator(f'#table td[data-key="{key}"]'))


def values(nodes: Locator) -> list[str]:
    found: list[str] = nodes.evaluate_all("nodes => nodes.map(node => node.dataset.value ?? '')")
    return found


def test_the_table_shows_the_numbers_that_python_computes(opened: Page, folder: Path) -> None:
    rows = leaderboard(collect(folder))
    assert opened.locator("#table tbody tr").count() == len(rows)
    for row in rows:
        level = "dense" if row.sparsity_asked is None else f"{row.sparsity_asked:g}"
        line = opened.locator(f'#table tr[data-label="{row.label}"][data-sparsity="{level}"]')
        for key in ("accuracy", "flops_ratio", "training_flops_ratio", "parameters", "bytes", "seconds", "peak_memory"):
            cell = line.locator(f'td[data-key="{key}"]')
            assert float(cell.get_attribute("data-value") or "nan") == pytest.approx(getattr(row, key), rel=1e-8)
        assert points(row.accuracy) in line.locator('td[data-key="accuracy"]').inner_text()
        assert f"CPU {duration(row.cpu_seconds)}" in line.locator('td[data-key="seconds"]').inner_text()
        found = row.against.get("static")
        if found is not None:
            said = line.locator('td[data-key="static"]').inner_text().replace("\u2212", "-")
            assert said.startswith(points(found.mean, sign=True))
            assert ("*" in said) == found.clear
    best = opened.locator('#table tr[data-sparsity="0.98"] td[data-key="accuracy"] .best')
    assert best.count() == 1
    assert points(max(row.accuracy or 0 for row in rows if row.sparsity_asked == 0.98)) in best.inner_text()
    reasons = opened.locator("#problems").inner_text()
    for run in collect(folder).problems:
        assert run.name in reasons and run.reason and run.reason in reasons
    for warning in collect(folder).warnings:
        assert warning in opened.locator("#warnings").inner_text()


def test_headers_sort_up_and_down(opened: Page) -> None:
    for key in ("label", "sparsity", "accuracy", "static", "flops_ratio", "seconds"):
        before = column(opened, key)
        head = opened.locator(f'#table th[data-key="{key}"]')
        head.locator("button").click()
        first, way = column(opened, key), head.get_attribute("aria-sort")
        head.locator("button").click()
        second = column(opened, key)
        assert sorted(first) == sorted(second) == sorted(before)
        for found, down in ((first, way == "descending"), (second, way == "ascending")):
            known: list[Any] = [value if key == "label" else float(value) for value in found if value]
            assert known == sorted(known, reverse=down), key
            assert all(found[: len(known)]), "rows without a number come last"
        assert first != second
        assert opened.locator("#table th[aria-sort]").count() == 1
    opened.get_by_role("button", name="98 %").first.click()
    assert set(column(opened, "sparsity")) == {"0", "0.98"}


def test_a_legend_entry_hides_and_shows_its_line(opened: Page) -> None:
    entry = opened.locator('#accuracy .legend button[data-label="rigl"]')
    line = opened.locator('#accuracy-plot g[data-label="rigl"]')
    assert line.count() == 1 and entry.get_attribute("aria-pressed") == "true"
    entry.focus()
    opened.keyboard.press("Enter")
    assert line.count() == 0 and entry.get_attribute("aria-pressed") == "false"
    entry.click()
    assert line.count() == 1
    assert opened.locator('#accuracy-plot g[data-label="static"] [data-value]').count() == 2


def test_points_and_curves_explain_themselves(opened: Page, folder: Path) -> None:
    row = next(row for row in leaderboard(collect(folder)) if (row.label, row.sparsity_asked) == ("rigl", 0.98))
    opened.locator('#accuracy-plot g[data-label="rigl"] [data-value]').last.focus()
    said = opened.locator("#tip").inner_text()
    assert "rigl at 98 %" in said and points(row.accuracy) in said
    opened.keyboard.press("Escape")
    assert opened.locator("#tip").is_hidden()
    opened.locator("#loss-plot svg").hover()
    assert "Step" in opened.locator("#tip").inner_text() and "static" in opened.locator("#tip").inner_text()


def test_curves_follow_their_selectors(opened: Page) -> None:
    traces = opened.locator("#loss-plot path.trace")
    names = traces.evaluate_all("paths => paths.map(path => path.dataset.name)")
    assert sorted(names) == sorted(fake.METHODS)
    before = traces.first.get_attribute("d")
    opened.select_option("#curves-seed", "1")
    assert traces.first.get_attribute("d") != before
    opened.select_option("#curves-seed", "all")
    opened.select_option("#curves-sparsity", "all")
    assert traces.count() == 44  # 45 runs, of which one has no folder
    before = traces.first.get_attribute("d")
    opened.locator("#curves").get_by_role("button", name="Linear").click()
    assert traces.first.get_attribute("d") != before


def test_mask_flips_show_the_runs_whose_masks_move(opened: Page, folder: Path) -> None:
    moving = [run for run in payload(collect(folder))["runs"] if run["flips"]]
    traces = opened.locator("#flips-plot path.trace")
    at = [run["name"] for run in moving if run["sparsity"] == 0.9 and run["seed"] == 0]
    assert {name.split("-")[0] for name in at} >= {"set", "rigl"} and traces.count() == len(at)
    opened.select_option("#flips-seed", "all")
    opened.select_option("#flips-sparsity", "0.98")
    assert traces.count() == sum(run["sparsity"] == 0.98 for run in moving)


def test_layers_topology_overlap_and_details_follow_their_selectors(opened: Page, folder: Path) -> None:
    shown = payload(collect(folder))
    runs = {run["name"]: index for index, run in enumerate(shown["runs"])}
    opened.select_option("#density-run", str(runs["static-0.98-s1"]))
    result = next(run.result for run in collect(folder).finished if run.name == "static-0.98-s1")
    shares = [float(value) for value in values(opened.locator("#density-plot g[data-value]"))]
    assert result is not None
    assert shares == pytest.approx([layer.kept / layer.numel for layer in result.layers])

    for name in ("set-0.9-s1", "gradual-0.9-s0"):
        opened.select_option("#topology-run", str(runs[name]))
        events = next(run for run in collect(folder).runs if run.name == name).curves.topology
        dropped, grown = (sum(row[at] for rows in events.values() for row in rows if row[0] > 0) for at in (1, 2))
        said = opened.locator("#topology-total").inner_text()
        assert f"{dropped:,} weights dropped and {grown:,} grown in {len(events['fc1.weight']) - 1} updates" in said
    opened.select_option("#topology-layer", label="fc2.weight")
    dropped = sum(row[1] for row in events["fc2.weight"] if row[0] > 0)
    assert f"{dropped:,} weights dropped" in opened.locator("#topology-total").inner_text()

    opened.select_option("#topology-run", str(runs["set-0.9-s1"]))
    assert opened.locator("#topology-plot g[data-step]").count() == 10
    matrices, _ = overlaps(collect(folder))
    for title in ("Seeds of rigl at 98 %", "Methods at 90 %, seed 1"):
        index = next(index for index, matrix in enumerate(matrices) if matrix.title == title)
        opened.select_option("#overlap-group", label=title)
        cells = [float(value) for value in values(opened.locator("#overlap-plot g[data-value]"))]
        assert cells == pytest.approx([value for line in matrices[index].values for value in line], rel=1e-3)
        texts = opened.locator("#overlap-plot g[data-value] text").all_text_contents()
        size = len(matrices[index].names)
        assert texts == [f"{value:.2f}" if n % (size + 1) else "1" for n, value in enumerate(cells)]

    opened.select_option("#details-run", str(runs["set-0.98-s2"]))
    details = opened.locator("#details").inner_text()
    assert "scores hold NaN" in details and "Example CPU" in details and "batch_size" in details


def test_labels_do_not_overlap_and_nothing_sticks_out(browser: Browser, folder: Path, tmp_path: Path) -> None:
    report = Opened(browser, write_html(folder, tmp_path / "report.html"), color_scheme="dark")
    for width in (1600, 1300, 900):
        report.page.set_viewport_size({"width": width, "height": 900})
        report.page.wait_for_timeout(150)
        assert report.page.evaluate("document.documentElement.scrollWidth") <= width
        touching = report.page.evaluate(
            """() => [...document.querySelectorAll('svg.plot')].flatMap(plot => {
                const boxes = [...plot.querySelectorAll('text')].filter(text => !text.getAttribute('transform'))
                    .map(text => [text.textContent, text.getBoundingClientRect()]);
                const apart = (one, two) => one.left >= two.right - 1 || two.left >= one.right - 1
                    || one.top >= two.bottom - 3 || two.top >= one.bottom - 3;
                return boxes.flatMap(([a, one], i) => boxes.slice(i + 1).filter(([b, two]) => !apart(one, two))
                    .map(([b]) => `${plot.getAttribute('aria-label')}: ${a} / ${b}`));
            })"""
        )
        assert touching == [], width
    report.close()


def test_hostile_names_are_inert(browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "cmp"
    layer = {"name": HOSTILE, "shape": [2, 8], "kept": 4, "numel": 16, "flops": 8.0, "flops_dense": 32.0}
    events = '{"kind":"topology","step":%d,"layer":"<img src=x onerror=alert(1)>","dropped":2,"grown":2,"kept":4}\n'
    for seed in range(2):
        for label in (HOSTILE, "__proto__", "static"):
            text = {"label": label, "model": HOSTILE, "dataset": HOSTILE}
            run = fake.run(folder / f"{label}-0.9-s{seed}", "static", 0.9, seed, layers=[layer], masks=None, **text)
            (run / "config.yaml").write_text(HOSTILE)
            (run / "environment.json").write_text('{"cpu": "<img src=x onerror=alert(1)>", "__proto__": {"a": 1}}')
            with (run / "metrics.jsonl").open("a") as file:
                file.write(events % 10 + events % 20)
    fake.run(folder / f"{HOSTILE}-0.9-s7", "rigl", 0.9, 7, label=HOSTILE, status="failed", error=HOSTILE)
    report = Opened(browser, write_html(folder, tmp_path / "report.html"))
    page = report.page
    for select in ("#density-run", "#topology-run", "#details-run"):
        for value in page.locator(f"{select} option").evaluate_all("options => options.map(option => option.value)"):
            page.select_option(select, value)
    page.locator("#density-plot g[data-value]").first.focus()
    assert page.locator("img").count() == 0
    for place in ("#table", "#problems", "#about", "#accuracy .legend", "#details", "#tip"):
        assert HOSTILE in page.locator(place).inner_text(), place
    report.close()


def test_a_single_run_and_an_empty_one_open_without_errors(browser: Browser, tmp_path: Path) -> None:
    whole = fake.run(tmp_path / "one", "rigl", 0.9, 0)
    dense = fake.run(tmp_path / "two", "dense", None, 0)
    bare = tmp_path / "three"
    bare.mkdir()
    (bare / "config.yaml").write_text("method: rigl\n")
    for run in (whole, dense, bare):
        report = Opened(browser, write_html(run))
        assert report.page.locator("#runs").count() == 1
        report.close()
