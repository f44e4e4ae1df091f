"""Small models and the one question that every engine test asks: is the model exactly as sparse as it says?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy import Sparsifier


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 5)
    )


def batch(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 12, generator=generator), torch.randint(5, (size,), generator=generator)


def backward(model: nn.Module, seed: int) -> Tensor:
    x, y = batch(seed)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def assert_sparse(sparse: Sparsifier, sparsity: float | None = None) -> None:
    """Weights, gradients and per-element optimizer state are zero outside the mask; the counts are what was asked."""
    for layer in sparse.layers.values():
        mask, weight = layer.mask(), layer.target.parameter
        assert int(mask.sum()) == layer.nnz
        assert not weight.detach()[~mask].any(), f"{layer.name} revived"
        assert weight.grad is None or not weight.grad[~mask].any(), f"{layer.name} has a gradient outside its mask"
        for optimizer in sparse._optimizers.all:
            if isinstance(optimizer, torch.optim.Rprop | torch.optim.Adagrad):
                continue  # their fresh state is not zero: see test_optimizer_state
            for key, value in optimizer.state.get(weight, {}).items():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    assert (value[~mask].abs() <= 1e-7).all(), f"{layer.name}: {key} remembers dropped weights"
    if sparsity is not None:
        assert sparse.nnz == int((1 - sparsity) * sparse.numel + 0.5)
