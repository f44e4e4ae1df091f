"""What a run cost and gained: the numbers of result.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy import kernels
from rarefy._files import atomic_write
from rarefy.engine import Sparsifier
from rarefy.metrics import FlopsReport, flops, parameters, storage_bytes, training_flops
from rarefy.metrics.untouched import evaluating


def count(
    net: nn.Module,
    full: nn.Module,
    sparse: Sparsifier,
    example: Tensor,
    samples_per_step: float,
    steps: int,
) -> dict[str, Any]:
    """Return FLOPs, parameters, bytes and layers of a trained network beside the full dense one.

    Args:
        net: the network that was trained (small-dense: the narrower one).
        full: the un-narrowed dense network.
        example: input batch, on the CPU as both networks.
        samples_per_step: training samples per optimizer step.
        steps: optimizer steps of the run.
    """
    masks = {name: mask.cpu() for name, mask in sparse.masks().items()}
    with evaluating(net), evaluating(full):
        here, dense = flops(net, example, masks), flops(full, example)
    # a layer that the example did not reach, or reached in a way that cannot be counted, is not in the report
    cost = {name: entry for name, entry in sparse.training_cost().items() if name in here.layers}
    training = training_flops(here, cost, samples_per_step).total if cost else 3 * here.dense * steps * samples_per_step
    bytes_here = storage_bytes(net, masks)
    return {
        "sparsity": sparse.sparsity if sparse.layers else 0.0,
        "flops": here.sparse,
        "flops_dense": dense.dense,
        "training_flops": training,
        "training_flops_dense": 3 * dense.dense * steps * samples_per_step,
        "parameters": parameters(net, masks).kept,
        "parameters_dense": parameters(full).total,
        "storage_bytes": {
            "dense": storage_bytes(full).dense,
            "bitmask": bytes_here.bitmask if _any_zero(masks) else bytes_here.dense,
            "csr": bytes_here.csr if _any_zero(masks) else bytes_here.dense,
        },
        "explored": sparse.explored() if sparse.layers else None,
        "layers": _layers(sparse, here),
    }


def _any_zero(masks: Mapping[str, Tensor]) -> bool:
    return any(not bool(mask.all()) for mask in masks.values())


def _layers(sparse: Sparsifier, report: FlopsReport) -> list[dict[str, Any]]:
    rows = []
    for name, layer in sparse.layers.items():
        dense, kept = report.layers.get(name, (0.0, 0.0))
        shape = list(layer.shape)
        row = {
            "name": name,
            "shape": shape,
            "kept": layer.nnz,
            "numel": layer.numel,
            "flops": kept,
            "flops_dense": dense,
        }
        rows.append(row)
    return rows


def save_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks as packed bits, one uint8 tensor a layer, with each layer's shape as JSON in the metadata."""
    from safetensors.torch import save

    bits = {name: kernels.pack_mask(mask.cpu().contiguous()) for name, mask in masks.items()}
    shapes = {name: json.dumps(list(mask.shape)) for name, mask in masks.items()}
    shapes = shapes or {
        "masks": "none"
    }  # with nothing at all to write, safetensors writes a header that it cannot read
    with atomic_write(path) as file:
        file.write(save(bits, metadata=shapes))


def example_of(x: Tensor) -> Tensor:
    """Return a batch of one sample for counting."""
    one = x[:1].cpu()
    return one.clone() if isinstance(one, torch.Tensor) else one
