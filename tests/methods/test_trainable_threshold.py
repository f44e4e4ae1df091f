"""Trainable thresholds against the paper's formulas, step by step."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.errors import OptionError
from rarefy.nn import ThresholdMask
from tests.engine.common import backward, mlp


def thresholds(sparse: rarefy.Sparsifier) -> list[Tensor]:
    return [layer.extras["threshold"] for layer in sparse.layers.values()]


def test_a_step_is_the_papers_loss_written_out() -> None:
    """SGD on L + alpha sum exp(-t) by hand, with the masks in the user's own forward pass, gives the same numbers."""
    torch.manual_seed(0)
    alpha, lr = 0.01, 0.3
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    weights = [model[i].weight.detach().clone().requires_grad_() for i in (0, 2)]
    biases = [model[i].bias.detach().clone().requires_grad_() for i in (0, 2)]
    masks = [ThresholdMask(w) for w in weights]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    sparse = rarefy.sparsify(model, "dst", optimizer=optimizer, alpha=alpha, collapse=0.0)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(12, 6, generator=generator).double(), torch.randint(3, (12,), generator=generator)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        hidden = F.linear(x, masks[0](weights[0]), biases[0]).tanh()
        loss = F.cross_entropy(F.linear(hidden, masks[1](weights[1]), biases[1]), y)
        loss = loss + alpha * sum(m.threshold.neg().exp().sum() for m in masks)
        everything = [*weights, *biases, *(m.threshold for m in masks)]
        with torch.no_grad():
            for p, g in zip(everything, torch.autograd.grad(loss, everything), strict=True):
                p.sub_(lr * g)
        for layer, w, m in zip(sparse.layers.values(), weights, masks, strict=True):
            torch.testing.assert_close(layer.trained(), w.detach(), rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(layer.extras["threshold"], m.threshold, rtol=1e-11, atol=1e-12)
            assert torch.equal(layer.mask(), m.kept(w))
    assert 0 < sparse.sparsity < 1


def test_the_penalty_alone_raises_thresholds_ever_more_slowly() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparse = rarefy.sparsify(model, "trainable-threshold", optimizer=optimizer, alpha=0.02)
    expected = 0.0
    for _ in range(5):
        (0.0 * model(torch.randn(4, 12)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected += 0.5 * 0.02 * torch.tensor(-expected).exp().item()
        for t in thresholds(sparse):
            torch.testing.assert_close(t, torch.full_like(t, expected))


def test_without_penalty_and_slope_it_is_dense_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.nn.reparametrisation.long_tailed", torch.zeros_like)
    weights = []
    for method in ("dst", "dense"):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        options = {"alpha": 0.0} if method == "dst" else {}
        sparse = rarefy.sparsify(model, method, optimizer=optimizer, **options)
        for step in range(8):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(sparse.finalize().state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_loss_that_needs_its_weights_lowers_thresholds() -> None:
    torch.manual_seed(0)
    model = nn.Linear(10, 2, bias=False)
    truth = torch.randn(2, 10) * 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparse = rarefy.sparsify(model, "dst", optimizer=optimizer, alpha=0.0)
    for _ in range(60):
        x = torch.randn(64, 10)
        (model(x) - x @ truth.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((t < 0).all() for t in thresholds(sparse)), "weights that grow want lower thresholds"
    assert sparse.sparsity == 0.0


def test_more_alpha_more_zeros_and_masks_that_move_between_steps() -> None:
    kept = []
    for alpha in (0.0, 2e-3, 1e-2, 3e-2):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparse = rarefy.sparsify(model, "dst", optimizer=optimizer, alpha=alpha)
        masks, moved = sparse.masks(), 0
        for step in range(12):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            now = sparse.masks()
            moved += any(not torch.equal(mask, masks[name]) for name, mask in now.items())
            masks = now
        kept.append(1 - sparse.sparsity)
        if alpha > 2e-3:
            assert moved >= 10
    assert kept == sorted(kept, reverse=True) and kept[0] > 0.95 > 0.6 > kept[-1]


def test_a_dropped_weight_comes_back() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparse = rarefy.sparsify(model, "dst", optimizer=optimizer, alpha=1e-2)
    before, revived = sparse.masks(), 0
    for step in range(20):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        now = sparse.masks()
        revived += sum(int((mask & ~before[name]).sum()) for name, mask in now.items())
        before = now
    assert revived > 0
    assert sum(e.grown for e in sparse.events) == 0, "moves are logged once in 100 steps"


@pytest.mark.parametrize(("kept", "fires"), [(1, True), (2, True), (3, False)])
def test_a_layer_at_one_percent_begins_again_and_no_other(kept: int, fires: bool) -> None:
    model = nn.Sequential(nn.Linear(20, 10, bias=False), nn.Linear(10, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse = rarefy.sparsify(model, "dst", optimizer=optimizer, alpha=0.0)
    first, second = thresholds(sparse)
    with torch.no_grad():
        model.get_submodule("0.parametrizations.weight").original.copy_(torch.arange(200.0).view(10, 20) / 200 + 0.01)
        first.fill_((199.5 - kept) / 200 + 0.01)  # of 200: 1 % is 2
        second.fill_(0.01)
    model(torch.randn(3, 20)).sum().backward()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.step()
    assert bool(said) is fires
    if fires:
        assert "0.weight kept" in str(said[0].message)
        assert not first.any() and sparse.layers["0.weight"].nnz == 200
        assert sparse.memory == {"resets": {"0.weight": 1}}
    else:
        assert sparse.layers["0.weight"].nnz == kept and sparse.memory == {}
    assert (second == 0.01).all()


def test_divergence_is_said_and_not_reset_away() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rarefy.sparsify(model, "dst", optimizer=optimizer)
    with torch.no_grad():
        model.get_submodule("3.parametrizations.weight").original.fill_(float("nan"))
    backward(model, 0)
    with pytest.raises(OptionError, match=r"\.weight \[.*not finite.*smaller alpha"):
        optimizer.step()


def test_convolutions_and_recurrent_layers_have_a_threshold_for_each_output() -> None:
    model = nn.ModuleList([nn.Conv2d(3, 7, 3), nn.LSTM(5, 6), nn.Embedding(11, 4)])
    optimizer = torch.optim.Adam(model.parameters())
    sparse = rarefy.sparsify(model, "dst", optimizer=optimizer)
    assert [t.numel() for t in thresholds(sparse)] == [7, 24, 24, 11]
    out = model[1](torch.randn(2, 3, 5))[0].sum() + model[0](torch.randn(1, 3, 4, 4)).sum()
    (out + model[2](torch.tensor([1, 2])).sum()).backward()
    optimizer.step()
    copy.deepcopy(model)
    sparse.finalize()
    assert next(n for n, _ in model.named_parameters()) == "0.weight"


def test_options_are_checked() -> None:
    for options, message in ((dict(alpha=-1.0), "alpha"), (dict(collapse=1.0), "collapse")):
        with pytest.raises(OptionError, match=message):
            rarefy.methods.TrainableThreshold(**options)
    with pytest.raises(OptionError, match="no option 'sparsity'"):
        rarefy.sparsify(mlp(), "dst", sparsity=0.9)
    assert rarefy.methods.find("dst") is rarefy.methods.TrainableThreshold
    assert "dst" not in rarefy.methods.available()
    with pytest.raises(OptionError, match="did you mean"):
        rarefy.methods.make("trainable-thresholds")
