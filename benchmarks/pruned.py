"""Really pruned networks, not random masks: speed beside the dense engines, equal outputs, and file sizes.

    make bench-peers
    RAREFY_DATA=... python benchmarks/pruned.py [--threads 1 2] [--batch 1 16] [--run runs/NAME ...] [--json FILE]

SqueezeNet of Deep Compression (33 % of its weights kept, 227 x 227) and the LeNets of Dynamic Network Surgery (1.9 and
0.9 % kept), as published; with --run, networks that `rarefy train` has pruned, for example:

    rarefy train --model resnet-20 --data cifar10 --method gradual --sparsity 0.9 --name gradual-90

Files: a plain state dict in safetensors, the same zipped, and what `rarefy.save` writes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import rarefy
from networks import race, said
from peers import Peer, installed
from rarefy import models
from rarefy.training.finished import finished_network

PUBLISHED = {
    "squeezenet-imagenet-pruned": (3, 227, 227),
    "lenet-5-mnist-pruned": (1, 28, 28),
    "lenet-300-100-mnist-pruned": (1, 28, 28),
}


def sizes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of the model's file: dense, dense and zipped, and compressed."""
    with tempfile.TemporaryDirectory() as folder:
        dense, sparse = Path(folder) / "dense.safetensors", Path(folder) / "sparse.safetensors"
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, dense)
        rarefy.save(model, sparse)
        loaded = rarefy.load(sparse)
        assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())
        zipped = len(gzip.compress(dense.read_bytes(), 9))
        return {"dense": dense.stat().st_size, "zipped": zipped, "rarefy.save": sparse.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="folders of finished runs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peers", nargs="*", default=["onnxruntime", "openvino", "deepsparse"])
    parser.add_argument("--json", type=Path, help="append one line per measurement")
    args = parser.parse_args()
    os.environ.setdefault("RAREFY_CACHE", "")
    nets = {name: (models.load_published(name), shape) for name, shape in PUBLISHED.items()}
    for run in args.run:
        model, inputs = finished_network(run)
        nets[run.name] = (model, tuple(inputs.example.shape[1:]))
    for name, (model, _) in nets.items():
        weights = [p for p in model.parameters() if p.dim() > 1]
        kept, whole = sum(int(w.count_nonzero()) for w in weights), sum(w.numel() for w in weights)
        print(f"{name}: {kept:,} of {whole:,} weights kept ({kept / whole:.1%}); bytes {sizes(model)}", flush=True)
    for threads in args.threads:
        torch.set_num_threads(threads)
        with ExitStack() as stack:
            peers = [stack.enter_context(Peer(name, threads)) for name in args.peers if name in installed()]
            for name, (model, shape) in nets.items():
                for batch in args.batch:
                    torch.manual_seed(0)
                    found = race(model, torch.randn(batch, *shape), peers, args.rounds)
                    print(f"{name}, batch {batch}, {threads} thread(s): {said(found)}", flush=True)
                    if args.json:
                        with args.json.open("a") as file:
                            line = {"net": name, "batch": batch, "threads": threads, "ms": found}
                            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
