"""Training FLOPs: the closed forms, and the measured sums against them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rarefy.errors import OptionError, SelectionError
from rarefy.metrics import (
    LayerCost,
    dense_training_flops,
    flops,
    gradual_training_flops,
    rigl_training_flops,
    snfs_training_flops,
    static_training_flops,
    training_flops,
)

MODEL = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
SIZES = {name: p.numel() for name, p in MODEL.named_parameters() if p.dim() > 1}
X = torch.zeros(2, 3, 8, 8)


def kept_masks(fraction: float) -> dict[str, torch.Tensor]:
    masks = {}
    for name in SIZES:
        mask = torch.zeros(MODEL.get_parameter(name).shape, dtype=torch.bool)
        mask.view(-1)[: int(fraction * mask.numel())] = True
        masks[name] = mask
    return masks


def cost(steps: int, fraction: float, dense_steps: int = 0) -> dict[str, LayerCost]:
    return {n: LayerCost(steps, steps * int(m.sum()), dense_steps) for n, m in kept_masks(fraction).items()}


REPORT = flops(MODEL, X, kept_masks(0.25))


def test_rigl_tends_to_static_and_is_dense_when_nothing_is_sparse() -> None:
    assert rigl_training_flops(2.0, 20.0, 10**9) == pytest.approx(static_training_flops(2.0), rel=1e-8)
    for every in (1, 7, 100):
        assert rigl_training_flops(5.0, 5.0, every) == pytest.approx(dense_training_flops(5.0))
    assert rigl_training_flops(2.0, 20.0, 0) == snfs_training_flops(2.0, 20.0) == 24.0  # every step is an update
    with pytest.raises(OptionError, match="every is -1"):
        rigl_training_flops(1.0, 1.0, -1)


def test_dense_training_costs_three_forward_passes() -> None:
    total = training_flops(REPORT, {}, samples_per_step=16, steps=10)
    assert total.total == total.dense == 160 * dense_training_flops(REPORT.dense) and total.ratio == 1.0
    full = {name: LayerCost(10, 10 * size, 10) for name, size in SIZES.items()}
    assert training_flops(REPORT, full, 16).total == pytest.approx(total.total)


def test_static_training_equals_its_closed_form() -> None:
    measured = training_flops(REPORT, cost(40, 0.25), samples_per_step=16)
    assert measured.total == pytest.approx(16 * 40 * static_training_flops(REPORT.sparse), rel=1e-12)
    for name, layer in REPORT.layers.items():
        assert measured.layers[name] == pytest.approx(16 * 40 * 3 * layer.sparse, rel=1e-12)


def test_snfs_equals_its_closed_form() -> None:
    measured = training_flops(REPORT, cost(40, 0.25, dense_steps=40), samples_per_step=16)
    assert measured.total == pytest.approx(16 * 40 * snfs_training_flops(REPORT.sparse, REPORT.dense), rel=1e-12)


@pytest.mark.parametrize("every", [2, 10, 100])
def test_rigl_equals_its_closed_form_with_one_plain_step_less(every: int) -> None:
    # Here the update is one of every `every` steps; the paper adds it to `every` plain ones.
    measured = training_flops(REPORT, cost(3 * every, 0.25, dense_steps=3), samples_per_step=1)
    expected = rigl_training_flops(REPORT.sparse, REPORT.dense, every - 1)
    assert measured.total / (3 * every) == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(static_training_flops(REPORT.sparse) + (REPORT.dense - REPORT.sparse) / every)


def test_further_gradients_cost_one_product_each() -> None:
    """Top-KAST: forward and input gradient on A, weight gradient on B, 2 f_A + f_B."""
    used, trained = cost(40, 0.25), cost(40, 0.5)
    both = {n: LayerCost(40, c.kept_steps, 0, trained[n].kept_steps - c.kept_steps) for n, c in used.items()}
    f_a, f_b = (flops(MODEL, X, kept_masks(fraction)).sparse for fraction in (0.25, 0.5))
    assert training_flops(REPORT, both, 16).total == pytest.approx(16 * 40 * (2 * f_a + f_b), rel=1e-12)
    with pytest.raises(OptionError, match="cannot have the sums"):
        training_flops(REPORT, {"0.weight": LayerCost(2, 2 * SIZES["0.weight"], 0, 1)}, 1)


def test_gradual_pruning_equals_its_closed_form() -> None:
    fractions = [1.0, 0.75, 0.5, 0.25]
    sums = {n: LayerCost(4, sum(int(kept_masks(f)[n].sum()) for f in fractions)) for n in SIZES}
    measured = training_flops(REPORT, sums, samples_per_step=8)
    assert measured.total == pytest.approx(8 * 4 * gradual_training_flops(REPORT.dense, [1 - f for f in fractions]))
    with pytest.raises(OptionError, match="at least one"):
        gradual_training_flops(1.0, [])
    with pytest.raises(OptionError, match=r"in \[0, 1\]"):
        gradual_training_flops(1.0, [1.5])


def test_layers_without_masks_and_attention_count_as_dense() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = flops(model, torch.zeros(2, 5, 8))
    size = model.linear1.weight.numel()
    measured = training_flops(report, {"linear1.weight": LayerCost(10, 10 * size // 2)}, samples_per_step=4)
    sparse_layer = report.layers["linear1.weight"].dense
    assert measured.total == pytest.approx(3 * 40 * (report.dense - sparse_layer / 2))
    assert measured.layers["self_attn:attention"] == 3 * 40 * report.layers["self_attn:attention"].dense


def test_a_layer_that_computes_nothing_adds_nothing() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    report = flops(model, torch.zeros(1, 3, dtype=torch.long))
    measured = training_flops(report, {"0.weight": LayerCost(5, 5 * 20)}, 1)
    assert measured.layers["0.weight"] == 0 and measured.ratio == 1.0
    assert training_flops(flops(nn.Identity(), torch.zeros(1, 3)), {}, 1, steps=3).ratio == 1.0


def test_sums_that_cannot_be_are_refused() -> None:
    good = cost(10, 0.25)
    with pytest.raises(SelectionError, match=r"no weight '0.wieght' \(did you mean '0.weight'\?\)"):
        training_flops(REPORT, {"0.wieght": good["0.weight"]}, 1)
    with pytest.raises(OptionError, match="one number of steps"):
        training_flops(REPORT, {**good, "0.weight": LayerCost(9, 9)}, 1)
    with pytest.raises(OptionError, match="pass steps="):
        training_flops(REPORT, {}, 1)
    with pytest.raises(OptionError, match="cannot have the sums"):
        training_flops(REPORT, {"0.weight": LayerCost(1, SIZES["0.weight"] + 1)}, 1)
    with pytest.raises(OptionError, match="cannot have the sums"):
        training_flops(REPORT, {"0.weight": LayerCost(1, 1, 2)}, 1)
    with pytest.raises(OptionError, match="samples_per_step is 0"):
        training_flops(REPORT, good, 0)
