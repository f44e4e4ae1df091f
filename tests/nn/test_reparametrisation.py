"""Computed weights by themselves: derivatives against their formulas, names, copies, and every kind of module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError
from rarefy.nn import Reparametrisation, ScoreMask, ThresholdMask, bake_
from rarefy.nn.reparametrisation import install, long_tailed, plain_state_dict, remove, through


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_through_has_the_value_of_one_and_the_slope_of_another() -> None:
    x, slope, outer = randn(3, 4).requires_grad_(), randn(3, 4, seed=1), randn(3, 4, seed=2)
    value = through(x > 0, x, slope)
    assert torch.equal(value, (x > 0).double())
    assert torch.equal(torch.autograd.grad((value * outer).sum(), x)[0], outer * slope)
    assert torch.equal(torch.autograd.grad((through(x > 0, x) * outer).sum(), x)[0], outer)


def test_the_long_tailed_derivative_in_closed_form() -> None:
    for q, h in [(0, 2), (0.4, 0.4), (-0.4, 0.4), (1, 0.4), (-1, 0.4), (1.0001, 0), (-5, 0), (0.1, 1.6)]:
        assert long_tailed(torch.tensor(float(q), dtype=torch.float64)).item() == pytest.approx(h, abs=1e-12)
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    assert torch.trapezoid(long_tailed(grid), grid).item() == pytest.approx(1.44, abs=1e-6)


def numbers(mask: Reparametrisation, w: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    (extra,) = mask.parameters()
    gradients = torch.autograd.grad((mask(w) * outer).sum(), [w, extra])
    return gradients[0], gradients[1]


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3), (6, 2, 5)])
def test_threshold_gradients_are_the_papers(shape: tuple[int, ...]) -> None:
    w = randn(*shape).requires_grad_()
    outer = randn(*shape, seed=1)
    mask = ThresholdMask(w)
    with torch.no_grad():
        mask.threshold.copy_(randn(shape[0], seed=2) * 0.7)
    t = mask.threshold.detach().view(-1, *[1] * (len(shape) - 1))
    q = w.detach().abs() - t
    m = (q > 0).double()
    h = torch.where(q.abs() <= 0.4, 2 - 4 * q.abs(), 0.4 * (q.abs() <= 1).double())
    assert torch.equal(mask(w), w * m)
    assert torch.equal(mask.kept(w), q > 0)
    dw, dt = numbers(mask, w, outer)
    torch.testing.assert_close(dw, outer * (m + w.detach().abs() * h), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dt, -(outer * w.detach() * h).flatten(1).sum(1), rtol=1e-12, atol=1e-12)
    dropped = (m == 0) & (outer * w.detach() != 0)
    assert (dw[dropped & (q.abs() < 1)] != 0).all(), "a weight near its threshold is not trained"
    assert not dw[dropped & (q.abs() > 1)].any(), "a plain straight-through estimator would train these"


def test_the_derivative_is_that_of_a_step_whose_slope_is_h() -> None:
    """Replace the step by H's own integral, whose true derivative autograd takes; values differ, chain rule must not."""

    def integral(q: Tensor) -> Tensor:  # of H, odd around 0
        a = q.abs()
        return q.sign() * torch.where(a <= 0.4, 2 * a - 2 * a * a, torch.where(a <= 1, 0.48 + 0.4 * (a - 0.4), 0.72))

    w, t, outer = randn(4, 6).requires_grad_(), (randn(4, seed=3) * 0.5).requires_grad_(), randn(4, 6, seed=1)
    q = w.abs() - t[:, None]
    smooth = integral(q)
    fixed = (q > 0).double().detach()
    expected = torch.autograd.grad((w * (smooth - smooth.detach() + fixed) * outer).sum(), [w, t])
    mask = ThresholdMask(w)
    with torch.no_grad():
        mask.threshold.copy_(t)
    for mine, theirs in zip(numbers(mask, w, outer), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_thresholds_at_their_ends() -> None:
    linear = nn.Linear(6, 4).double()
    with torch.no_grad():
        linear.weight[0, 0] = 0
    x, dense = randn(3, 6), linear(randn(3, 6))
    install(linear, "weight", mask := ThresholdMask(linear.weight))
    assert torch.equal(linear(x), dense)
    assert int(mask.kept(linear.parametrizations.weight.original).sum()) == 23, "|w| > 0 is strict"
    with torch.no_grad():
        mask.threshold.fill_(-1.0)
    assert torch.equal(linear(x), dense)
    assert mask.kept(linear.parametrizations.weight.original).all()
    with torch.no_grad():
        mask.threshold[2] = 100.0
    changed = (linear(x) != dense).any(0)
    assert changed.tolist() == [False, False, True, False]
    with pytest.raises(RarefyError, match="cannot be set"):
        mask.keep(torch.ones(4, 6, dtype=torch.bool))


def test_score_gradients_are_the_products_kept_or_not() -> None:
    w, outer = randn(5, 7).requires_grad_(), randn(5, 7, seed=1)
    mask = ScoreMask(w)
    kept = randn(5, 7, seed=2) > 0
    mask.keep(kept)
    dw, ds = numbers(mask, w, outer)
    assert torch.equal(mask(w), w * kept)
    assert torch.equal(ds, w.detach() * outer)
    assert torch.equal(dw, outer * kept)
    assert torch.equal(mask.kept(w), kept)


def modules() -> dict[str, tuple[nn.Module, str, tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    return {
        "linear": (nn.Linear(8, 4), "weight", (x,)),
        "conv1d": (nn.Conv1d(5, 6, 3), "weight", (x,)),
        "conv2d": (nn.Conv2d(2, 6, 3, groups=2), "weight", (torch.randn(2, 2, 5, 5),)),
        "embedding": (nn.Embedding(9, 4), "weight", (torch.randint(9, (3, 5)),)),
        "attention": (nn.MultiheadAttention(8, 2, batch_first=True), "in_proj_weight", (x, x, x)),
        "lstm": (nn.LSTM(8, 4, 2, batch_first=True), "weight_hh_l1", (x,)),
        "gru": (nn.GRU(8, 4, batch_first=True), "weight_ih_l0", (x,)),
    }


def first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("kind", modules())
@pytest.mark.parametrize("training", [True, False])
def test_every_module_computes_with_the_masked_weight_and_is_given_back(kind: str, training: bool) -> None:
    module, attribute, inputs = modules()[kind]
    module.train(training)
    names = [name for name, _ in module.named_parameters()]
    reference = copy.deepcopy(module)
    weight = getattr(module, attribute)
    kept = torch.rand(weight.shape) > 0.5
    with torch.no_grad():
        getattr(reference, attribute).mul_(kept)
    install(module, attribute, mask := ScoreMask(weight))
    mask.keep(kept)
    out = first(module(*inputs))
    torch.testing.assert_close(out, first(reference(*inputs)))
    out.square().sum().backward()
    first(reference(*inputs)).square().sum().backward()
    dense = getattr(reference, attribute).grad
    torch.testing.assert_close(weight.grad, dense * kept)
    torch.testing.assert_close(mask.scores.grad, dense * weight.detach())

    twin = bake_(copy.deepcopy(module))
    torch.testing.assert_close(first(twin(*inputs)), out)
    assert [name for name, _ in twin.named_parameters()] == names
    assert not getattr(twin, attribute)[~kept].any() and type(twin) is type(reference)
    assert getattr(module, attribute) is not weight, "the original was baked too"
    remove(module, attribute)
    assert getattr(module, attribute) is weight
    assert [name for name, _ in module.named_parameters()] == names


def test_two_weights_of_one_module_keep_their_order() -> None:
    module = nn.LSTM(8, 4)
    names = [name for name, _ in module.named_parameters()]
    for attribute in ("weight_hh_l0", "weight_ih_l0"):
        install(module, attribute, ScoreMask(getattr(module, attribute)))
    for attribute in ("weight_hh_l0", "weight_ih_l0"):
        remove(module, attribute)
    assert [name for name, _ in module.named_parameters()] == names


def test_a_state_dict_computes_the_same_elsewhere_and_has_plain_names_on_request() -> None:
    def make(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        install(model[0], "weight", ThresholdMask(model[0].weight))
        install(model[2], "weight", mask := ScoreMask(model[2].weight))
        mask.keep(torch.rand(4, 5) > 0.5)
        with torch.no_grad():
            model[0].parametrizations.weight[0].threshold.uniform_(0, 0.3)
        return model

    one, two = make(0), make(1)
    x = torch.randn(3, 6)
    assert not torch.equal(one(x), two(x))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x))
    plain = plain_state_dict(one, one.state_dict())
    assert sorted(plain) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert plain["0.weight"] is not None and plain["0.weight"].count_nonzero() == 30
    nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).load_state_dict(plain)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("make", [ScoreMask, ThresholdMask])
def test_compiles_whole_and_once_and_exports(make: type[Reparametrisation]) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 4), torch.randn(3, 6)
    install(linear, "weight", mask := make(linear.weight))
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(linear, backend=backend, fullgraph=True)
    full = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        if isinstance(mask, ScoreMask):
            mask.keep(randn(4, 6, seed=seed) > 0)
        else:
            with torch.no_grad():
                mask.threshold.copy_(randn(4, seed=seed) * 0.3)
        results = []
        for f in (linear, compiled, full):
            linear.zero_grad()
            out = f(x)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in linear.parameters())])
        for other in results[1:]:
            for mine, theirs in zip(results[0], other, strict=True):
                torch.testing.assert_close(mine, theirs)
    assert len(graphs) == 1
    program = torch.export.export(linear.eval(), (x,))
    torch.testing.assert_close(program.module()(x), linear(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_number_types(dtype: torch.dtype) -> None:
    linear = nn.Linear(6, 4).to(dtype)
    install(linear, "weight", ThresholdMask(linear.weight))
    linear(torch.randn(3, 6, dtype=dtype)).sum().backward()
    assert linear.weight.dtype == dtype == linear.parametrizations.weight[0].threshold.grad.dtype
