"""The engine's promises where the network computes with another weight than it trains: any loop, resume, copies, leaving."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.engine import Sparsifier
from rarefy.errors import OptionError
from rarefy.nn import bake_
from tests.engine.common import backward, batch, mlp
from tests.engine.reparametrised import BOTH_WAYS, METHODS, make, named, train
from tests.engine.test_any_loop import OPTIMIZERS


def assert_left_clean(model: nn.Module, optimizer: torch.optim.Optimizer, sparse: Sparsifier) -> None:
    """finalize() leaves the network as it computed, with plain names, exact zeros, and an optimizer without guests."""
    names = [name for name, _ in mlp().named_parameters()]
    masks = sparse.masks()
    model.eval()
    before = model(batch(99)[0])
    sparse.finalize()
    assert torch.equal(model(batch(99)[0]), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == list(mlp().state_dict())
    assert all(type(m).__module__.startswith("torch.nn") for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    for name, layer in sparse.layers.items():
        weight = model.get_parameter(name)
        assert torch.equal(layer.mask(), masks[name]) and layer.nnz == int(masks[name].sum())
        assert not weight[~masks[name]].any() and not torch.signbit(weight[~masks[name]]).any()
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert set(map(id, optimizer.state)) <= set(held)
    assert not any(module._forward_hooks or module._load_state_dict_post_hooks for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_under_every_optimizer_and_leaves_it_as_it_was(name: str, method: str) -> None:
    model, optimizer, sparse = make(method, optimizer=name.partition("-")[0], **OPTIMIZERS[name])
    extras = [extra for layer in sparse.layers.values() for extra in layer.extras.values()]
    start = [extra.detach().clone() for extra in extras]
    for step in range(15):
        train(model, optimizer, range(step, step + 1))
        for layer in sparse.layers.values():
            mask = layer.mask()
            assert torch.equal(mask, layer.weight() != 0) or layer.trained()[mask].count_nonzero() < layer.nnz
            assert torch.equal(layer.weight(), layer.module.weight) and not layer.weight()[~mask].any()
            assert int(mask.sum()) == layer.nnz
    assert all(not torch.equal(a, b) for a, b in zip(start, extras, strict=True)), "extras were not trained"
    assert 0 <= sparse.sparsity < 1
    if (
        name != "Adafactor" and method != "bdwp bp_g"
    ):  # its steps are relative to the size of a parameter, and scores begin at 0
        assert sparse.sparsity > 0
    assert_left_clean(model, optimizer, sparse)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ["model first", "sparsifier first", "sparsify from the state"])
def test_resume_is_exact_in_any_order_of_loading(method: str, order: str, tmp_path: Path) -> None:
    whole = make(method)
    train(*whole[:2], range(16))

    model, optimizer, sparse = make(method)
    train(model, optimizer, range(9))
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sparse": sparse.state_dict()}
    torch.save(states, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)

    if order == "sparsify from the state":  # first the structure, then what was trained
        model = mlp(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        sparse = rarefy.sparsify(model, whole[2].method, optimizer=optimizer, total_steps=20, state=saved["sparse"])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        model, optimizer, sparse = make(method, seed=1)
        parts: list[Any] = [(model, "model"), (optimizer, "optimizer"), (sparse, "sparse")]
        for part, key in parts if order == "model first" else reversed(parts):
            part.load_state_dict(saved[key])
    train(model, optimizer, range(9, 16))

    assert sparse.training_cost() == whole[2].training_cost()
    assert sparse.explored() == whole[2].explored()
    for mine, theirs in ((model.state_dict(), whole[0].state_dict()), (sparse.masks(), whole[2].masks())):
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for a, b in zip(optimizer.state.values(), whole[1].state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in b if b[key] is not None)
    for one in (sparse, whole[2]):
        one.finalize()
    assert sparse.events == whole[2].events


@pytest.mark.parametrize("method", METHODS)
def test_copies_compute_the_same_and_live_their_own_life(method: str) -> None:
    model, optimizer, sparse = make(method)
    average = torch.optim.swa_utils.AveragedModel(model)
    train(model, optimizer, range(9))
    average.update_parameters(model)
    twin = copy.deepcopy(model)
    x = batch(50)[0]
    model.eval(), twin.eval()
    assert torch.equal(twin(x), model(x))
    plain = bake_(copy.deepcopy(twin))
    assert torch.equal(plain(x), model(x)) and list(plain.state_dict()) == list(mlp().state_dict())
    bake_(average)
    masks = sparse.masks()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(mask, masks[name]) for name, mask in sparse.masks().items())
    model.train()
    train(model, optimizer, range(9, 12))
    assert_left_clean(model, optimizer, sparse)
    twin(x)  # the copies' classes are their own


@pytest.mark.parametrize("method", METHODS)
def test_detach_leaves_the_trained_weights_and_another_sparsifier_goes_on(method: str) -> None:
    whole = make(method, optimizer="SGD")
    train(*whole[:2], range(12))
    model, optimizer, sparse = make(method, optimizer="SGD")
    train(model, optimizer, range(7))
    trained = {name: layer.trained().clone() for name, layer in sparse.layers.items()}
    state = sparse.state_dict()
    sparse.detach()
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in trained.items())
    assert list(model.state_dict()) == list(mlp().state_dict()) and all(p.requires_grad for p in model.parameters())
    again = rarefy.sparsify(model, sparse.method, optimizer=optimizer, total_steps=20, state=state)
    train(model, optimizer, range(7, 12))
    for one, two in zip(model.state_dict().values(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert all(torch.equal(mask, again.masks()[name]) for name, mask in whole[2].masks().items())


def test_a_dense_checkpoint_loads_as_the_trained_weights() -> None:
    model, optimizer, sparse = make("movement")
    train(model, optimizer, range(12))
    masks, scores = sparse.masks(), sparse.layers["0.weight"].extras["scores"].clone()
    model.load_state_dict(mlp(5).state_dict())
    assert torch.equal(sparse.layers["0.weight"].trained(), mlp(5)[0].weight)
    assert torch.equal(model[0].weight, mlp(5)[0].weight * masks["0.weight"])
    assert torch.equal(sparse.layers["0.weight"].extras["scores"], scores)
    with pytest.raises(RuntimeError, match=r"parametrizations\.weight\.original"):
        mlp().load_state_dict(model.state_dict())  # half a network is not taken for a whole one


def test_another_state_dict_brings_its_own_mask() -> None:
    model, _, sparse = make("movement")
    other = make("movement", seed=3)
    train(*other[:2], range(16))
    model.load_state_dict(other[0].state_dict())
    assert all(torch.equal(mask, other[2].masks()[name]) for name, mask in sparse.masks().items())
    assert sparse.nnz == other[2].nnz < sparse.numel


@pytest.mark.parametrize("method", METHODS)
def test_schedulers_made_before_or_after_hold_for_what_joined(method: str) -> None:
    finals = []
    for early in (True, False):
        model = mlp()
        optimizer = torch.optim.SGD(
            [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1:].parameters()}], lr=0.1
        )
        rule = lambda step: 0.5**step  # noqa: E731
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rule) if early else None
        sparse = rarefy.sparsify(model, named(method), optimizer=optimizer, total_steps=20, **METHODS[method])
        scheduler = scheduler or torch.optim.lr_scheduler.LambdaLR(optimizer, rule)
        guests = sum(len(layer.extras) for layer in sparse.layers.values())  # one a layer, or none
        assert [len(group["params"]) for group in optimizer.param_groups] == [2 + guests // 3, 6 + guests * 2 // 3]
        for step in range(6):
            train(model, optimizer, range(step, step + 1))
            scheduler.step()
        finals.append(model.state_dict())
        sparse.finalize()
        scheduler.step()
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


def test_named_parameter_groups_stay_in_step() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, "movement", sparsity=0.5, optimizer=optimizer, total_steps=10)
    group = optimizer.param_groups[0]
    names = dict(model.named_parameters())
    for parameter, name in list(zip(group["params"], group["param_names"], strict=True))[-3:]:
        assert names[name] is parameter and name.endswith("parametrizations.weight.0.scores")
    sparse.finalize()
    assert group["param_names"] == [name for name, _ in model.named_parameters()]


def test_extras_may_be_moved_to_a_group_of_their_own() -> None:
    model, optimizer, sparse = make("movement")
    extras = [extra for layer in sparse.layers.values() for extra in layer.extras.values()]
    kept = [p for p in optimizer.param_groups[0]["params"] if all(p is not e for e in extras)]
    optimizer.param_groups[0]["params"] = kept
    optimizer.add_param_group({"params": extras, "lr": 1.0})
    train(model, optimizer, range(15))
    assert sparse.layers["0.weight"].extras["scores"].abs().max() > 1
    assert_left_clean(model, optimizer, sparse)


def test_muon_needs_matrices() -> None:
    model = mlp()
    muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.01)
    with pytest.raises(OptionError, match=r"0\.parametrizations\.weight\.0\.threshold \[16\] cannot join Muon"):
        rarefy.sparsify(model, "dst", optimizer=[muon, adamw])
    assert list(model.state_dict()) == list(mlp().state_dict())
    sparse = rarefy.sparsify(model, "movement", sparsity=0.5, optimizer=[muon, adamw], total_steps=6, stop=0.9)
    for step in range(6):
        backward(model, step)
        muon.step(), adamw.step()
        muon.zero_grad(), adamw.zero_grad()
    assert sparse.step_count == 6 and sparse.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_lbfgs_sees_extras_and_penalty_in_its_closure(method: str) -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    optimizer.step(lambda: backward(model, 0))  # its history is of another length from here on
    sparse = rarefy.sparsify(model, named(method), optimizer=optimizer, total_steps=20, **METHODS[method])
    start = {n: e.detach().clone() for n, layer in sparse.layers.items() for e in layer.extras.values()}

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, 0)

    for _ in range(4):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*begin again at 0")
            optimizer.step(closure)
    assert sparse.step_count == 4
    for name, value in start.items():
        (extra,) = sparse.layers[name].extras.values()
        assert not torch.equal(extra, value)
    sparse.finalize()
    optimizer.step(closure)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused", [False, True])
def test_amp_skips_are_not_steps_and_autocast_changes_no_dtype(method: str, fused: bool) -> None:
    model, optimizer, sparse = make(method, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        x, y = batch(step)
        x = x * float("inf") if step == 3 else x
        before = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k and "tracked" not in k}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model[1].reset_running_stats()
        if step == 3:
            assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert sparse.step_count == 5
    assert all(extra.dtype == torch.float32 for layer in sparse.layers.values() for extra in layer.extras.values())


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_trains_the_same(method: str) -> None:
    finals = []
    for compiled in (False, True):
        model = mlp()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        sparse = rarefy.sparsify(run, named(method), optimizer=optimizer, total_steps=20, **METHODS[method])
        train(run, optimizer, range(8))
        assert [*sparse.layers] == ["0.weight", "3.weight", "5.weight"][: 2 if named(method) in BOTH_WAYS else 3]
        finals.append((sparse.masks(), model.state_dict()))
    for mine, theirs in zip(*finals, strict=True):
        assert list(mine) == list(theirs)
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)
