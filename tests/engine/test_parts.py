"""The small parts: sampling, summary with FLOPs, small questions about devices and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rarefy
from rarefy.kernels.sampling import sample
from tests.engine.common import backward, batch, mlp


@given(population=st.integers(1, 300), share=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_sample_draws_different_integers(population: int, share: float, seed: int) -> None:
    count = int(share * population)
    drawn = sample(population, count, torch.Generator().manual_seed(seed))
    assert drawn.numel() == count == drawn.unique().numel()
    assert count == 0 or (int(drawn.min()) >= 0 and int(drawn.max()) < population)
    assert torch.equal(drawn, sample(population, count, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("count", [3, 8])  # by rejection, and by permutation
def test_sample_is_uniform(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hits = torch.zeros(20)
    for _ in range(4000):
        hits[sample(20, count, generator)] += 1
    expected = 4000 * count / 20
    assert (hits - expected).abs().max() < 5 * (expected * (1 - count / 20)) ** 0.5


def test_sample_needs_no_memory_for_the_population() -> None:
    drawn = sample(10**10, 1000, torch.Generator().manual_seed(0))
    assert drawn.unique().numel() == 1000
    assert int(drawn.max()) > 2**32


def test_summary_counts_flops_of_the_real_masks() -> None:
    model = mlp()
    sparse = rarefy.sparsify(model, "static", sparsity=0.8, exclude="5", allocation="uniform")
    summary = sparse.summary(batch(0)[0])
    dense = 2 * (12 * 16 + 16 * 20 + 20 * 5)
    assert summary.flops == (2 * (38 + 64 + 100), dense)
    assert [row.flops for row in summary.rows] == [2 * 38, 2 * 64]
    text = str(summary)
    for part in ("0.weight", "16x12", "80.", "excluded by '5': 5.weight", "bias or vector", "normalisation"):
        assert part in text
    assert "FLOPs" not in str(sparse.summary())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_train(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.75, optimizer=optimizer, every=1, stop=9)
    for _ in range(4):
        model(batch(0)[0].to(dtype)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(not layer.weight()[~layer.mask()].any() for layer in sparse.layers.values())
    assert any(event.grown for event in sparse.events if event.step)


def test_channels_last_weights_are_masked_too() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.75, optimizer=optimizer, every=1, stop=9)
    for _ in range(3):
        model(torch.randn(2, 8, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(not layer.weight()[~layer.mask()].any() for layer in sparse.layers.values())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_on_a_gpu_masks_are_those_of_the_cpu() -> None:
    masks = []
    for device in ("cpu", "cuda"):
        model = mlp().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=device == "cuda")
        sparse = rarefy.sparsify(model, "set", sparsity=0.8, optimizer=optimizer, every=100)
        for step in range(3):
            x, y = (t.to(device) for t in batch(step))
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        masks.append({name: mask.cpu() for name, mask in sparse.masks().items()})
        assert all(not layer.weight()[~layer.mask()].any() for layer in sparse.layers.values())
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


@pytest.mark.gpu
def test_a_model_may_move_to_the_gpu_later() -> None:
    model = mlp()
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, every=2)
    backward(model, 0)
    sparse.step()
    model.zero_grad()
    model.cuda()
    x, y = (t.cuda() for t in batch(0))
    nn.functional.cross_entropy(model(x), y).backward()
    sparse.step()
    assert all(layer.mask().is_cuda for layer in sparse.layers.values())
