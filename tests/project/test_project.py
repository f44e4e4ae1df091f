"""The project's own files hold together: pins, commands, layers of the build, and an import that stays light."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rarefy

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]


def test_constraints_are_plain_pins_and_torch_comes_first() -> None:
    assert PINS[0] == "torch==2.13.0"
    for pin in PINS:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", pin), pin


def test_every_dependency_is_pinned_and_every_pin_fits() -> None:
    pinned = dict(pin.split("==") for pin in PINS)
    for text in [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]:
        need = Requirement(text)
        if need.name == "rarefy":
            continue
        name = re.sub(r"[-_.]+", "-", need.name).lower()
        assert name in pinned, f"{need.name} has no pin in constraints.txt"
        assert pinned[name] in need.specifier, f"{need} does not allow the pin {pinned[name]}"


def test_the_package_has_no_upper_pins() -> None:
    for text in PROJECT["dependencies"]:
        assert not re.search(r"[<~]|==", text), text


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["test", "demo", "native"])
def test_make_knows_its_targets(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_old_python_is_refused_in_words(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(["make", f"PYTHON={old}", "test"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "rarefy needs Python 3.11 or newer" in done.stderr


def test_importing_rarefy_loads_nothing_heavy() -> None:
    heavy = (
        "lightning",
        "pytorch_lightning",
        "transformers",
        "accelerate",
        "sklearn",
        "scipy",
        "matplotlib",
        "pandas",
        "typer",
    )
    code = f"import sys, rarefy; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_show_config_tells_what_runs() -> None:
    config = rarefy.show_config()
    assert config.rarefy == rarefy.__version__
    assert config.isa in config.available
    assert config.isa in str(config)
    assert config.asdict()["threads"] == config.threads


def test_the_kernels_bring_no_shared_inline_functions() -> None:
    """An inline function compiled for AVX-512 may be the one copy the linker keeps, and then crashes an older CPU.

    So what kernel_*.cpp compile to may hold no weak symbol but those in the namespace of their own instruction set.
    """
    nm = shutil.which("nm")
    objects = sorted((ROOT / "build" / "editable").glob("CMakeFiles/rarefy_*.dir/csrc/kernel_*.o"))
    if nm is None or not objects:
        pytest.skip("no nm, or the core was not built in place")
    for path in objects:
        level = path.parts[-3].removeprefix("rarefy_").removesuffix(".dir")
        listing = subprocess.run([nm, "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        weak = [line for line in listing.splitlines() if re.search(r"^[0-9a-f]* [WVuw] ", line)]
        assert not [line for line in weak if f"rarefy::{level}" not in line], path.name
