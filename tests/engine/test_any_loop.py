"""The user's loop stays as it was: one test for each kind of loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from tests.engine.common import assert_sparse, backward, batch, mlp

OPTIMIZERS = {
    "SGD": dict(lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "SGD-foreach": dict(lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=True),
    "SGD-fused": dict(lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "Adam": dict(lr=0.01, weight_decay=1e-2, amsgrad=True),
    "Adam-foreach": dict(lr=0.01, foreach=True),
    "Adam-fused": dict(lr=0.01, fused=True),
    "AdamW": dict(lr=0.01),
    "AdamW-fused": dict(lr=0.01, fused=True),
    "Adagrad": dict(lr=0.01, initial_accumulator_value=0.1),
    "Adadelta": dict(lr=1.0),
    "Adamax": dict(lr=0.01),
    "Adafactor": dict(lr=0.01),
    "ASGD": dict(lr=0.01),
    "NAdam": dict(lr=0.01),
    "RAdam": dict(lr=0.01),
    "RMSprop": dict(lr=0.01, momentum=0.9, centered=True),
    "Rprop": dict(lr=0.01),
}


def test_every_optimizer_of_torch_is_tested() -> None:
    classes = {
        name
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    elsewhere = {"LBFGS", "Muon", "SparseAdam"}  # closure test, Muon test; SparseAdam takes row-sparse gradients only
    assert classes - elsewhere == {name.partition("-")[0] for name in OPTIMIZERS}


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stays_sparse_under_every_optimizer(name: str, method: str) -> None:
    model = mlp()
    optimizer = getattr(torch.optim, name.partition("-")[0])(model.parameters(), **OPTIMIZERS[name])
    sparse = rarefy.sparsify(model, method, sparsity=0.8, optimizer=optimizer, every=2)
    start = sparse.masks()
    for step in range(7):
        backward(model, step)
        optimizer.step()
        assert_sparse(sparse, 0.8)
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    assert any(not torch.equal(mask, start[name]) for name, mask in sparse.masks().items())


def test_muon_beside_adamw() -> None:
    model = mlp()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    muon, adamw = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1), torch.optim.AdamW(others, lr=0.01)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=[muon, adamw], every=2)
    for step in range(6):
        backward(model, step)
        muon.step()
        adamw.step()
        assert_sparse(sparse, 0.8)
        muon.zero_grad()
        adamw.zero_grad()
    assert sparse.step_count == 6


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_optimizers_share_the_sparse_weights(order: tuple[int, int]) -> None:
    model = mlp()
    optimizers = [
        torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam([*model[1].parameters(), *model[3].parameters(), *model[5].parameters()], lr=0.01),
    ]
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizers, every=1, stop=100)
    for step in range(5):
        backward(model, step)
        for i in order:
            optimizers[i].step()
        assert_sparse(sparse, 0.8)
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert sparse.step_count == 5


def test_lbfgs_closure() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer, every=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return backward(model, 0)

    for _ in range(5):
        optimizer.step(closure)
        assert_sparse(sparse, 0.8)
    assert sparse.step_count == 5


def test_a_closure_grows_by_this_steps_gradient() -> None:
    """Lightning calls step(closure): a step pre-hook would see the gradient of the step before."""

    def train(with_closure: bool) -> dict[str, torch.Tensor]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer, every=3)
        for step in range(6):

            def closure(step: int = step) -> torch.Tensor:
                optimizer.zero_grad()
                return backward(model, step)

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        return sparse.masks()

    plain, closed = train(False), train(True)
    assert all(torch.equal(plain[name], closed[name]) for name in plain)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_accumulation_grows_by_the_sum(set_to_none: bool) -> None:
    """Two half batches accumulated take the same masks as one whole batch, and discarded passes leave no trace."""

    def train(parts: int, discard: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer, every=2)
        for step in range(6):
            x, y = batch(step)
            if discard:
                F.cross_entropy(model(-3 * x.double()), y).backward()
                optimizer.zero_grad(set_to_none=set_to_none)
            for xs, ys in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(xs), ys) / parts).backward()
            optimizer.step()
            assert_sparse(sparse, 0.8)
            optimizer.zero_grad(set_to_none=set_to_none)
        return sparse.masks()

    whole = train(1, False)
    for other in (train(2, False), train(4, True)):
        assert all(torch.equal(whole[name], other[name]) for name in whole)


@pytest.mark.parametrize("fused", [False, True])
def test_amp_with_grad_scaler_skips_are_not_steps(fused: bool) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer, every=1, stop=100)
    for step in range(6):
        x, y = batch(step)
        if step == 3:
            x = x * float("inf")
        masks = sparse.masks()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model[1].reset_running_stats()
        for layer in sparse.layers.values():
            assert not layer.weight()[~layer.mask()].any()
        if step == 3:
            assert all(torch.equal(masks[name], mask) for name, mask in sparse.masks().items())
    assert sparse.step_count == 5
    assert_sparse(sparse, 0.8)


def test_compiled_model_keeps_names_and_masks() -> None:
    plain, compiled = mlp(), torch.compile(mlp(), backend="aot_eager", fullgraph=True)
    results = []
    for model in (plain, compiled):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer, every=2)
        for step in range(5):
            backward(model, step)
            optimizer.step()
            assert_sparse(sparse, 0.8)
            optimizer.zero_grad()
        results.append(sparse.masks())
    assert list(results[0]) == list(results[1])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_masks_that_change_do_not_recompile() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer, every=1, stop=100)
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    step_fn = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(5):
        x, y = batch(step)
        F.cross_entropy(step_fn(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(compilations) == 1


def test_export_sees_plain_parameters() -> None:
    model = mlp().eval()
    sparse = rarefy.sparsify(model, "static", sparsity=0.8)
    program = torch.export.export(model, (batch(0)[0],))
    assert torch.equal(program.module()(batch(0)[0]), model(batch(0)[0]))
    assert sparse.sparsity == pytest.approx(0.8, abs=1e-2)


def test_several_param_groups_and_clipping_see_kept_weights_only() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "lr": 0.1, "weight_decay": 0.5},
            {"params": [*model[1].parameters(), *model[3].parameters()], "lr": 0.01},
            {"params": model[5].parameters(), "lr": 0.0},
        ]
    )
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer, every=2)
    for step in range(5):
        backward(model, step)
        kept = torch.cat(
            [
                p.grad[sparse.layers[n].mask()] if n in sparse.layers else p.grad.flatten()
                for n, p in model.named_parameters()
            ]
        )
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) == pytest.approx(float(kept.norm()), rel=1e-5)
        optimizer.step()
        assert_sparse(sparse, 0.8)
        optimizer.zero_grad()


def test_parameters_added_later() -> None:
    """A sparse weight whose optimizer group comes later is cared for; a layer that comes later stays dense, and is listed."""
    model = mlp()
    optimizer = torch.optim.Adam(model[5].parameters(), lr=0.01)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer, every=2)
    for step in range(10):
        if step == 4:
            optimizer.add_param_group({"params": [*model[0].parameters(), *model[3].parameters()], "lr": 0.02})
        if step == 6:
            head = nn.Linear(5, 5)
            model.append(head)
            optimizer.add_param_group({"params": head.parameters()})
        backward(model, step)
        optimizer.step()
        assert_sparse(sparse, 0.8)
        optimizer.zero_grad()
    assert [item.name for item in sparse.summary().left_out if "added after" in item.reason] == ["6.weight"]
    assert head.weight.count_nonzero() == 25


def test_frozen_then_unfrozen_weight_is_watched() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer, every=2)
    for step in range(8):
        if step == 3:
            model[0].weight.requires_grad_(True)
        backward(model, step)
        optimizer.step()
        assert_sparse(sparse, 0.8)
        optimizer.zero_grad()
    assert any(event.layer == "0.weight" and event.step > 3 and event.grown for event in sparse.events)


def test_without_an_optimizer_step_is_called_by_hand() -> None:
    model = mlp()
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, every=2)
    for step in range(4):
        backward(model, step)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad + 0.01)
        sparse.step()
        assert_sparse(sparse, 0.8)
        model.zero_grad()
    assert sparse.step_count == 4


def test_lr_scheduler_and_step_stay_unpatched() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = type(optimizer).step
    rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer)
    assert type(optimizer).step is before
    assert "step" not in vars(optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    backward(model, 0)
    optimizer.step()


def test_averaged_model_and_copies_are_plain_models() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer, every=1, stop=100)
    average, twin = torch.optim.swa_utils.AveragedModel(model), copy.deepcopy(model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        average.update_parameters(model)
        optimizer.zero_grad()
    twin.load_state_dict(mlp(7).state_dict())  # a copy is not bound by the masks
    assert all(p.count_nonzero() == p.numel() for n, p in twin.named_parameters() if n in sparse.layers)
    assert_sparse(sparse, 0.8)


def test_another_optimizer_can_be_followed_in_the_place_of_the_first() -> None:
    model = mlp()
    first = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    sparse = rarefy.sparsify(model, "static", sparsity=0.8, optimizer=first)
    second = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparse.follow(second)
    for step, optimizer in enumerate([second, first, second]):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert sparse.step_count == 2, "the first optimizer is still followed"
    assert_sparse(sparse, 0.8)
    sparse.finalize()
    with pytest.raises(rarefy.RarefyError, match="has left its model"):
        sparse.follow(first)
    backward(model, 3)
    second.step()
    assert sparse.step_count == 2
