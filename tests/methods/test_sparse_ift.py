"""Sparse-IFT as a method: the same budget for every kind, trained by the masks of another method."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy import models
from rarefy.errors import ModelError, OptionError
from rarefy.methods import RigL, SparseIFT
from rarefy.metrics import flops
from rarefy.nn import iso_flop_
from rarefy.nn.iso_flop import KINDS
from rarefy.training.config import RunConfig
from rarefy.training.finished import finished_network
from rarefy.training.loop import train
from tests.engine.common import assert_sparse

EXAMPLE = torch.zeros(1, 3, 16, 16)


def build(width: float) -> nn.Module:
    torch.manual_seed(0)
    return models.build("resnet-20", width=width * 0.25)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(4, 3, 16, 16, generator=generator), torch.randint(10, (4,), generator=generator)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_dense_networks_flops(kind: str, sparsity: float) -> None:
    method = SparseIFT(kind=kind, sparsity=sparsity, masks="static")
    model = method.model(build, EXAMPLE)
    sparse = rarefy.sparsify(model, method)
    dense = flops(build(1.0), EXAMPLE).dense
    assert flops(model, EXAMPLE, sparse.masks()).sparse == pytest.approx(dense, rel=0.01)
    ends = {"conv1.weight", "fc.weight"}
    assert all(sparse.layers[name].sparsity == 0 for name in ends)
    assert sum(layer.sparsity > 0 for layer in sparse.layers.values()) >= 18


@pytest.mark.parametrize("kind", KINDS)
def test_rigl_updates_keep_every_layers_count_and_leave_nothing_behind(kind: str) -> None:
    method = SparseIFT(kind=kind, sparsity=0.75, mask_options={"every": 2, "stop": 6})
    model = method.model(build, EXAMPLE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    sparse = rarefy.sparsify(model, method, optimizer=optimizer, total_steps=8)
    counts = {name: layer.nnz for name, layer in sparse.layers.items()}
    seen: list[dict[str, Tensor]] = []
    for i in range(8):
        step(model, optimizer, i)
        assert_sparse(sparse)
        assert {name: layer.nnz for name, layer in sparse.layers.items()} == counts
        seen.append(sparse.masks())
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(seen)]
    assert changed[0] and changed[2] and not any(changed[5:])  # at steps 2 and 4; from the stop at 6 on, never
    plain = sparse.finalize()
    for name, mask in sparse.masks().items():
        assert not plain.get_parameter(name).detach()[~mask].any()


def test_the_masks_are_the_inner_methods_own() -> None:
    """Trained beside RigL with the solved sparsities: the same weights bit for bit."""
    method = SparseIFT(kind="parallel", sparsity=0.5, mask_options={"every": 2})
    one = method.model(build, EXAMPLE)
    two = copy.deepcopy(one)
    first, second = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (one, two))
    rarefy.sparsify(one, method, optimizer=first, total_steps=8)
    levels = one._rarefy_iso_flop.sparsities
    rarefy.sparsify(two, RigL(allocation={**levels, "*": 0.0}, every=2), optimizer=second, total_steps=8)
    for i in range(6):
        step(one, first, i)
        step(two, second, i)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("masks", ["static", "set", "rigl", "gradual", "magnitude"])
def test_other_masks(masks: str) -> None:
    method = SparseIFT(kind="doped", sparsity=0.75, masks=masks)
    model = method.model(build, EXAMPLE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, method, optimizer=optimizer, total_steps=4)
    for i in range(4):
        step(model, optimizer, i)
    assert flops(model, EXAMPLE, sparse.masks()).sparse == pytest.approx(flops(build(1.0), EXAMPLE).dense, rel=0.01)


def test_masks_that_look_at_data_get_it() -> None:
    method = SparseIFT(kind="doped", sparsity=0.75, masks="snip")
    model = method.model(build, EXAMPLE)
    assert method.needs_calibration and not SparseIFT().needs_calibration
    with pytest.raises(OptionError, match="calibration"):
        rarefy.sparsify(model, method)
    batch = (torch.randn(4, 3, 16, 16), torch.arange(4))
    assert rarefy.sparsify(model, method, calibration=[batch]).sparsity > 0.3


@pytest.mark.parametrize("kind", ["wide", "parallel", "doped"])
def test_sparsity_zero_trains_bit_for_bit_as_the_dense_network(kind: str) -> None:
    method = SparseIFT(kind=kind, sparsity=0.0)
    model, dense = method.model(build, EXAMPLE), build(1.0)
    assert list(model.state_dict()) == list(dense.state_dict())
    first, second = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, dense))
    rarefy.sparsify(model, method, optimizer=first, total_steps=4)
    for i in range(3):
        step(model, first, i)
        step(dense, second, i)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_a_rewritten_network_may_be_a_part_of_another() -> None:
    model = build(1.0)
    iso_flop_(model, "parallel", 0.75, EXAMPLE)
    whole = nn.Sequential(nn.Conv2d(3, 3, 1), model)
    method = SparseIFT(kind="parallel", sparsity=0.75, masks="static")
    sparse = rarefy.sparsify(whole, method)
    assert sparse.layers["0.weight"].sparsity == 0
    assert sparse.layers["1.layer1.0.conv1.branches.0.layer.weight"].sparsity == pytest.approx(0.75, abs=0.02)
    rarefy.sparsify(copy.deepcopy(sparse.finalize()), method)


RUN: dict[str, Any] = {
    "data": "digits",
    "model": "lenet-300-100",
    "width": 0.2,
    "limit_train": 400,
    "limit_test": 100,
    "method": "sparse-ift",
    "sparsity": 0.75,
    "epochs": 2,
    "threads": 1,
    "device": "cpu",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_from_the_configuration(kind: str, tmp_path: Path) -> None:
    options = {"kind": kind, "mask_options": {"every": 2}, "masks": "set", "dense_stem": False}
    result = train(RunConfig.model_validate({**RUN, "method_options": options}), tmp_path / "run")
    assert result["flops"] == pytest.approx(result["flops_dense"], rel=0.01)
    assert result["training_flops"] == pytest.approx(result["training_flops_dense"], rel=0.01)
    model, inputs = finished_network(tmp_path / "run")
    assert model(inputs.example).shape == (1, 10)
    name = next(n for n, s in model._rarefy_iso_flop.sparsities.items() if s > 0)
    assert not bool(model.get_parameter(name).detach().all())


def test_a_dense_first_layer_that_costs_too_much_is_told() -> None:
    with pytest.raises(ModelError, match="dense_stem=False"):
        SparseIFT(kind="wide").model(
            lambda width: models.build("lenet-300-100", width=width), torch.zeros(1, 1, 28, 28)
        )


def test_resume_is_exact() -> None:
    method = SparseIFT(kind="parallel", sparsity=0.5, mask_options={"every": 2})

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = method.model(build, EXAMPLE)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = start()
    sparse = rarefy.sparsify(model, method, optimizer=optimizer, total_steps=8)
    for i in range(3):
        step(model, optimizer, i)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparse.state_dict()))
    again, other = start()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    rarefy.sparsify(again, method, optimizer=other, total_steps=8, state=saved[2])
    for i in range(3, 7):
        step(model, optimizer, i)
        step(again, other, i)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_is_refused() -> None:
    method = SparseIFT(kind="parallel", sparsity=0.75)
    with pytest.raises(OptionError, match="was not"):
        rarefy.sparsify(build(1.0), method)
    with pytest.raises(OptionError, match="Use the same"):
        rarefy.sparsify(SparseIFT(kind="doped", sparsity=0.75).model(build, EXAMPLE), method)
    with pytest.raises(OptionError, match="must see the network"):
        method.model(build)
    with pytest.raises(ModelError, match="ignores the width"):
        SparseIFT(kind="wide").model(lambda width: build(1.0), EXAMPLE)
    for options, match in (
        ({"masks": "dense"}, "no option"),
        ({"masks": "rigel"}, "did you mean"),
        ({"masks": "stable-rps"}, "no option"),
        ({"mask_options": {"evry": 3}}, "did you mean 'every'"),
        ({"mask_options": {"sparsity": 0.5}}, "may not hold"),
        ({"kind": "tall"}, "kind"),
        ({"sparsity": 1.0}, "sparsity"),
    ):
        with pytest.raises(OptionError, match=match):
            SparseIFT(**options)


def test_every_moment_of_the_inner_methods_is_handed_on() -> None:
    """A moment that rigl and its bases override and sparse-ift does not would be lost in silence."""
    from rarefy.engine import Method

    moments = {n for n in dir(Method) if not n.startswith("_") and callable(getattr(Method, n))} - {"make", "options"}
    for inner in ("static", "set", "rigl"):
        cls = rarefy.methods.available()[inner]
        used = {n for n in moments if getattr(cls, n) is not getattr(Method, n)}
        assert used <= set(vars(SparseIFT)), inner
