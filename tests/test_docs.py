"""Text for readers is true today."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rarefy
from tests.engine.common import batch

ROOT = Path(__file__).parent.parent


def test_method_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("build_methods", ROOT / "docs" / "build_methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.pages().items():
        assert (module.FOLDER / name).read_text(encoding="utf-8") == text, "run: python docs/build_methods.py"


@pytest.mark.parametrize("name", rarefy.methods.available())
def test_a_methods_docstring_tells_every_option(name: str) -> None:
    known = rarefy.methods.available()
    cls, told = known[name], {name: known[name].__doc__ or ""}
    while more := {n for doc in told.values() for n in re.findall(r"`([\w-]+)`", doc) if n in known} - told.keys():
        told |= {n: known[n].__doc__ or "" for n in more}  # "as `set`": told there
    text = "".join(told.values())
    for option in (f.name for f in dataclasses.fields(cls)):
        assert option in text, f"{name}: option {option} is not told"
    if name not in ("dense", "small-dense"):
        assert re.search(r"arXiv \d{4}\.\d{4,5}", text)
        assert "Raises" in text


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it writes a file
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    model = torch.nn.Sequential(torch.nn.Linear(12, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
    names = {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": [batch(i) for i in range(3)],
        "loss_fn": torch.nn.CrossEntropyLoss(),
        "epochs": 1,
        "example_input": torch.randn(4, 12),
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_import_is_light() -> None:
    code = (
        "import sys, torch, time; start = time.perf_counter(); import rarefy; took = time.perf_counter() - start; "
        "heavy = [m for m in ('lightning', 'transformers', 'sklearn', 'scipy', 'matplotlib', 'typer', 'rich', 'pydantic') "
        "if m in sys.modules]; print(took); sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5  # under one second on a quiet machine; the modules above are the real check


def test_rooms_are_there_after_import_rarefy() -> None:
    code = "import rarefy; print(rarefy.models.build('lenet-5'), rarefy.data.load, rarefy.training.SparsityCallback)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    with pytest.raises(AttributeError, match="did you mean 'sparsify'"):
        _ = rarefy.sparsfy
