"""Compressed storage: only what is kept exists, through saving, resuming, copying, finalizing and failing."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.engine.dense_gradient import BLOCK
from rarefy.errors import OptionError, PatternError, SelectionError, StateError
from rarefy.nn import SparseConv2d, SparseLinear, SparseModule
from tests.engine.common import batch, mlp
from tests.engine.compressed import (
    METHODS,
    adamw,
    convnet,
    images,
    sgd,
    step,
    train,
)


def test_only_kept_weights_exist() -> None:
    sparse, _, optimizer = train("mlp", "compressed", adamw, "rigl", 30, every=10)
    dense = {tuple(layer.shape) for layer in sparse.layers.values()}
    for layer in sparse.layers.values():
        values = layer.target.parameter
        assert values.shape == (layer.nnz,) and values.grad is not None and values.grad.shape == values.shape
        assert all(v.shape in ((layer.nnz,), ()) for v in optimizer.state[values].values())
    every = [*sparse.model.parameters(), *sparse.model.buffers()]
    assert not any(tuple(t.shape) in dense for t in every)
    assert len(optimizer.param_groups[0]["params"]) == len(list(sparse.model.parameters()))


def test_modules_become_sparse_in_their_place() -> None:
    model = mlp()
    first, calls, bias = model[0], [], model[0].bias
    first.register_forward_hook(lambda *_: calls.append(1))
    sparse = rarefy.sparsify(model, "static", sparsity=0.5, storage="compressed", init="dense")
    assert model[0] is first and isinstance(first, SparseLinear) and first.bias is bias
    assert [n for n, _ in first.named_parameters()] == ["values", "bias"]
    x = batch(0)[0]
    model.eval()(x)
    assert calls and sparse.layers["0.weight"].nnz == first.nnz
    assert "0.weight" in str(sparse.summary()) and sparse.summary().rows[0].kept == first.nnz


def test_finalize_gives_plain_layers_back_and_training_goes_on() -> None:
    sparse, _, optimizer = train("convnet", "compressed", adamw, "rigl", 30, every=10)
    masks, x = sparse.masks(), images(5)[0]
    model = sparse.model.eval()
    y = model(x)
    modules = list(model)
    assert sparse.finalize() is model
    assert list(model) == modules and type(model[0]) is nn.Conv2d and type(model[-1]) is nn.Linear
    assert list(model.state_dict()) == list(convnet().state_dict())
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert not weight.detach()[~mask].any() and torch.equal(sparse.layers[name].mask(), mask)
        assert not optimizer.state[weight]["exp_avg"][~mask].any() and optimizer.state[weight]["exp_avg"][mask].any()
    before = model.get_parameter("0.weight").detach().clone()
    step(model, optimizer, images(0))
    assert not torch.equal(before, model.get_parameter("0.weight"))
    assert sparse.summary().kept == sparse.nnz == sum(int(m.sum()) for m in masks.values())
    convnet().load_state_dict(model.state_dict())


def test_finalize_can_leave_them_compressed() -> None:
    sparse, _, optimizer = train("mlp", "compressed", sgd, "set", 20, every=10)
    masks = sparse.masks()
    model = sparse.finalize(compressed=True)
    assert isinstance(model[0], SparseLinear) and torch.equal(model[0].mask(), masks["0.weight"])
    step(model, optimizer, batch(0))
    rarefy.sparsify(model, "set", sparsity=0.8, optimizer=optimizer, storage="compressed")


def test_layers_that_were_sparse_before_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SparseLinear(12, 40, sparsity=0.7), nn.ReLU(), nn.Linear(40, 5))
    optimizer = adamw(model)
    values, positions = model[0].values.detach().clone(), model[0].positions()
    sparse = rarefy.sparsify(
        model, "rigl", sparsity=0.7, allocation="uniform", optimizer=optimizer, storage="compressed", every=5
    )
    assert torch.equal(model[0].values, values) and torch.equal(model[0].positions(), positions)
    for i in range(20):
        step(model, optimizer, batch(i))
    assert model[0].nnz == values.numel() and not torch.equal(model[0].positions(), positions)
    assert list(sparse.layers) == ["0.weight", "2.weight"]
    sparse.finalize()
    assert type(model[0]) is SparseLinear and type(model[2]) is nn.Linear
    pruned = rarefy.sparsify(model, "magnitude", sparsity=0.9, optimizer=optimizer, storage="compressed")
    assert pruned.sparsity == pytest.approx(0.9, abs=0.01)
    step(model, optimizer, batch(0))


@pytest.mark.parametrize("order", ["model optimizer sparse", "sparse optimizer model", "optimizer model sparse"])
@pytest.mark.parametrize("method", ["rigl", "gradual"])
def test_resume_is_exact_in_any_order(method: str, order: str) -> None:
    options = METHODS[method] | {"every": 10}
    whole, losses, _ = train("mlp", "compressed", adamw, method, 80, **options)
    half, _, half_optimizer = train("mlp", "compressed", adamw, method, 45, **options)
    file = io.BytesIO()
    parts = {"model": half.model, "optimizer": half_optimizer, "sparse": half}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh, _, optimizer = train("mlp", "compressed", adamw, method, 7, **options)
    parts = {"model": fresh.model, "optimizer": optimizer, "sparse": fresh}
    for name in order.split():
        parts[name].load_state_dict(saved[name])
    assert [step(fresh.model, optimizer, batch(i)) for i in range(45, 80)] == losses[45:]
    for a, b in zip(whole.model.state_dict().values(), fresh.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert fresh.events == whole.events and fresh.explored() == whole.explored()


def test_resume_into_a_dense_model() -> None:
    _, losses, _ = train("mlp", "compressed", sgd, "rigl", 60, every=10)
    half, _, half_optimizer = train("mlp", "compressed", sgd, "rigl", 35, every=10)
    model = mlp(7)
    optimizer = sgd(model)
    sparse = rarefy.sparsify(
        model, "rigl", sparsity=0.8, every=10, total_steps=200, optimizer=optimizer, storage="compressed",
        state=half.state_dict(),
    )  # fmt: skip
    model.load_state_dict(half.model.state_dict())
    optimizer.load_state_dict(half_optimizer.state_dict())
    assert [step(model, optimizer, batch(i)) for i in range(35, 60)] == losses[35:]
    assert sparse.step_count == 60


def test_lbfgs_through_its_closure() -> None:
    model = mlp().eval()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)
    sparse = rarefy.sparsify(model, "static", sparsity=0.6, optimizer=optimizer, storage="compressed")
    x, y = batch(0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    assert float(optimizer.step(closure).detach()) < first and sparse.step_count == 2


def test_an_overflow_leaves_the_mask_and_says_so() -> None:
    model = mlp()
    optimizer = sgd(model)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, every=1, optimizer=optimizer, storage="compressed")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = sparse.masks()
    for bad in (True, False):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
        scaler.scale(loss * (float("inf") if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert sparse.step_count == (0 if bad else 1)
        assert torch.equal(sparse.masks()["0.weight"], before["0.weight"]) == bad
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_copies_of_the_model_are_on_their_own() -> None:
    sparse, _, optimizer = train("mlp", "compressed", adamw, "set", 10, every=5)
    other = copy.deepcopy(sparse.model)
    file = io.BytesIO()
    torch.save(sparse.model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = batch(1)[0]
    state = {k: v.clone() for k, v in other.state_dict().items()}
    for i in range(10):
        step(sparse.model, optimizer, batch(i))
    for copied in (other, loaded):
        assert all(torch.equal(v, copied.state_dict()[k]) for k, v in state.items())
        copied(x).sum().backward()
        copied.load_state_dict(sparse.model.state_dict())
        torch.testing.assert_close(copied.eval()(x), sparse.model.eval()(x))
        sparse.model.train()


def test_bfloat16_runs() -> None:
    model = mlp().bfloat16()
    optimizer = adamw(model)
    rarefy.sparsify(model, "rigl", sparsity=0.8, every=3, optimizer=optimizer, storage="compressed")
    for i in range(10):
        x, y = batch(i)
        assert step(model, optimizer, (x.bfloat16(), y)) < 10
    assert model[0].values.dtype == optimizer.state[model[0].values]["exp_avg"].dtype == torch.bfloat16
    sparse, *_ = train("mlp", "compressed", sgd, "rigl", 0, every=5)
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(6):
            F.cross_entropy(sparse.model(batch(i)[0]), batch(i)[1]).backward()


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (tied, {}, SelectionError, "tied"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3)), {}, SelectionError, "exclude='1'"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), {}, SelectionError, r"linear1[\s\S]*storage=.masked"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), {"pattern": "2:4"}, PatternError, "'2:4' needs storage=.masked"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), {"pattern": "1x4"}, PatternError, "'1x4' needs storage=.masked"),
    ],
)
def test_what_cannot_be_compressed_is_named_and_untouched(
    model: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    net = model()
    before = {name: (id(p), p.detach().clone()) for name, p in net.named_parameters()}
    types = [type(m) for m in net.modules()]
    with pytest.raises(error, match=message):
        rarefy.sparsify(net, "static", sparsity=0.5, storage="compressed", **options)
    assert [type(m) for m in net.modules()] == types
    assert all(id(p) == before[n][0] and torch.equal(p, before[n][1]) for n, p in net.named_parameters())


def test_a_failing_method_leaves_the_model_dense() -> None:
    model = mlp()
    with torch.no_grad():
        model[5].weight[0, 0] = float("nan")
    with pytest.raises(OptionError, match="NaN"):
        rarefy.sparsify(model, "magnitude", sparsity=0.5, storage="compressed")
    assert type(model[0]) is nn.Linear and not model[0]._load_state_dict_post_hooks


def test_muon_and_masks_on_sparse_layers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    with pytest.raises(OptionError, match=r"Muon[\s\S]*masked"):
        rarefy.sparsify(
            model, "static", sparsity=0.5, optimizer=torch.optim.Muon(model.parameters()), storage="compressed"
        )
    with pytest.raises(SelectionError, match=r"storage=.compressed"):
        rarefy.sparsify(nn.Sequential(SparseLinear(8, 8)), "static", sparsity=0.5)
    with pytest.raises(OptionError, match=r"sparse from the start[\s\S]*exclude='0'"):
        rarefy.sparsify(
            nn.Sequential(SparseLinear(12, 5)), "snip", sparsity=0.5, storage="compressed", calibration=[batch(0)]
        )


def test_states_of_other_storages_and_damaged_ones_are_refused() -> None:
    masked, *_ = train("mlp", "masked", sgd, "set", 0)
    sparse, *_ = train("mlp", "compressed", sgd, "set", 0)
    with pytest.raises(StateError, match="masked"):
        sparse.load_state_dict(masked.state_dict())
    for key, value in (("col", torch.tensor([5])), ("crow", None), ("explored", torch.tensor([9, 3]))):
        state = sparse.state_dict()
        state["layers"]["0.weight"][key] = value
        with pytest.raises(StateError, match=r"0\.weight"):
            sparse.load_state_dict(state)


def test_a_layer_that_is_too_large_to_be_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 30_000  # 3.6 GB if it were dense
    model = nn.Sequential(SparseLinear(size, size, sparsity=1 - 1e-5), nn.ReLU(), SparseConv2d(1, 1, 1, sparsity=0.0))
    model = nn.Sequential(model[0], model[1], SparseLinear(size, 10, sparsity=0.99))
    largest = 0
    real = torch.Tensor.abs_

    def spy(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "abs_", spy)
    monkeypatch.setattr(
        "rarefy.engine.dense_gradient._row_blocks",
        lambda module: [(0, 50), (50, 100)] if module.rows == size else [(0, 10)],
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for method in ("set", "rigl"):
        sparse = rarefy.sparsify(
            model, method, sparsity=1 - 1e-5, allocation="uniform", optimizer=optimizer, storage="compressed", every=1
        )
        before = model[0].positions()
        model(torch.randn(2, size)).square().mean().backward()
        optimizer.step()
        assert not torch.equal(before, model[0].positions()) and model[0].nnz == 9000
        assert "30000x30000" in str(sparse.summary()) and sparse.explored() < 1e-3
        sparse.state_dict()
        sparse.finalize()
    assert 0 < largest <= BLOCK
    assert all(isinstance(m, SparseModule) for m in (model[0], model[2]))
