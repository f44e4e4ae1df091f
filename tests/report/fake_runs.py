"""Write run folders that look like a real comparison, without training: `python tests/report/fake_runs.py FOLDER`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SHAPES = {"fc1.weight": (300, 784), "fc2.weight": (100, 300), "fc3.weight": (10, 100)}
TOTAL = sum(math.prod(shape) for shape in SHAPES.values())
BIASES = 410
STEPS, EPOCHS = 1410, 3
METHODS = ("dense", "small-dense", "static", "magnitude", "gradual", "snip", "set", "rigl")
ACCURACY = {  # at 90 % and at 98 % sparsity; the noise between seeds grows with the loss
    "dense": (0.9782, 0.9782),
    "small-dense": (0.9569, 0.8214),
    "static": (0.9685, 0.9342),
    "magnitude": (0.9744, 0.9405),
    "gradual": (0.9768, 0.9611),
    "snip": (0.9721, 0.9480),
    "set": (0.9718, 0.9470),
    "rigl": (0.9741, 0.9549),
}
DYNAMIC = ("set", "rigl")


def comparison(
    folder: Path,
    methods: Sequence[str] = METHODS,
    sparsities: Sequence[float] = (0.9, 0.98),
    seeds: Sequence[int] = (0, 1, 2),
    breakages: bool = True,
) -> Path:
    """Write a comparison; with `breakages`, some runs failed, are unfinished, corrupt or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"methods": list(methods), "sparsities": list(sparsities), "seeds": list(seeds), "model": "lenet-300-100"}
    (folder / "compare.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in asked.items()))
    for method in methods:
        for sparsity in [None] if method == "dense" else sparsities:
            for seed in seeds:
                name = f"{method}-s{seed}" if sparsity is None else f"{method}-{sparsity:g}-s{seed}"
                run(folder / name, method, sparsity, seed)
    if breakages:
        broken = folder / "set-0.98-s2"
        result = json.loads((broken / "result.json").read_text())
        error = "OptionError: scores hold NaN in layer 'fc2.weight' [100, 300] at step 700"
        trouble = {"status": "failed", "error": error, "accuracy": None, "masks": None}
        (broken / "result.json").write_text(json.dumps({**result, **trouble}))
        (folder / "magnitude-0.9-s1" / "result.json").unlink()
        (folder / "gradual-0.98-s0" / "result.json").write_text('{"status": "finished", "accu')
        for file in (folder / "snip-0.9-s2").iterdir():
            file.unlink()
        (folder / "snip-0.9-s2").rmdir()
    return folder


def run(folder: Path, method: str, sparsity: float | None, seed: int, /, **changes: Any) -> Path:
    """Write one finished run; `changes` override entries of its `result.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1000 * METHODS.index(method) + 10 * int(100 * (sparsity or 0)) + seed)
    shared = np.random.default_rng(seed)  # what the methods of one seed have in common
    masked = method not in ("dense", "small-dense")
    density = 1.0 if sparsity is None else 1.0 - sparsity
    densities = _erk(density) if masked else dict.fromkeys(SHAPES, 1.0)
    kept = {name: int(densities[name] * math.prod(shape) + 0.5) for name, shape in SHAPES.items()}
    accuracy = float(np.interp(sparsity or 0.0, (0.9, 0.98), ACCURACY[method]))
    accuracy += 0.02 * (1 - accuracy) * (shared.normal() + rng.normal()) * 2
    parameters = sum(kept.values()) + BIASES if masked or sparsity is None else int(0.97 * density * (TOTAL + BIASES))
    share = parameters / (TOTAL + BIASES)
    extra = {"dense": 1.0, "gradual": 0.52, "magnitude": 0.68}.get(method, share * (1.04 if method == "rigl" else 1))
    started = f"2025-06-0{seed + 1}T10:00:00+00:00"
    result = {
        "status": "finished",
        "error": None,
        "method": method,
        "label": method,
        "sparsity_asked": sparsity,
        "sparsity": 1 - sum(kept.values()) / TOTAL if masked else 0.0,
        "seed": seed,
        "dataset": "mnist",
        "dataset_note": "official files from a local folder, 60,000 training and 10,000 test images",
        "model": "lenet-300-100",
        "accuracy": round(accuracy, 4),
        "loss": 3.2 * (1 - accuracy),
        "ece": 0.3 * (1 - accuracy),
        "epochs": EPOCHS,
        "steps": STEPS,
        "flops": 2.0 * TOTAL * share,
        "flops_dense": 2.0 * TOTAL,
        "training_flops": 6.0 * TOTAL * extra * STEPS * 128,
        "training_flops_dense": 6.0 * TOTAL * STEPS * 128,
        "parameters": parameters,
        "parameters_dense": TOTAL + BIASES,
        "storage_bytes": _storage(parameters, masked),
        "seconds": 9.0 + 2.5 * masked + float(rng.random()),
        "cpu_seconds": 18.0 + 5.0 * masked + float(rng.random()),
        "peak_memory_bytes": int(4.1e8 + 4e6 * rng.random()),
        "explored": min(1.0, density * (4.2 if method in DYNAMIC else 1.0)) if masked else None,
        "layers": [
            {
                "name": name,
                "shape": list(shape),
                "kept": kept[name],
                "numel": math.prod(shape),
                "flops": 2.0 * kept[name],
                "flops_dense": 2.0 * math.prod(shape),
            }
            for name, shape in SHAPES.items()
        ]
        if masked
        else [],
        "masks": "masks.safetensors" if masked else None,
        **changes,
    }
    environment = {
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "rarefy": "0.1.0",
        "cpu": "Example CPU @ 2.50GHz",
        "threads": 2,
        "native": {"available": True, "level": "avx512", "compiled": ["baseline", "avx2", "avx512"]},
        "platform": "Linux-6.1.0-x86_64",
        "started": started,
    }
    config = {"method": method, "sparsity": sparsity, "seed": seed, "epochs": EPOCHS, "batch_size": 128, "lr": 0.1}
    (folder / "config.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items()))
    (folder / "environment.json").write_text(json.dumps(environment, indent=1))
    (folder / "metrics.jsonl").write_text("\n".join(_metrics(method, densities, accuracy, rng)) + "\n")
    if masked:
        write_masks(folder / "masks.safetensors", _masks(method, kept, shared, rng))
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    return folder


def write_masks(path: Path, masks: dict[str, np.ndarray]) -> None:
    """Write boolean masks as packed little-endian bits with their shapes in the metadata."""
    packed = {name: np.packbits(mask.reshape(-1), bitorder="little") for name, mask in masks.items()}
    save_file(packed, path, metadata={name: json.dumps(list(mask.shape)) for name, mask in masks.items()})


def _erk(density: float) -> dict[str, float]:
    raw = {name: sum(shape) / math.prod(shape) for name, shape in SHAPES.items()}
    full: set[str] = set()
    while True:
        rest = density * TOTAL - sum(math.prod(SHAPES[name]) for name in full)
        scale = rest / sum(raw[name] * math.prod(SHAPES[name]) for name in SHAPES if name not in full)
        over = {name for name in SHAPES if name not in full and scale * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in full else scale * raw[name] for name in SHAPES}
        full |= over


def _masks(method: str, kept: dict[str, int], shared: np.random.Generator, rng: np.random.Generator) -> dict[str, Any]:
    masks = {}
    tie = {"set": 0.5, "rigl": 0.35, "static": 1.0}.get(method, 0.0)
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        useful = np.random.default_rng(7).random(size)  # pixels that matter are the same for every seed
        score = tie * shared.random(size) + (0.3 if method == "static" else 1.0) * rng.random(size)
        score = score + (0.0 if method in ("static", "set") else 0.6) * useful
        mask = np.zeros(size, bool)
        mask[np.argsort(-score, kind="stable")[: kept[name]]] = True
        masks[name] = mask.reshape(shape)
    return masks


def _metrics(method: str, densities: dict[str, float], accuracy: float, rng: np.random.Generator) -> list[str]:
    lines = []
    if method not in ("dense", "small-dense"):  # the first mask is logged as step 0
        for name, shape in SHAPES.items():
            kept = math.prod(shape) if method == "gradual" else int(math.prod(shape) * densities[name] + 0.5)
            event = {"step": 0, "layer": name, "dropped": math.prod(shape) - kept, "grown": 0, "kept": kept}
            lines.append(json.dumps({"kind": "topology", **event}))
    noise = rng.lognormal(0, 0.22, STEPS + 1)
    for step in range(1, STEPS + 1):
        epoch = (step - 1) * EPOCHS // STEPS
        loss = 2.3 * math.exp(-step / 90) + 3.2 * (1 - accuracy) + 0.35 * math.exp(-step / 600)
        seconds = step * 0.007
        train = f'"kind": "train", "step": {step}, "epoch": {epoch}, "lr": 0.1, "seconds": {seconds:.3f}'
        lines.append(f'{{{train}, "loss": {loss * noise[step]:.6f}}}')
        if step % 100 == 0 and step < 0.75 * STEPS and method in (*DYNAMIC, "gradual"):
            progress = step / (0.75 * STEPS)
            for name, shape in SHAPES.items():
                size = math.prod(shape)
                if method == "gradual":
                    now, before = (1 - (1 - densities[name]) * (1 - (1 - p) ** 3) for p in (progress, progress - 0.1))
                    counts = (max(0, int(size * (before - now))), 0, int(size * now))
                else:
                    kept = int(size * densities[name] + 0.5)
                    moved = int(0.15 * kept * (1 + math.cos(math.pi * progress)) * (densities[name] < 1))
                    counts = (moved, moved, kept)
                event = dict(zip(("dropped", "grown", "kept"), counts, strict=True))
                lines.append(json.dumps({"kind": "topology", "step": step, "layer": name, **event}))
        if step % (STEPS // 6) == 0:
            now = accuracy - 0.12 * math.exp(-step / 300) + 0.002 * float(rng.normal()) * (step < STEPS)
            scores = {"loss": 3.2 * (1 - now), "accuracy": now, "ece": 0.3 * (1 - now)}
            lines.append(json.dumps({"kind": "eval", "step": step, "epoch": epoch, "split": "test", **scores}))
    return lines


def _storage(parameters: int, masked: bool) -> dict[str, int]:
    dense = 4 * (TOTAL + BIASES if masked else parameters)
    return {"dense": dense, "bitmask": 4 * parameters + (TOTAL // 8) * masked, "csr": (8 if masked else 4) * parameters}


if __name__ == "__main__":
    print(comparison(Path(sys.argv[1])))
