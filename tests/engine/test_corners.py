"""Ways to use a model that once broke something: each test is a bug that was found and mended."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from rarefy.errors import OptionError, RarefyError, SelectionError, StateError
from tests.engine.common import assert_sparse, backward, batch, mlp


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.emb.weight


def test_a_state_is_not_overwritten_by_what_was_loaded_before_it() -> None:
    first = mlp()
    state = rarefy.sparsify(first, "static", sparsity=0.8, seed=1).state_dict()

    def edit_in_place(model: nn.Module) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(100)

    for edit in (lambda model: model.load_state_dict(first.state_dict()), edit_in_place):
        model = mlp(5)
        sparse = rarefy.sparsify(model, "static", sparsity=0.8, seed=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_state_dict(mlp(6).state_dict())  # dense weights, zeroed and remembered
        edit(model)
        before = copy.deepcopy(model.state_dict())
        sparse.load_state_dict(state)
        assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_loading_a_dense_state_into_tied_weights_applies_the_mask_at_once() -> None:
    model = Tied()
    sparse = rarefy.sparsify(model, "static", sparsity=0.8)
    with pytest.warns(UserWarning, match=r"emb\.weight"):
        model.load_state_dict(Tied().state_dict())
    assert int(model.head.weight.count_nonzero()) == sparse.nnz == 32


def test_a_second_sparsifier_on_the_same_weights_is_refused() -> None:
    model = mlp()
    first = rarefy.sparsify(model, "static", sparsity=0.8, include="0")
    rarefy.sparsify(model, "static", sparsity=0.5, exclude="0")  # other weights may have their own
    with pytest.raises(SelectionError, match=r"0\.weight \[16, 12\] is sparse already"):
        rarefy.sparsify(model, "static", sparsity=0.8)
    first.finalize()
    rarefy.sparsify(model, "static", sparsity=0.8, include="0")


def test_a_subclass_of_an_optimizer_counts_its_steps_once() -> None:
    class Mine(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            if getattr(self, "fail", False):
                raise RuntimeError("interrupted")
            return super().step(closure)

    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # from now on torch runs hooks around Adam.step as well
    model = mlp()
    optimizer = Mine(model.parameters(), lr=0.01)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=optimizer, every=2)
    for step in range(4):
        backward(model, step)
        optimizer.fail = step == 1
        if step == 1:
            with pytest.raises(RuntimeError):
                optimizer.step()
        else:
            optimizer.step()
            assert_sparse(sparse, 0.8)
        optimizer.zero_grad()
    assert sparse.step_count == 3


def test_names_that_look_like_wrappers_are_not_taken_for_them() -> None:
    model = nn.Module()
    model.fc, model.module = nn.Linear(30, 30), nn.ModuleDict({"fc": nn.Linear(30, 30)})
    assert list(rarefy.sparsify(model, "static", sparsity=0.8).layers) == ["fc.weight", "module.fc.weight"]
    part = nn.Sequential(nn.Linear(8, 8), torch.compile(nn.Linear(8, 8), backend="eager"))
    assert list(rarefy.sparsify(part, "static", sparsity=0.5).layers) == ["0.weight", "1.weight"]
    whole = nn.DataParallel(nn.Sequential(nn.Linear(8, 8)))
    assert list(rarefy.sparsify(whole, "static", sparsity=0.5).layers) == ["0.weight"]


def test_a_module_under_two_names_answers_to_both() -> None:
    model = nn.Module()
    model.a = nn.Linear(8, 8)
    model.b = model.a
    assert list(rarefy.sparsify(model, "static", sparsity=0.5, include="b").layers) == ["a.weight"]


def test_one_optimizer_after_another_over_the_same_weights() -> None:
    model = mlp()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, optimizer=[adam, lbfgs, adam], every=2)
    for step in range(4):
        backward(model, step)
        adam.step()
        assert_sparse(sparse, 0.8)
        adam.zero_grad()
    assert sparse.step_count == 4

    def closure() -> torch.Tensor:
        lbfgs.zero_grad()
        return backward(model, 0)

    lbfgs.step(closure)
    assert_sparse(sparse, 0.8)
    assert sparse.step_count == 5


def test_another_networks_backward_does_not_count_as_this_ones_gradient() -> None:
    """A GAN: the generator's loss reaches the discriminator's weights after the discriminator has stepped."""

    def train(opposed: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        d, g = nn.Sequential(nn.Linear(12, 30, bias=False)), nn.Linear(6, 12, bias=False)
        model = nn.ModuleDict({"d": d, "g": g})
        opt_d, opt_g = torch.optim.SGD(d.parameters(), lr=0.0), torch.optim.SGD(g.parameters(), lr=0.0)
        sparse = rarefy.sparsify(model, "rigl", sparsity=0.7, optimizer=[opt_d, opt_g], every=1, stop=9)
        z = torch.randn(16, 6)
        opt_d.zero_grad()
        d(g(z).detach()).square().sum().backward()
        opt_d.step()
        opt_g.zero_grad()
        (-d(g(z)).square().sum() if opposed else d(g(z)).square().sum()).backward()
        opt_g.step()
        return sparse.masks()

    assert torch.equal(train(True)["d.0.weight"], train(False)["d.0.weight"])


@pytest.mark.parametrize("between", ["nothing", "clip", "autograd.grad", "create_graph", "data.zero_"])
def test_the_sum_of_dense_gradients_is_that_of_the_passes(between: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    twin = copy.deepcopy(model)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, every=1, init="dense")
    twin.load_state_dict(model.state_dict())

    def loss(net: nn.Module, seed: int) -> torch.Tensor:
        x, y = batch(seed)
        return F.cross_entropy(net(x.double()), y)

    loss(model, 0).backward(create_graph=between == "create_graph")
    loss(twin, 0).backward()
    if between == "clip":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    elif between == "autograd.grad":
        torch.autograd.grad(loss(model, 3), list(model.parameters()))
    elif between == "data.zero_":
        for p in [*model.parameters(), *twin.parameters()]:
            p.grad.data.zero_()
    loss(model, 1).backward()
    loss(twin, 1).backward()
    for name, layer in sparse.layers.items():
        outside = ~layer.mask()
        assert torch.allclose(layer._gradient.total[outside], twin.get_parameter(name).grad[outside], atol=1e-12)


def test_the_summary_survives_what_sparsify_accepted() -> None:
    model = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Linear(8, 40))
    sparse = rarefy.sparsify(model, "static", exclude="0", sparsity=0.5)
    assert "excluded by '0'" in str(sparse.summary())
    model.append(nn.LazyLinear(4))
    model[1] = nn.Linear(8, 40)
    text = str(sparse.summary())
    assert "shape of this lazy parameter" in text
    assert "replaced after sparsify(): 1.weight" in text


def test_an_optimizer_without_hooks_is_refused_before_anything_changes() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner

    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match="no step hooks"):
        rarefy.sparsify(model, "static", sparsity=0.8, optimizer=Wrapper(torch.optim.SGD(model.parameters())))
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_a_damaged_generator_is_noticed_before_anything_changes() -> None:
    model = mlp()
    sparse = rarefy.sparsify(model, "static", sparsity=0.8)
    state = sparse.state_dict()
    state["generator"] = torch.full_like(state["generator"], 255)
    masks = sparse.masks()
    with pytest.raises(StateError, match="generator"):
        sparse.load_state_dict(state)
    assert all(torch.equal(masks[n], m) for n, m in sparse.masks().items())


def test_an_allocation_that_contradicts_the_pattern_is_refused() -> None:
    for wrong in ({"nosuch": 0.3}, {"*": 0.3}):
        with pytest.raises(RarefyError):
            rarefy.sparsify(mlp(), "static", pattern="2:4", allocation=wrong)
    assert rarefy.sparsify(mlp(), "static", pattern="2:4", allocation={"*": 0.5}).sparsity == 0.5


def test_old_style_weight_norm_leaves_the_computed_weight_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.nn.utils.weight_norm(nn.LSTM(8, 8), "weight_hh_l0")
    assert list(rarefy.sparsify(module, "static", sparsity=0.5).layers) == ["weight_ih_l0"]


def test_parameters_may_be_swapped_by_a_conversion() -> None:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = mlp()
        sparse = rarefy.sparsify(model, "static", sparsity=0.8)
        model.to(torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            x, y = batch(step)
            F.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
            sparse.step()
            optimizer.zero_grad()
            assert all(not layer.weight()[~layer.mask()].any() for layer in sparse.layers.values())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_calling_step_beside_an_optimizer_is_refused() -> None:
    model = mlp()
    sparse = rarefy.sparsify(model, "static", sparsity=0.8, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(OptionError, match="follows its optimizer"):
        sparse.step()


def test_an_optimizer_of_another_model_is_noticed() -> None:
    with pytest.warns(UserWarning, match="holds none of the sparse weights"):
        rarefy.sparsify(mlp(), "static", sparsity=0.8, optimizer=torch.optim.SGD(mlp().parameters(), lr=0.1))
