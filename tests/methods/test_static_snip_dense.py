"""Methods whose mask never changes, and the dense references."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from rarefy import models
from tests.engine.common import backward, batch, mlp


def test_static_keeps_exact_counts_at_positions_that_do_not_depend_on_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Linear(400, 300, bias=False)
    weight = model.weight.detach().abs().clone()
    sparse = rarefy.sparsify(model, "static", sparsity=0.9)
    mask = sparse.layers["weight"].mask()
    assert int(mask.sum()) == 12000
    correlation = torch.corrcoef(torch.stack([weight.flatten(), mask.float().flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.01
    assert float(mask.float().sum(0).std()) == pytest.approx((300 * 0.1 * 0.9) ** 0.5, rel=0.2)


def test_the_same_seed_gives_the_same_masks_and_another_seed_others() -> None:
    masks = []
    for seed, threads in ((1, 1), (1, 2), (2, 1)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        masks.append(rarefy.sparsify(mlp(), "static", sparsity=0.8, seed=seed).masks())
        torch.set_num_threads(before)
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])
    assert not all(torch.equal(masks[0][n], masks[2][n]) for n in masks[0])


def test_static_masks_never_change_and_the_global_random_state_is_not_used() -> None:
    rng = torch.get_rng_state()
    model = mlp()
    torch.set_rng_state(rng)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    sparse = rarefy.sparsify(model, "static", sparsity=0.8, optimizer=optimizer)
    assert torch.equal(rng, torch.get_rng_state())
    masks = sparse.masks()
    for step in range(5):
        backward(model, step)
        optimizer.step()
    assert all(torch.equal(masks[n], m) for n, m in sparse.masks().items())
    assert sparse.explored() == pytest.approx(1 - sparse.sparsity)


def test_fan_in_init_keeps_the_variance_of_the_dense_net() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 1000)
    dense, scaled, plain = (nn.Linear(1000, 200, bias=False) for _ in range(3))
    rarefy.sparsify(scaled, "static", sparsity=0.95)
    rarefy.sparsify(plain, "static", sparsity=0.95, init="dense")
    reference = float(dense(x).var())
    assert float(scaled(x).var()) == pytest.approx(reference, rel=0.1)
    assert float(plain(x).var()) == pytest.approx(0.05 * reference, rel=0.15)


@pytest.mark.parametrize("rule", ["uniform", "uniform+", "er", "erk", "global", "lamp"])
def test_every_allocation_reaches_the_sparsity(rule: str) -> None:
    model = models.build("resnet-20")
    sparse = rarefy.sparsify(model, "static", sparsity=0.9, allocation=rule)
    assert sparse.nnz == pytest.approx(0.1 * sparse.numel, abs=len(sparse.layers))


def test_sparsities_given_by_layer_name() -> None:
    by_hand = rarefy.sparsify(models.build("lenet-300-100"), "static", allocation={"fc1": 0.9, "*": 0.5})
    assert [layer.nnz for layer in by_hand.layers.values()] == [23520, 15000, 500]
    for wrong in ({"fc1": 0.5}, {"*": 0.5, "fc1": 0.9}, {"*": 0.5, "nothing": 0.1}):
        with pytest.raises(rarefy.RarefyError, match="fits"):
            rarefy.sparsify(models.build("lenet-300-100"), "static", allocation=wrong)


def test_dense_training_is_bit_for_bit_what_it_is_without_rarefy() -> None:
    results = []
    for method in (None, "dense", "static"):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if method is not None:
            rarefy.sparsify(model, method, optimizer=optimizer, **({} if method == "dense" else {"sparsity": 0.0}))
        for step in range(5):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][n], other[n]) for other in results[1:] for n in other)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_small_dense_is_the_widest_net_within_the_budget(sparsity: float) -> None:
    method = rarefy.methods.SmallDense(sparsity=sparsity)
    model = method.model(lambda width: models.build("lenet-300-100", width=width))
    count = sum(p.numel() for p in model.parameters())
    sparse = rarefy.sparsify(models.build("lenet-300-100"), "static", sparsity=sparsity)
    budget = sparse.nnz + 410  # what a sparse net has: its kept weights and all biases
    hidden = model.state_dict()
    per_unit = max(784 + 1 + 100, 300 + 1 + 10)
    assert budget - 2 * per_unit <= count <= budget
    assert len(hidden) == 6
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    sparse = rarefy.sparsify(model, method)
    assert sparse.sparsity == 0


def test_snip_is_the_global_top_of_the_weight_times_its_gradient() -> None:
    model = mlp().double()
    twin = mlp().double()
    data = [tuple(t.double() if t.is_floating_point() else t for t in batch(seed)) for seed in (0, 1)]
    for x, y in data:  # summed over batches before the absolute value
        F.cross_entropy(twin(x), y).backward()
    scores = {n: (p * p.grad).abs().detach() for n, p in twin.named_parameters() if p.ndim == 2}
    sparse = rarefy.sparsify(model, "snip", sparsity=0.8, calibration=data)
    ranked = torch.cat([s.flatten() for s in scores.values()])
    keep = int(0.2 * ranked.numel() + 0.5)
    threshold = ranked.topk(keep).values[-1]
    assert sparse.nnz == keep
    for name, mask in sparse.masks().items():
        assert torch.equal(mask, scores[name] >= threshold)


def test_snip_does_not_depend_on_the_scale_of_the_loss_but_on_the_data() -> None:
    def masks(scale: float, seed: int) -> dict[str, torch.Tensor]:
        def loss(model: nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return scale * F.cross_entropy(model(pair[0]), pair[1])

        return rarefy.sparsify(mlp(), "snip", sparsity=0.8, calibration=[batch(seed)], loss=loss).masks()

    one, scaled, other = masks(1, 0), masks(64, 0), masks(1, 9)
    assert all(torch.equal(one[n], scaled[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


def test_snip_warns_when_a_layer_collapses() -> None:
    model = mlp()
    with torch.no_grad():
        model[3].weight.mul_(1e-6)
    model[1] = nn.Identity()
    with pytest.warns(UserWarning, match=r"keep no weight at all.*3\.weight"):
        rarefy.sparsify(model, "magnitude", sparsity=0.8)
