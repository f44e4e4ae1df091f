"""2:4 on a CUDA device beside dense: forward, backward and a whole training step of one linear layer and of a block.

    python benchmarks/semi_structured.py [--dtype float16 bfloat16] [--shapes 4096x1024 ...] [--tokens 4096] [--json FILE]

A shape is out x in, the mask is transposable. "forward" is inference with a weight compressed beforehand; "training forward"
compresses the weight and its transpose anew, as every training step must; "backward" is dx on sparse tensor cores and a dense
dW. The step is that of a feed-forward block (in, out, in; GELU, mean square, AdamW). Every result is checked against the masked
dense layer; all ways take turns; medians of CUDA events, milliseconds. Without such a CUDA device it says why and ends with 2.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.kernels.semi_structured import device_problem
from rarefy.nn import semi_structured_
from rarefy.patterns import TransposableNM

SHAPES = ("1024x1024", "4096x1024", "4096x4096", "16384x4096")
Way = Callable[[], object]


def medians(ways: dict[str, Way], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each way; they take turns."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, run in ways.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(end))
    return {name: statistics.median(found) for name, found in samples.items()}


def masked(layers: list[nn.Linear]) -> None:
    """Zero the weights outside of a transposable 2:4 mask."""
    with torch.no_grad():
        for layer in layers:
            mask = TransposableNM(2, 4).project(layer.weight.float().abs().cpu(), keep=8)
            layer.weight.mul_(mask.to(layer.weight.device))


def sparse_twin(model: nn.Module) -> nn.Module:
    """Return a copy that runs on 2:4, or end with the reason why it cannot."""
    twin = copy.deepcopy(model)
    for name, reason in semi_structured_(twin, transposable=True).items():
        if reason is not None:
            raise SystemExit(f"{name or 'the layer'} cannot run as 2:4: {reason}")
    return twin


def check(name: str, found: Tensor, expected: Tensor) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < 3e-2:
        raise SystemExit(f"{name} is wrong by {error}")


def backward_of(layer: nn.Module, x: Tensor, dy: Tensor) -> Way:
    """Return a function that runs one layer's backward pass alone."""
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    inputs = [leaf, layer.get_parameter("0.weight")]
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def step_of(model: nn.Module, x: Tensor, wanted: Tensor) -> Way:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), wanted).backward()
        optimizer.step()

    return step


def measure(out: int, inside: int, tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    to = {"device": "cuda", "dtype": dtype}
    dense = nn.Sequential(nn.Linear(inside, out, **to))
    masked([dense[0]])
    sparse, x, dy = sparse_twin(dense), torch.randn(tokens, inside, **to), torch.randn(tokens, out, **to)
    with torch.inference_mode():
        check("forward", sparse(x), dense(x))
    backward, expected = backward_of(sparse, x, dy), backward_of(dense, x, dy)
    mask = dense[0].weight != 0
    (dx, dw), (want_x, want_w) = backward(), expected()  # type: ignore[misc]
    check("dx", dx, want_x)
    check("dW", dw, want_w * mask)

    def forward_of(model: nn.Module) -> Way:
        def run() -> Tensor:
            with torch.inference_mode():
                return model(x)

        return run

    trained = sparse_twin(dense)

    def training_forward() -> Tensor:
        with torch.no_grad():
            trained[0].weight.add_(0)  # it has changed, as after an optimizer's step
        return trained(x)

    block = nn.Sequential(nn.Linear(inside, out, **to), nn.GELU(), nn.Linear(out, inside, **to))
    masked([block[0], block[2]])
    wanted = torch.randn(tokens, inside, **to)
    return medians(
        {
            "dense forward": forward_of(dense),
            "2:4 forward": forward_of(sparse),
            "2:4 training forward": training_forward,
            "dense backward": expected,
            "2:4 backward": backward,
            "dense step": step_of(copy.deepcopy(block), x, wanted),
            "2:4 step": step_of(sparse_twin(block), x, wanted),
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["float16", "bfloat16"], choices=["float16", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    problem = "there is none" if not torch.cuda.is_available() else device_problem(torch.device("cuda"))
    if problem is not None:
        print(f"this benchmark needs a CUDA device with sparse tensor cores: {problem}", file=sys.stderr)
        raise SystemExit(2)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {args.tokens} tokens")
    rows = []
    for dtype in args.dtype:
        for shape in args.shapes:
            out, inside = map(int, shape.split("x"))
            found = measure(out, inside, args.tokens, getattr(torch, dtype), args.rounds)
            rows.append({"dtype": dtype, "out": out, "in": inside, "tokens": args.tokens, "ms": found})
            gains = [
                f"{part} {found[f'dense {part}'] / found[f'2:4 {part}']:.2f}x"
                for part in ("forward", "backward", "step")
            ]
            said = ", ".join(f"{name} {ms:.3f}" for name, ms in found.items())
            print(f"{dtype} {shape}: {said}; {', '.join(gains)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
