"""Training on kept weights only, beside the same run on masks and the dense network: time and peak memory.

    RAREFY_DATA=... python benchmarks/compressed_training.py [--net mlp|resnet-20] [--sparsity 0.95] [--method rigl]
        [--steps 60] [--threads 1 2] [--json FILE]

`mlp` is 784-4000-1000-4000-10 on MNIST, `resnet-20` the CIFAR-10 network; batch 128, SGD with momentum, SET or RigL
every 20 steps here (so that updates are in the measured steps; the usual 100 costs less). Every line is a process of
its own.

step: median of the ordinary steps. update: what a step that rewires costs beyond that. epoch: the steps of one pass
over the training set, with updates every 100 steps, forward, backward and optimizer (the data are in memory). peak:
growth of the process's resident memory from before the model was built. Freed memory stays with the process (glibc's
thresholds are raised, for all three alike): otherwise every large tensor is fetched from the system page by page,
which costs more than a sparse convolution. `--fresh-pages` leaves that as it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from rarefy import data, models
from rarefy.metrics import PeakMemory

BATCH, EVERY = 128, 20
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
DATA = {"mlp": "mnist", "resnet-20": "cifar10"}


def build(net: str) -> nn.Module:
    if net == "resnet-20":
        return models.build("resnet-20")
    sizes = (784, 4000, 1000, 4000, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def measure(net: str, storage: str, method: str, sparsity: float, steps: int, threads: int) -> dict[str, Any]:
    """Train for some steps in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    bundle = data.load(DATA[net], download=False)
    x = bundle.train_x[: BATCH * 20].float().div_(255).sub_(0.45).div_(0.25)
    y = bundle.train_y[: BATCH * 20].long()
    x = x if net == "resnet-20" else x.flatten(1)
    times: list[float] = []
    loss = torch.tensor(0.0)
    with PeakMemory() as memory:
        model = build(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
        if storage != "dense":
            rarefy.sparsify(model, method, sparsity=sparsity, optimizer=optimizer, storage=storage, every=EVERY)
        for i in range(steps):
            part = slice(i % 20 * BATCH, (i % 20 + 1) * BATCH)
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[part]), y[part])
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
    plain = [t for i, t in enumerate(times, 1) if i > 3 and i % EVERY > 1]
    step = statistics.median(plain)
    # the step after an update builds the index structures of the new topology
    update = sum(statistics.median(times[first::EVERY]) - step for first in (EVERY - 1, EVERY))
    in_epoch = len(bundle.train_y) / BATCH
    return {
        "net": net, "storage": storage, "threads": threads, "step_ms": 1e3 * step,
        "update_ms": 1e3 * update if storage != "dense" else 0.0,
        "epoch_s": in_epoch * (step + (update / 100 if storage != "dense" else 0.0)),
        "peak_mb": memory.increase / 1e6, "loss": float(loss.detach()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="*", default=list(DATA), choices=list(DATA))
    parser.add_argument("--storage", nargs="*", default=["dense", "masked", "compressed"])
    parser.add_argument("--method", default="rigl")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--steps", type=int, default=61)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--fresh-pages", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", action="store_true", help="measure the one combination given in this process")
    o = parser.parse_args()
    if o.here:
        print(json.dumps(measure(o.net[0], o.storage[0], o.method, o.sparsity, o.steps, o.threads[0])))
        return
    environment = os.environ | ({} if o.fresh_pages else KEEP_PAGES)
    rows = []
    print(f"{'net':10} {'storage':10} threads  step ms  update ms  epoch s  peak MB   loss   step of masked")
    for net in o.net:
        for threads in o.threads:
            times: dict[str, float] = {}
            for storage in o.storage:
                arguments = ["--net", net, "--storage", storage, "--threads", threads, "--method", o.method]
                arguments += ["--sparsity", o.sparsity, "--steps", o.steps]
                done = subprocess.run(
                    [sys.executable, __file__, "--here", *map(str, arguments)],
                    check=True,
                    capture_output=True,
                    text=True,
                    env=environment,
                )
                row = json.loads(done.stdout)
                rows.append(row)
                times[storage] = row["step_ms"]
                ratio = f"{times[storage] / times['masked']:.2f}" if "masked" in times else "-"
                print(
                    f"{net:10} {storage:10} {threads:7} {row['step_ms']:8.1f} {row['update_ms']:10.1f} "
                    f"{row['epoch_s']:8.1f} {row['peak_mb']:8.0f} {row['loss']:7.4f} {ratio:>10}",
                    flush=True,
                )
    if o.json:
        o.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
