"""The native core as a guest in the process: instruction sets, forks, threads, and no second OpenMP runtime."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from rarefy import kernels
from rarefy.kernels import native as native_module
from rarefy.kernels.native import native

LEVELS = native.available_isas()


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        check=False,
    )


@pytest.mark.parametrize("name", LEVELS)
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    done = run_python("from rarefy import kernels; print(kernels.native_config()['isa'])", RAREFY_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_an_unknown_or_absent_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_python("from rarefy import kernels; kernels.native_config()", RAREFY_ISA="sse9")
    assert "RAREFY_ISA='sse9'" in done.stderr
    assert "baseline, avx2, avx512" in done.stderr
    for name in {"avx2", "avx512"} - set(LEVELS):
        with pytest.raises(ValueError, match="it has baseline"):
            native.set_isa(name)


def test_native_config_tells_what_runs() -> None:
    config = kernels.native_config()
    assert config["isa"] in config["available"]
    assert config["available"][0] == "baseline"
    assert config["threads"] == torch.get_num_threads() == kernels.threads()
    assert re.match(r"(gcc|clang) \d+", config["compiler"])


def use_every_kernel() -> bool:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(1_000_000, generator=g)
    mask = kernels.select_k(scores, 1000)
    kernels.apply_mask_(scores, mask)
    return bool(torch.equal(kernels.unpack_mask(kernels.pack_mask(mask), mask.shape), scores != 0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_go_on() -> None:
    torch.set_num_threads(2)
    assert use_every_kernel()
    child = multiprocessing.get_context("fork").Process(target=_use_native_only)
    child.start()
    child.join(60)
    alive = child.is_alive()
    if alive:
        child.kill()
    assert not alive, "the child hangs"
    assert child.exitcode == 0
    assert use_every_kernel()


def _use_native_only() -> None:
    """Call the native core alone: PyTorch's own OpenMP threads do not survive a fork."""
    bits = torch.empty(125_000, dtype=torch.uint8)
    bools = torch.empty(1_000_000, dtype=torch.uint8).numpy()
    bools[:] = 1
    native.pack_mask(bools, bits.numpy(), 2)
    sys.exit(0 if int(bits.numpy().min()) == 255 else 1)


def test_many_python_threads_may_call_at_once() -> None:
    results: list[bool] = []
    callers = [threading.Thread(target=lambda: results.append(use_every_kernel())) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert results == [True] * 6


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_no_second_openmp_runtime_is_loaded() -> None:
    use = "x = torch.randn(2_000_000); m = k.select_k(x, 100); k.pack_mask(m); k.apply_mask_(x, m); "
    runtimes = (
        "torch.mm(torch.ones(300, 300), torch.ones(300, 300)); "
        "import re; print(*set(re.findall(r'/.*lib(?:gomp|iomp|omp).*', open('/proc/self/maps').read())), sep='\\n')"
    )
    done = run_python("import torch; from rarefy import kernels as k; " + use + runtimes)
    assert len(done.stdout.splitlines()) == 1, (done.stdout, done.stderr)
    assert run_python("import torch; " + runtimes).stdout == done.stdout


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("policy", ["", "passive"])
def test_work_is_shared_on_pytorchs_own_threads(policy: str) -> None:
    """No thread beside PyTorch's: two pools that spin would run against each other for the same cores."""
    code = (
        "import os, torch; from rarefy import kernels as k; from rarefy.kernels.native import native\n"
        "torch.set_num_threads(3); x = torch.randn(2_000_000); x.mul(2).add(1); before = len(os.listdir('/proc/self/task'))\n"
        "for _ in range(50): k.select_k(x, 1000)\n"
        "print(native.shares_threads(), len(os.listdir('/proc/self/task')) - before)"
    )
    done = run_python(code, OMP_WAIT_POLICY=policy)
    # with the passive policy PyTorch's threads sleep, and a pool that looks out for a moment starts work sooner
    assert done.stdout.split() == (["False", "2"] if policy else ["True", "0"]), (done.stdout, done.stderr)


def test_threads_may_be_shared_or_not() -> None:
    shared = native.shares_threads()
    team = native_module._openmp_team()
    try:
        for address in (0, team):
            native.share_threads(address)
            assert native.shares_threads() == bool(address)
            assert use_every_kernel()
    finally:
        native.share_threads(team if shared else 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file's dependencies")
def test_the_extension_links_neither_torch_nor_openmp() -> None:
    import rarefy.kernels._native as module

    assert module.__file__ is not None
    done = subprocess.run(["ldd", module.__file__], capture_output=True, text=True, check=True)
    assert not re.search(r"^\s*lib(torch|c10|gomp|iomp|omp|mkl)", done.stdout, re.MULTILINE), done.stdout
