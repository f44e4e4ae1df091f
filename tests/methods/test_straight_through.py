"""STE and SR-STE against their equations, and what tells them from methods that look like them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.analysis import churn
from rarefy.errors import OptionError, PatternError, SelectionError
from rarefy.metrics import overlap
from rarefy.models import build
from tests.engine.common import backward, mlp


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4, 12)).double()


def images(seed: int = 0) -> Tensor:
    return torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def top(weight: Tensor, n: int, m: int) -> Tensor:
    """The mask by hand: blocks along dimension 1, the lower index first among equals."""
    moved = weight.abs().movedim(1, -1)
    blocks = moved.reshape(-1, m)
    mask = torch.zeros_like(blocks, dtype=torch.bool)
    for row, block in enumerate(blocks.tolist()):
        for i in sorted(range(m), key=lambda i: (-block[i], i))[:n]:
            mask[row, i] = True
    return mask.view(moved.shape).movedim(-1, 1)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 8), (3, 4)])
@pytest.mark.parametrize("method", ["ste", "sr-ste"])
def test_forward_and_gradient_are_the_papers(method: str, n: int, m: int) -> None:
    model = network()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options: dict[str, Any] = dict(refine=0.25) if method == "sr-ste" else {}
    sparse = rarefy.sparsify(model, method, pattern=f"{n}:{m}", optimizer=optimizer, **options)
    trained = {name: layer.trained().clone() for name, layer in sparse.layers.items()}
    masks = {name: top(weight, n, m) for name, weight in trained.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            plain.get_parameter(name).mul_(mask)
    assert torch.equal(model(images()), plain(images()))
    assert all(torch.equal(mask, masks[name]) for name, mask in sparse.masks().items())
    for net in (model, plain):
        net(images()).sin().sum().backward()
    optimizer.step()
    for name, layer in sparse.layers.items():
        straight, mask = plain.get_parameter(name).grad, masks[name]
        assert straight is not None and straight[~mask].any()
        pull = 0.25 * ~mask * trained[name] if method == "sr-ste" else torch.zeros_like(straight)
        assert torch.equal(layer.target.parameter.grad, straight + pull)
        torch.testing.assert_close(layer.trained(), trained[name] - straight - pull, rtol=1e-14, atol=1e-14)
        assert torch.equal(layer.mask(), top(layer.trained(), n, m)), "the mask is that of the new weights"
    sparse.finalize()
    for name in masks:
        weight = model.get_parameter(name)
        blocks = (weight != 0).movedim(1, -1).reshape(-1, m)
        assert (blocks.sum(1) == n).all(), "exactly N in each block along the inputs"


def test_n_of_n_is_the_dense_network() -> None:
    model, plain = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, "sr-ste", pattern="4:4", optimizer=optimizer)
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        for net, opt in ((model, optimizer), (plain, other)):
            opt.zero_grad()
            loss = net(images(step)).square().sum()
            loss.backward()
            opt.step()
    sparse.finalize()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_no_refinement_is_ste() -> None:
    finals = []
    for method, options in (("ste", {}), ("sr-ste", {"refine": 0.0})):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        rarefy.sparsify(model, method, optimizer=optimizer, **options)
        for step in range(10):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        finals.append(model.state_dict())
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


def test_without_a_loss_pruned_weights_shrink_and_nothing_flips() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparse = rarefy.sparsify(model, "sr-ste", optimizer=optimizer, refine=0.2)
    start = {name: layer.trained().clone() for name, layer in sparse.layers.items()}
    masks = sparse.masks()
    for _ in range(6):
        optimizer.zero_grad()
        (0 * model(images()).sum()).backward()
        optimizer.step()
    for name, layer in sparse.layers.items():
        shrunk = torch.where(masks[name], start[name], 0.9**6 * start[name])
        torch.testing.assert_close(layer.trained(), shrunk, rtol=1e-12, atol=1e-14)
        assert torch.equal(layer.mask(), masks[name])
    sparse.detach()
    assert sparse.events == []


def test_pruned_weights_come_back_with_what_they_have_learned() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.9, 0.8, 0.7]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, "ste", optimizer=optimizer)
    seen = []
    for _ in range(8):
        optimizer.zero_grad()
        (-model(torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64))).sum().backward()
        optimizer.step()
        seen.append((sparse.masks()["weight"].tolist()[0], sparse.layers["weight"].trained()[0, 3].item()))
    assert seen[0][0] == [True, True, False, False] and seen[-1][0] == [True, False, False, True]
    assert seen[0][1] == pytest.approx(0.8) and seen[-1][1] == pytest.approx(1.5)
    assert model.weight[0, 3] == sparse.layers["weight"].trained()[0, 3]


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=24, max_size=24),
    nm=st.sampled_from([(1, 4), (2, 4), (3, 4), (1, 2), (2, 8), (4, 4)]),
    scale=st.sampled_from([0.5, 3.0]),
)
def test_ties_zeros_scales_and_the_mask_in_eval(values: list[int], nm: tuple[int, int], scale: float) -> None:
    n, m = nm
    model = nn.Linear(8, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(values, dtype=torch.float64).view(3, 8))
    sparse = rarefy.sparsify(model, "ste", pattern=f"{n}:{m}")
    layer = sparse.layers["weight"]
    expected = top(layer.trained(), n, m)
    assert torch.equal(layer.mask(), expected) and (expected.view(-1, m).sum(1) == n).all()
    with torch.no_grad():
        layer.target.parameter[0] *= scale  # one row of blocks
    model.eval()
    assert torch.equal(model.weight, layer.trained() * expected), "a positive factor moves no mask"
    with torch.no_grad():
        layer.target.parameter.copy_(torch.rand(3, 8))
    assert torch.equal(model.weight, layer.trained() * top(layer.trained(), n, m)), "found anew in every forward pass"


def test_the_forward_weight_packs_along_the_inputs_and_not_along_the_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    rarefy.sparsify(model, "ste").finalize()
    kept = model.weight != 0
    assert (kept.view(16, 4, 4).sum(2) == 2).all()
    assert not (kept.view(4, 4, 16).sum(1) == 2).all()


def test_sad_is_what_the_events_add_up_to_and_falls_with_refinement() -> None:
    totals = []
    for refine in (0.0, 0.02, 0.2):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        sparse = rarefy.sparsify(model, "sr-ste", optimizer=optimizer, refine=refine)
        total, masks = 0, sparse.masks()
        for step in range(120):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            now = sparse.masks()
            for name, mask in now.items():
                flips = overlap({name: masks[name]}, {name: mask}).total.flips
                assert flips == overlap({name: mask}, {name: masks[name]}).total.flips
                in_blocks = (mask ^ masks[name]).view(-1, 4).sum(1)
                assert (
                    not (in_blocks % 2).any()
                    and in_blocks.max() <= 4
                    and (flips == 0) == torch.equal(mask, masks[name])
                )
                total += flips
            masks = now
        sparse.detach()
        assert sum(turn.flips for turn in churn(sparse.events)) == total
        totals.append(total)
    assert totals[0] > totals[1] > totals[2] > 0


def test_layers_that_do_not_fit_stay_dense_and_are_listed() -> None:
    model = build("resnet-20", width=0.5)
    sparse = rarefy.sparsify(model, "ste", pattern="2:4", exclude="fc")
    reasons = {item.name: item.reason for item in sparse.summary().left_out}
    assert reasons["conv1.weight"] == "2:4 needs dimension 1 (3) to be a multiple of 4"
    assert "excluded" in reasons["fc.weight"] and len(sparse.layers) == 18
    gpt = build("gpt", dim=16, depth=1, heads=2, context=8, tied=False)
    sparse = rarefy.sparsify(gpt, "ste", pattern="1:8")
    assert "looked up" in {i.name: i.reason for i in sparse.left_out}["token.weight"]
    assert all(name.startswith(("blocks", "head")) for name in sparse.layers)


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [
        (nn.Linear(6, 4), {}, SelectionError, r"weight \[4, 6\]: 2:4 needs dimension 1 \(6\)"),
        (nn.Linear(8, 0), {}, SelectionError, r"weight \[0, 8\]: the weight is empty"),
        (nn.Linear(6, 4), {"include": "*"}, PatternError, r"weight \[4, 6\]"),
        (nn.Linear(8, 4), {"pattern": "5:4"}, PatternError, "5:4"),
        (nn.Linear(8, 4), {"sparsity": 0.7}, OptionError, "contradicts"),
        (nn.Linear(8, 4), {"pattern": "channel", "sparsity": 0.99}, rarefy.errors.AllocationError, r"weight \[4, 8\]"),
        (nn.Linear(8, 4), {"storage": "compressed"}, OptionError, "masked"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(
    model: nn.Module, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        rarefy.sparsify(model, "ste", **options)
    assert type(model) is nn.Linear and list(model.state_dict()) == list(before)


def test_weights_that_are_not_numbers_are_refused_and_named() -> None:
    model = mlp()
    with torch.no_grad():
        model[3].weight[2, 1] = float("nan")
    with pytest.raises(OptionError, match=r"3\.weight \[20, 16\]: scores hold NaN"):
        rarefy.sparsify(model, "ste")
    assert list(model.state_dict()) == list(mlp().state_dict())
    with pytest.raises(OptionError, match="refine"):
        rarefy.methods.SRSTE(refine=-1.0)


def test_the_refinement_is_not_scaled_by_amp_nor_by_accumulation() -> None:
    finals = []
    for scaled, parts in ((False, 1), (True, 1), (False, 4)):
        torch.manual_seed(0)
        model = nn.Linear(16, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        rarefy.sparsify(model, "sr-ste", optimizer=optimizer, refine=0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        for step in range(4):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            for part in x.chunk(parts):
                scaler.scale(F.mse_loss(model(part), part[:, :8]) / parts).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        finals.append(model.parametrizations.weight.original.detach().clone())
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(finals[0], finals[2], rtol=1e-5, atol=1e-6)
