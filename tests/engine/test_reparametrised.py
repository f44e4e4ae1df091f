"""The engine's promises where the network computes with another weight than it trains: any loop, resume, copies, leaving."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.engine import Method, Sparsifier
from rarefy.errors import OptionError, SelectionError, StateError
from rarefy.nn import bake_
from tests.engine.common import backward, batch, mlp
from tests.engine.test_any_loop import OPTIMIZERS

METHODS: dict[str, dict[str, Any]] = {
    "movement": dict(sparsity=0.8),
    "soft-movement": dict(threshold=0.4999, penalty_weight=50.0),
    "trainable-threshold": dict(alpha=0.05),
    "lottery-jackpots": dict(sparsity=0.8, stop=0.6),
    "ste": dict(pattern="1:4"),
    "sr-ste": dict(pattern="2:4", refine=0.05),
    "pgf mdgf": dict(pattern="1:4", recipe="mdgf-linear", coefficient=0.125),
    "pgf sdgf": dict(pattern="1:4", recipe="sdgf-stepwise"),
    "t-mask": dict(pattern="2:4t", every=3, refine=0.05),
    "bdwp": dict(pattern="2:4", refine=0.05),
    "bdwp bp_g": dict(pattern="1:4", mode="bp_g"),
}
BOTH_WAYS = ("t-mask", "bdwp")  # they leave the last layer: its 5 outputs are no multiple of 4


def named(case: str) -> str:
    """The method of a case."""
    return case.partition(" ")[0]


def make(
    method: str, seed: int = 0, optimizer: str = "Adam", **kwargs: Any
) -> tuple[nn.Sequential, torch.optim.Optimizer, Sparsifier]:
    model = mlp(seed)
    made = getattr(torch.optim, optimizer)(model.parameters(), **{"lr": 0.02, **kwargs})
    return (
        model,
        made,
        rarefy.sparsify(model, named(method), optimizer=made, total_steps=20, seed=seed, **METHODS[method]),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*begin again at 0")
        for step in steps:
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()


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


@dataclass(frozen=True, kw_only=True)
class Ridge(Method):
    """A penalty with a gradient that everyone knows, on plain masked weights."""

    name: ClassVar[str] = "ridge"
    weight: float = 0.3

    def choose(self, sparse: Sparsifier) -> None:
        for layer in sparse.layers.values():
            layer.rewire(layer.largest_magnitudes(torch.tensor([layer.numel // 2])))

    def penalty(self, sparse: Sparsifier) -> Tensor:
        shifted = [(layer.target.parameter - 1).square().sum() for layer in sparse.layers.values()]
        return 0.5 * self.weight * torch.stack(shifted).sum()


@pytest.mark.parametrize("how", ["plain", "closure", "accumulated", "maximized", "scaled", "scaled and fused"])
def test_a_penalty_adds_its_exact_gradient_once_a_step(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double() if "scaled" not in how else nn.Linear(6, 4)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, fused=how.endswith("fused"), maximize=how == "maximized"
    )
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    sparse = rarefy.sparsify(model, Ridge(), optimizer=optimizer)
    mask = sparse.layers["weight"].mask()
    with torch.no_grad():
        twin.weight.mul_(mask)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=twin.weight.dtype)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        if how == "closure":
            value = optimizer.step(closure)
        elif how == "accumulated":
            optimizer.zero_grad()
            for half in x.chunk(2):
                (model(half).square().mean() / 2).backward()
            optimizer.step()
        elif how == "plain":
            closure()
            optimizer.step()
        elif how == "maximized":
            optimizer.zero_grad()
            (-model(x).square().mean()).backward()
            optimizer.step()
        else:
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        other.zero_grad()
        total = twin(x).square().mean() + 0.15 * (twin.weight - 1).square().sum()
        total.backward()
        twin.weight.grad.mul_(mask)
        other.step()
        if how == "closure":
            torch.testing.assert_close(value, total)
        torch.testing.assert_close(
            model.weight, twin.weight, rtol=1e-5 if "scaled" in how else 1e-12, atol=1e-6 if "scaled" in how else 1e-12
        )
        assert not model.weight[~mask].any()
        assert not optimizer.state[model.weight]["momentum_buffer"][~mask].any()


def test_a_mask_that_moves_at_every_step_is_logged_once_in_a_hundred() -> None:
    model, optimizer, sparse = make("movement")
    previous, dropped, grown = sparse.masks(), 0, 0
    for step in range(230):
        train(model, optimizer, range(step, step + 1))
        now = sparse.masks()
        dropped += sum(int((previous[n] & ~m).sum()) for n, m in now.items())
        grown += sum(int((m & ~previous[n]).sum()) for n, m in now.items())
        previous = now
    assert {event.step for event in sparse.events} == {100, 200}
    sparse.finalize()
    assert {event.step for event in sparse.events} == {100, 200, 230}
    assert sum(event.dropped for event in sparse.events) == dropped
    assert sum(event.grown for event in sparse.events) == grown > 0
    assert {e.layer: e.kept for e in sparse.events} == {n: layer.nnz for n, layer in sparse.layers.items()}


def test_cost_counts_sparse_forward_and_dense_gradients() -> None:
    model, optimizer, sparse = make("movement")
    kept = dict.fromkeys(sparse.layers, 0)
    for step in range(10):
        for name, layer in sparse.layers.items():
            kept[name] += layer.nnz  # what the coming step computes with
        train(model, optimizer, range(step, step + 1))
    for name, cost in sparse.training_cost().items():
        assert cost == (10, kept[name], 10, 0)


def test_what_is_computed_is_not_called_dense_in_the_summary() -> None:
    model, _, sparse = make("trainable-threshold")
    summary = sparse.summary(batch(0)[0])
    assert sorted(item.name for item in summary.left_out) == ["0.bias", "1.bias", "1.weight", "3.bias", "5.bias"]
    assert summary.flops is not None and summary.flops[1] > 0
    model.append(nn.Linear(5, 5))
    assert "added after" in str(sparse.summary())


def test_errors_leave_the_model_as_it_was() -> None:
    def fails(model: nn.Module, error: type[Exception], match: str, **options: Any) -> None:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        method = options.pop("method", "movement")
        with pytest.raises(error, match=match):
            rarefy.sparsify(model, method, total_steps=10, **options)
        assert list(before) == list(model.state_dict())
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())

    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    fails(model, OptionError, "movement trains parameters of its own.*optimizer=")
    fails(model, OptionError, 'storage="masked"', optimizer=sgd, storage="compressed")
    part = torch.optim.SGD(model[5].parameters(), lr=0.1)
    fails(model, OptionError, r"0\.parametrizations\.weight\.0\.scores \[16, 12\].*no optimizer holds", optimizer=part)
    assert len(part.param_groups[0]["params"]) == 2
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    fails(tied, SelectionError, r"tied \(1\.weight\)", optimizer=torch.optim.SGD(tied.parameters(), lr=0.1))

    sparse = rarefy.sparsify(model, "movement", optimizer=sgd, total_steps=10)
    fails(model, SelectionError, r"finalize\(\)", method="magnitude")
    fails(copy.deepcopy(model), SelectionError, "bake_", method="magnitude")
    for part, wrong in (("extras", {}), ("untold", [1]), ("untold", None), ("settings", [])):
        state = sparse.state_dict()
        state["layers"]["5.weight"][part] = wrong
        with pytest.raises(StateError, match="incomplete"):
            sparse.load_state_dict(state)


@pytest.mark.parametrize("method", ["ste", "sr-ste", "pgf mdgf", "pgf sdgf", "t-mask", "bdwp"])
def test_weights_that_are_not_numbers_are_refused_before_and_after(method: str) -> None:
    model = mlp()
    with torch.no_grad():
        model[3].weight[2, 1] = float("nan")
    with pytest.raises(OptionError, match=r"3\.weight \[20, 16\]: .*NaN"):
        rarefy.sparsify(model, named(method), total_steps=20, **METHODS[method])
    assert list(model.state_dict()) == list(mlp().state_dict())
    if method == "t-mask":  # its mask is not made anew
        return
    model, _, sparse = make(method)
    trained = sparse.layers["3.weight"].target.parameter
    with torch.no_grad():
        trained[2, 1] = float("nan")
    names = list(model.state_dict())
    for _ in range(2):
        with pytest.raises(OptionError, match=r"3\.weight \[20, 16\]: .*NaN"):
            sparse.finalize()
        assert list(model.state_dict()) == names, "half of the network is plain"
    with torch.no_grad():
        trained[2, 1] = 0
    sparse.finalize()
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in sparse.masks().items())


def test_steps_by_hand_cannot_train_extras() -> None:
    _, _, sparse = make("movement")
    again = rarefy.sparsify(mlp(), sparse.method, total_steps=20, state=sparse.state_dict())  # only to look at
    assert again.nnz == sparse.nnz
    with pytest.raises(OptionError, match="pass optimizer"):
        again.step()
