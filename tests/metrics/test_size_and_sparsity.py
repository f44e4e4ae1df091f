"""Counts of parameters and bytes against what is really stored; sparsity and compliance against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from rarefy.errors import OptionError, PatternError, SelectionError
from rarefy.kernels import pack_mask
from rarefy.metrics import compliance, csr_bytes, layer_sparsity, parameters, sparsity, storage_bytes


def random_mask(shape: tuple[int, ...], density: float = 0.2, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def tied_model() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 7), nn.Linear(7, 7))
    model[3].weight = model[2].weight
    return model


def test_parameters_are_counted_once_and_only_masks_prune() -> None:
    model, conv, fc = tied_model(), random_mask((5, 3, 3, 3)), random_mask((7, 7), seed=1)
    total = 135 + 5 + 5 + 5 + 49 + 7 + 7
    assert parameters(model) == (total, total)
    for masks in ({"0.weight": conv, "2.weight": fc}, {"0.weight": conv, "3.weight": fc}):
        kept, full = count = parameters(model, masks)
        assert (kept, full) == (total - 135 - 49 + int(conv.sum()) + int(fc.sum()), total)
        assert count.sparsity == pytest.approx(1 - kept / total)
    with pytest.raises(SelectionError, match=r"'4\.weight'"):
        parameters(model, {"4.weight": fc})
    with pytest.raises(OptionError, match="differ"):
        parameters(model, {"2.weight": fc, "3.weight": ~fc})


def test_parametrised_weights_take_masks_under_their_public_name() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    mask = random_mask((3, 4))
    assert parameters(model, {"0.weight": mask}) == (int(mask.sum()) + 3, 15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (16, 40), (11,), (4, 300)])
def test_bytes_equal_what_the_formats_hold(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(shape).to(dtype))
    model.b = nn.Parameter(torch.randn(3).to(dtype))
    mask = random_mask(shape)
    values = model.w.detach()[mask]
    bias = model.b.nbytes
    got = storage_bytes(model, {"w": mask})
    assert got.dense == model.w.nbytes + bias
    assert got.bitmask == pack_mask(mask).nbytes + values.nbytes + bias
    flat = mask.reshape(shape[0], -1) if len(shape) > 1 else mask[None]
    csr = flat.float().to_sparse_csr()
    crow, col = csr.crow_indices().to(torch.int32), csr.col_indices().to(torch.int32)
    assert got.csr == values.nbytes + crow.nbytes + col.nbytes + bias
    assert got.best == min(got[:3])
    smallest = np.min_scalar_type(flat.shape[1] - 1).itemsize
    assert storage_bytes(model, {"w": mask}, index_bytes=None).csr == got.csr - (4 - smallest) * len(values)


def test_best_chooses_for_each_tensor_and_unmasked_ones_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(64, 64))
    one = torch.zeros(64, 64, dtype=torch.bool)
    one[0, 0] = True
    got = storage_bytes(model, {"0.weight": one, "1.weight": torch.ones(64, 64, dtype=torch.bool)})
    dense = 64 * 64 * 4
    assert got.best == csr_bytes((64, 64), 1, 4) + dense + dense + 256
    assert storage_bytes(model) == (3 * dense + 256,) * 4
    with pytest.raises(OptionError, match="index_bytes is 3"):
        storage_bytes(model, index_bytes=3)


def test_sparsity_counts_exact_zeros() -> None:
    w = torch.tensor([0.0, -0.0, 1e-45, float("nan"), 2.0])
    assert sparsity(w) == pytest.approx(0.4)
    masks = {"a": torch.tensor([True, False, False, False]), "b": torch.ones(2, 2, dtype=torch.bool)}
    assert sparsity(masks) == 3 / 8 and layer_sparsity(masks) == {"a": 0.75, "b": 0.0}
    with pytest.raises(OptionError, match="sparsity of nothing"):
        sparsity({})


def test_compliance_against_loops() -> None:
    mask = random_mask((8, 12), 0.5, seed=3)
    groups = [mask[r, c : c + 4] for r in range(8) for c in range(0, 12, 4)]
    assert compliance(mask, "2:4").obeyed == sum(int(g.sum()) <= 2 for g in groups) / len(groups)
    columns = [mask[r : r + 4, c] for r in range(0, 8, 4) for c in range(12)]
    assert compliance(mask, "1:4@0").obeyed == sum(int(g.sum()) <= 1 for g in columns) / len(columns)
    sparse = random_mask((8, 12), 0.3, seed=4)
    sparse[:2, :3] = True
    blocks = [sparse[r : r + 2, c : c + 3] for r in range(0, 8, 2) for c in range(0, 12, 3)]
    got = compliance(sparse, "2x3")
    assert got.zero == sum(not b.any() for b in blocks) / len(blocks)
    assert got.obeyed == sum(bool(b.all()) or not b.any() for b in blocks) / len(blocks) > 0
    rows = torch.ones(6, 4, dtype=torch.bool)
    rows[1:3] = False
    rows[5, 0] = False
    assert compliance(rows, "row") == (9 / 24, 5 / 6, 2 / 6)
    assert compliance(rows.t(), "column").zero == 2 / 6
    assert math.isclose(compliance(rows, "fan-in").obeyed, 3 / 6)
    assert compliance(rows.float(), "unstructured") == (9 / 24, 1.0, 9 / 24)
    with pytest.raises(PatternError):
        compliance(rows, "2:5")
