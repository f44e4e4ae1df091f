"""Other people's engines, each in its own environment (`make bench-peers`) and its own process, sampled in turns with ours.

A worker sleeps while another is measured, so that turns can be as short as a few samples: whatever else the machine
does falls on all alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent.parent / ".peers"
NAMES = ("mkl", "scipy", "onnxruntime", "openvino", "deepsparse")


def installed() -> list[str]:
    """Return the peers that `make bench-peers` has installed."""
    return [name for name in NAMES if (ENVIRONMENTS / name / "bin" / "python").exists()]


class Peer:
    """One peer's worker process with a number of threads. Use it in a `with`."""

    def __init__(self, name: str, threads: int) -> None:
        self.name, self._folder = name, tempfile.TemporaryDirectory()
        counts = {k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        environment = {**os.environ, **counts, "OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [ENVIRONMENTS / name / "bin" / "python", HERE / "workers" / f"run_{name}.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._folder.cleanup()

    def _ask(self, request: dict) -> dict:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"ok": False, "why": "its process has died"}
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"ok": False, "why": "its process has died"}

    def matmul(self, weight: np.ndarray, x: np.ndarray, form: str) -> str | None:
        """Build W [M, K] @ X [K, N] (form "planes") or X [N, K] @ W.T ("linear"); return why not, or None."""
        paths = {name: str(Path(self._folder.name, f"{name}.npy")) for name in ("weight", "x")}
        np.save(paths["weight"], weight)
        np.save(paths["x"], x)
        return self._why(self._ask({"case": {"op": "matmul", "form": form, **paths}}))

    def network(self, onnx: Path, x: np.ndarray) -> str | None:
        """Build the network in an ONNX file for one input; return why not, or None."""
        path = str(Path(self._folder.name, "x.npy"))
        np.save(path, x)
        return self._why(self._ask({"case": {"op": "network", "onnx": str(onnx), "x": path}}))

    @staticmethod
    def _why(answer: dict) -> str | None:
        return None if answer.get("ok") else str(answer.get("why"))

    def output(self) -> np.ndarray:
        """Run once and return the output, float32."""
        path = str(Path(self._folder.name, "y.npy"))
        why = self._why(self._ask({"save": path}))
        if why:
            raise RuntimeError(f"{self.name}: {why}")
        return np.load(path)

    def samples(self, count: int, seconds: float = 0.002) -> list[float]:
        """Return `count` samples, each the mean seconds of one run over about `seconds`."""
        return self._ask({"samples": count, "seconds": seconds}).get("seconds", [])
