"""Out-of-distribution detection, attacks and the gradient's norm: by brute force, by hand, and without a trace."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.common import batch, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.errors import OptionError
from rarefy.metrics import Box, adversarial_accuracy, auroc, fgsm, gradient_norm, ood_auroc, pgd, pixel_box

SCORES = st.lists(st.integers(-3, 3).map(lambda n: n / 4), min_size=1, max_size=12)


# --- AUROC --------------------------------------------------------------------------------------------------------


@given(above=SCORES, below=SCORES)
@settings(max_examples=100, deadline=None)
def test_auroc_by_all_pairs(above: list[float], below: list[float]) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in above for b in below]
    found = auroc(torch.tensor(above), torch.tensor(below))
    assert found == pytest.approx(math.fsum(pairs) / len(pairs), abs=1e-15)
    assert found + auroc(torch.tensor(below), torch.tensor(above)) == pytest.approx(1)


def test_auroc_of_normal_scores_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    above, below = 1 + torch.randn(20_000, generator=generator), torch.randn(20_000, generator=generator)
    assert auroc(above, below) == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.01)  # Phi(1 / sqrt 2)


def test_confidence_is_the_largest_softmax_probability() -> None:
    inside, outside = torch.randn(40, 5) * 3, torch.randn(30, 5)
    expected = auroc(inside.double().softmax(-1).amax(-1), outside.double().softmax(-1).amax(-1))
    assert ood_auroc(inside, outside) == expected == ood_auroc(inside.softmax(-1), outside.softmax(-1), logits=False)
    assert ood_auroc(inside + 7, outside - 2) == pytest.approx(expected)  # logits are free of a constant


def test_scores_that_cannot_be_ranked() -> None:
    with pytest.raises(OptionError, match="no negative scores"):
        auroc(torch.ones(2), torch.ones(0))
    with pytest.raises(OptionError, match="positive scores hold NaN"):
        auroc(torch.tensor([math.nan]), torch.ones(1))


# --- attacks ------------------------------------------------------------------------------------------------------


def test_fgsm_of_a_linear_network_is_the_worst_case_in_the_box() -> None:
    """For two classes the loss falls with (w0 - w1) x, so the worst x in the box is known."""
    net = nn.Linear(6, 2).double()
    x, y = torch.rand(50, 6, dtype=torch.float64), torch.randint(2, (50,))
    direction = (net.weight[1] - net.weight[0]).detach().sign() * (1 - 2 * y[:, None])
    worst = (x + 0.1 * direction).clamp(0, 1)
    torch.testing.assert_close(fgsm(net, x, y, Box(0.1)), worst)
    torch.testing.assert_close(pgd(net, x, y, Box(0.1), steps=10, generator=torch.Generator().manual_seed(0)), worst)
    right = (net(worst).argmax(-1) == y).double().mean()
    assert adversarial_accuracy(net, [(x[:20], y[:20]), (x[20:], y[20:])], partial(fgsm, box=Box(0.1))) == float(right)


def images() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 4)
    )
    return net, torch.rand(32, 3, 8, 8), torch.randint(4, (32,))


def test_attacks_stay_in_the_box_and_the_stronger_is_stronger() -> None:
    net, pixels, y = images()
    net.eval()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    box = pixel_box(0.05, mean, std)
    m, s = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    x = (pixels - m) / s
    losses = [F.cross_entropy(net(x), y).item()]
    for attack in (fgsm, partial(pgd, steps=20, generator=torch.Generator().manual_seed(1))):
        moved = attack(net, x, y, box)
        back = moved * s + m
        assert back.min() >= -1e-6 and back.max() <= 1 + 1e-6
        assert (back - pixels).abs().max() <= 0.05 + 1e-6
        losses.append(F.cross_entropy(net(moved), y).item())
    assert losses[0] < losses[1] < losses[2]
    one = pgd(net, x, y, box, steps=1, step_size=box.eps)
    torch.testing.assert_close(one, fgsm(net, x, y, box))


def test_an_attack_leaves_no_trace() -> None:
    net, x, y = images()
    net[1].eval()
    net[5].weight.requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes, rng, kept = [m.training for m in net.modules()], torch.get_rng_state(), x.clone()
    generator = torch.Generator().manual_seed(0)
    for attack in (partial(fgsm, box=Box(0.1)), partial(pgd, box=Box(0.1), steps=3, generator=generator)):
        with torch.no_grad():  # as evaluation code often is
            found = adversarial_accuracy(net, [(x, y)], attack)
        with torch.inference_mode():
            assert 0 <= adversarial_accuracy(net, [(x.clone(), y)], attack) <= 1
    assert 0 <= found <= 1
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(rng, torch.get_rng_state()) and torch.equal(x, kept)
    assert [p.requires_grad for p in net.parameters()] == [True] * 4 + [False, True]
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert net[5].bias.grad is None


def test_the_modes_come_back_when_an_attack_fails() -> None:
    net, x, y = images()
    with pytest.raises(OptionError, match=r"from -1.9\d* to .*out of the box.*pixel_box"):
        adversarial_accuracy(net, [((x - 0.5) * 4, y)], partial(fgsm, box=Box(0.1)))  # normalised, and the box is not
    assert all(m.training for m in net.modules())
    with torch.no_grad():
        net[5].weight.fill_(math.inf)
    with pytest.raises(OptionError, match="no finite gradient"):
        adversarial_accuracy(net, [(x, y)], partial(fgsm, box=Box(0.1)))
    with pytest.raises(OptionError, match="no samples"):
        adversarial_accuracy(net, [], fgsm)
    with pytest.raises(OptionError, match="steps is 0"):
        pgd(net, x, y, Box(0.1), steps=0)


# --- the gradient's norm ------------------------------------------------------------------------------------------


def test_gradient_norm_is_that_of_backward_and_leaves_no_trace() -> None:
    model, twin = mlp(), mlp()
    data = [batch(0), batch(1)]
    sum(F.cross_entropy(twin(x), y) / 2 for x, y in data).backward()  # type: ignore[union-attr]
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in twin.parameters() if p.grad is not None))
    state, rng = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    assert gradient_norm(model, data) == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_gradient_norm_counts_kept_weights_in_every_storage() -> None:
    found = []
    for storage in ("masked", "compressed"):
        model = mlp().double()
        sparse = rarefy.sparsify(model, "static", sparsity=0.8, storage=storage)
        data = [(batch(0)[0].double(), batch(0)[1])]
        found.append(gradient_norm(model, data, masks=sparse.masks() if storage == "masked" else None))
        dense = gradient_norm(model, data)
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert dense == found[1]
    model = mlp()
    masks = rarefy.sparsify(model, "static", sparsity=0.8).masks()  # pruned weights have a gradient too
    assert gradient_norm(model, [batch(0)]) > gradient_norm(model, [batch(0)], masks=masks)
    with pytest.raises(OptionError, match="no batches"):
        gradient_norm(mlp(), [])
    with pytest.raises(OptionError, match="no parameter"):
        gradient_norm(mlp().requires_grad_(False), [batch(0)])
