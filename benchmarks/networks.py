"""Whole networks at batch 1 and 16, 224 x 224: accelerate() beside PyTorch and the engines that users would pick.

    make bench-peers
    python benchmarks/networks.py [--nets mobilenet-v1 ...] [--sparsity 0.9] [--threads 1] [--batch 1] [--erk] [--json FILE]

Weights are random (He, scaled for their density) with random zeros: MobileNets and EfficientNet in their 1 x 1 convolutions,
ResNet-50 in all but the first, uniformly or by ERK (--erk). Timings only; outputs are compared with PyTorch's. All ways take
turns; medians in ms. The peers read an ONNX file and need the extra `rarefy[onnx]`; deepsparse gets opset 13.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

import rarefy
from peers import Peer, installed
from rarefy import allocation, models
from rarefy.deploy import export_onnx

SETTLE = 0.03  # seconds until the last way's threads have stopped spinning; the first run after it is not counted
NETS = ("mobilenet-v1", "mobilenet-v2", "efficientnet-b0", "resnet-50")


def network(name: str, sparsity: float, erk: bool) -> nn.Module:
    """Build a network with random zeros and batch norms that do something."""
    torch.manual_seed(0)
    model = models.build(name)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and m.in_channels > 3}
    if name != "resnet-50":
        convs = {n: m for n, m in convs.items() if m.kernel_size == (1, 1) and min(m.weight.shape[:2]) >= 16}
    share = "erk" if erk else "uniform"
    kept = allocation.counts({n: tuple(m.weight.shape) for n, m in convs.items()}, sparsity, share)
    for n, conv in convs.items():
        weight = conv.weight.data
        keep = torch.zeros(weight.numel(), dtype=torch.bool)
        keep[torch.randperm(weight.numel())[: kept[n]]] = True
        weight.mul_(keep.view_as(weight)).mul_((weight.numel() / max(kept[n], 1)) ** 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval()


def once(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def race(model: nn.Module, x: torch.Tensor, peers: list[Peer], rounds: int) -> dict[str, float]:
    """Return milliseconds by way of running the model on x; the ways take turns."""
    fast = rarefy.accelerate(model, x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    with torch.inference_mode(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        frozen = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model, x, check_trace=False)))
        expected = model(x)
        ways = {
            "rarefy": lambda: fast(x),
            "torch": lambda: model(x),
            "torch channels last": lambda: last(x_last),
            "torch frozen": lambda: frozen(x),
        }
        error = float((fast(x) - expected).abs().max() / expected.abs().max())
        taking = []
        if peers:
            path = Path(folder) / "net.onnx"
            export_onnx(model, x, path, opset=13)
            for peer in peers:
                if (why := peer.network(path, x.numpy())) is None:
                    gap = float((torch.from_numpy(peer.output()) - expected).abs().max() / expected.abs().max())
                    if gap > 1e-3:
                        print(f"  {peer.name} differs by {gap:.1e}")
                    taking.append(peer)
                else:
                    print(f"  {peer.name}: {why[:200]}")
        for run in ways.values():
            run()
        samples: dict[str, list[float]] = {way: [] for way in [*ways, *(p.name for p in taking)]}
        for _ in range(rounds):
            for way, run in ways.items():
                time.sleep(SETTLE)
                samples[way] += [once(run) for _ in range(6)][1:]
            for peer in taking:
                time.sleep(SETTLE)
                samples[peer.name] += peer.samples(6, 0.0)[1:]
    print(f"  outputs differ from torch's by {error:.1e}; runs as {fast.plan.choice}")
    return {way: statistics.median(found) * 1e3 for way, found in samples.items()}


def said(found: dict[str, float]) -> str:
    """Return the times in words, and the gain over the fastest dense way."""
    dense = min((ms, way) for way, ms in found.items() if way not in ("rarefy", "deepsparse"))
    times = ", ".join(f"{way} {ms:.3g}" for way, ms in sorted(found.items(), key=lambda item: item[1]))
    return f"{times} ms; {dense[0] / found['rarefy']:.2f}x the best dense ({dense[1]})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--erk", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peers", nargs="*", default=["onnxruntime", "openvino", "deepsparse"])
    parser.add_argument("--json", type=Path, help="append one line per network")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("RAREFY_CACHE", "")
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer(name, args.threads)) for name in args.peers if name in installed()]
        for name in args.nets:
            for sparsity in args.sparsity:
                model = network(name, sparsity, args.erk)
                found = race(model, torch.randn(args.batch, 3, 224, 224), peers, args.rounds)
                what = (
                    f"{name} {sparsity:.0%}{' ERK' if args.erk else ''}, batch {args.batch}, {args.threads} thread(s)"
                )
                print(f"{what}: {said(found)}", flush=True)
                if args.json:
                    line = {
                        "net": name,
                        "sparsity": sparsity,
                        "erk": args.erk,
                        "batch": args.batch,
                        "threads": args.threads,
                    }
                    with args.json.open("a") as file:
                        file.write(json.dumps(line | {"ms": found}) + "\n")


if __name__ == "__main__":
    main()
