"""MobileNetV1 built by hand from native layers, batch 1, 224 x 224, random zeros in its 1 x 1 layers: time, and time by layer.

python benchmarks/program.py [--sparsity 0.9] [--threads 1 2] [--batch 1] [--layers]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peers import ENVIRONMENTS, HERE, Peer
from rarefy.kernels import planes, sparse_layers
from rarefy.kernels.program import Program, ProgramBuilder

# Output channels and stride of the thirteen pairs of a depthwise and a 1 x 1 layer.
BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


def weights(sparsity: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Random weights that keep the activations' scale, and biases, by layer."""
    g = torch.Generator().manual_seed(0)

    def layer(*shape: int, zeros: float = 0.0) -> tuple[Tensor, Tensor]:
        w = torch.randn(shape, generator=g)
        if zeros:
            keep = torch.rand(shape, generator=g).flatten().argsort()[int(zeros * w.numel()) :]
            w = torch.zeros(w.numel()).index_copy(0, keep, w.flatten()[keep]).view(shape)
        fan_in = max(1.0, float((w != 0).sum()) / shape[0])
        return w * (2 / fan_in) ** 0.5, 0.1 * torch.randn(shape[0], generator=g)

    made, channels = {"stem": layer(32, 3, 3, 3)}, 32
    for i, (out, _) in enumerate(BLOCKS):
        made[f"dw{i}"] = layer(channels, 1, 3, 3)
        made[f"pw{i}"] = layer(out, channels, 1, 1, zeros=sparsity)
        channels = out
    made["fc"] = layer(1000, channels)
    return made


def native(w: dict[str, tuple[Tensor, Tensor]], batch: int, threads: int) -> Program:
    """The network as a program."""
    build = ProgramBuilder()
    x = build.input((3, 224, 224))
    stem = planes.dense_conv(*w["stem"], 224, stride=2, padding=1, act="relu")
    x, size, channels = build.add(stem, x, shape=(32, 112, 112), name="stem"), 112, 32
    for i, (out, stride) in enumerate(BLOCKS):
        depthwise = planes.depthwise(*w[f"dw{i}"], size, stride=stride, padding=1, act="relu")
        size = (size - 1) // stride + 1
        x = build.add(depthwise, x, shape=(channels, size, size), name=f"dw{i}")
        pointwise = sparse_layers.sparse_pointwise_layer(*w[f"pw{i}"], size, act="relu", batch=batch, threads=threads)
        x, channels = build.add(pointwise, x, shape=(out, size, size), name=f"pw{i}"), out
    x = build.add(planes.adaptive_avg_pool(channels, size), x, shape=(channels,), name="pool")
    return build.program(build.add(planes.dense_linear(*w["fc"]), x, shape=(1000,), name="fc"))


def reference(w: dict[str, tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """The same in torch."""
    x = F.relu(F.conv2d(x, *w["stem"], stride=2, padding=1))
    for i, (_, stride) in enumerate(BLOCKS):
        x = F.relu(F.conv2d(x, *w[f"dw{i}"], stride=stride, padding=1, groups=x.shape[1]))
        x = F.relu(F.conv2d(x, *w[f"pw{i}"]))
    return F.linear(x.mean((2, 3)), *w["fc"])


def onnx_file(w: dict[str, tuple[Tensor, Tensor]], batch: int, folder: str, peer: str) -> Path:
    """Write the network for the peers, with the onnx of one of them."""
    arrays = {
        f"{name}.{part}": t.numpy()
        for name, pair in w.items()
        for part, t in zip(("weight", "bias"), pair, strict=True)
    }
    np.savez(f"{folder}/weights.npz", strides=[s for _, s in BLOCKS], **arrays)
    command = [ENVIRONMENTS / peer / "bin/python", HERE / "mobilenet_onnx.py", f"{folder}/weights.npz", str(batch)]
    subprocess.run([*command, f"{folder}/net.onnx"], check=True)
    return Path(folder, "net.onnx")


def ours(program: Program, x: Tensor, repeats: int) -> list[float]:
    """Seconds of some runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        program(x)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", action="store_true", help="show the time of each layer")
    parser.add_argument("--peers", nargs="*", default=[], help="of those that are installed")
    args = parser.parse_args()
    w, x = weights(args.sparsity), torch.randn(args.batch, 3, 224, 224)
    for threads in args.threads:
        torch.set_num_threads(threads)
        program = native(w, args.batch, threads)
        with torch.inference_mode():
            expected = reference(w, x)
        error = float((program(x)[0] - expected).abs().max() / expected.abs().max())
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            peers = {name: stack.enter_context(Peer(name, threads)) for name in args.peers}
            for name, peer in peers.items():
                why = peer.network(onnx_file(w, args.batch, folder, args.peers[0]), x.numpy())
                if why:
                    raise SystemExit(f"{name}: {why}")
            mine, theirs = [], {name: [] for name in peers}
            for _ in range(args.rounds):
                mine += ours(program, x, 15)[3:]
                for name, peer in peers.items():
                    theirs[name] += peer.samples(6)[1:]
        median = statistics.median(mine)
        print(
            f"{threads} threads: {1e3 * median:.3f} ms (least {1e3 * min(mine):.3f}), error {error:.1e}, "
            f"memory between layers {program.arena_bytes(args.batch) / 1e6:.1f} MB"
        )
        for name, seconds in theirs.items():
            other = statistics.median(seconds)
            print(
                f"  {name}: {1e3 * other:.3f} ms (least {1e3 * min(seconds):.3f}), ours takes {median / other:.2f} of it"
            )
        if args.layers:
            for name, time_of in program.profile(x, repeats=50):
                print(f"  {name:6} {1e6 * time_of:7.1f} us")


if __name__ == "__main__":
    main()
