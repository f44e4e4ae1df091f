"""2:4 on CUDA: every reason against it, what is handed to PyTorch (seen by a stand-in without a GPU), and the real thing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.errors import ModelError, OptionError
from rarefy.kernels import semi_structured
from rarefy.kernels.semi_structured import pattern_problem, reason_against
from rarefy.nn import SemiStructuredLinear, semi_structured_
from rarefy.patterns import NM, TransposableNM


def two_of_four(weight: Tensor, transposable: bool = True) -> Tensor:
    scores = weight.detach().abs().float().cpu()
    mask = TransposableNM(2, 4).project(scores, keep=8) if transposable else NM(2, 4).project(scores, 2)
    return mask.to(weight.device)


def mlp(dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).to(device, dtype)


def masks_of(model: nn.Module, transposable: bool = True) -> dict[str, Tensor]:
    return {name: two_of_four(p, transposable) for name, p in model.named_parameters() if name.endswith("weight")}


class StandIn:
    """In place of PyTorch's conversion: checks what the real one would be given, and stays dense."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, weight: Tensor) -> Tensor:
        rows, cols = semi_structured.MULTIPLES[weight.dtype]
        assert weight.is_contiguous() and not weight.requires_grad and weight.data_ptr() % 16 == 0
        assert weight.shape[0] % rows == 0 and weight.shape[1] % cols == 0
        assert int((weight.view(weight.shape[0], -1, 4) != 0).sum(2).max()) <= 2
        self.shapes.append(tuple(weight.shape))
        return weight


@pytest.fixture
def emulated(monkeypatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(semi_structured, "device_problem", lambda device: None)
    monkeypatch.setattr(semi_structured, "convert", stand_in)
    return stand_in


def test_every_reason_against_it(emulated):
    weight = torch.randn(64, 128).bfloat16()
    good = weight * two_of_four(weight)
    assert reason_against(good) is None and reason_against(good, both=True) is None
    assert reason_against(weight, two_of_four(weight)) is None
    rows_only = weight * two_of_four(weight, transposable=False)
    assert reason_against(rows_only) is None
    big = torch.zeros(65 * 128, dtype=torch.bfloat16)
    for wrong, message, both in (
        (good.float(), "float32; sparse tensor cores take .* autocast", False),
        (good.double(), "float64; sparse tensor cores take", False),
        (good[None], "3 dimensions", False),
        (good[:40], r"\[40, 128\] is not a multiple of \[32, 64\]", False),
        (good[:, :96].contiguous(), r"\[64, 96\] is not a multiple of \[32, 64\]", False),
        (good[:32].contiguous(), r"is not a multiple of \[64, 64\]", True),
        (good.t(), "not contiguous", False),
        (big[1 : 1 + 64 * 128].view(64, 128), "multiple of 16 bytes", False),
        (weight, "keeps 4 of 4 neighbouring inputs", False),
        (rows_only, "neighbouring outputs .* transposable", True),
        (torch.zeros(0, 64, dtype=torch.bfloat16), "not a multiple", False),
    ):
        found = reason_against(wrong, both=both)
        assert found is not None
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(found)
    assert pattern_problem(torch.ones(4, 6, dtype=torch.bool)) == "its 6 inputs are not a multiple of 4"


def test_reasons_of_the_device(monkeypatch):
    cuda = torch.device("cuda", 0)
    assert "it is on cpu" in semi_structured.device_problem(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert semi_structured.device_problem(cuda) == "Tesla T4 has compute capability 7.5; sparse tensor cores need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert semi_structured.device_problem(cuda) is None
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in semi_structured.device_problem(cuda)


def reference(model: nn.Sequential, masks: dict[str, Tensor], x: Tensor) -> Tensor:
    first, last = (model[i].weight * masks[f"{i}.weight"] for i in (0, 2))
    return F.linear(F.relu(F.linear(x, first, model[0].bias)), last, model[2].bias)


@pytest.mark.parametrize("transposable", [True, False])
@pytest.mark.parametrize("gradient", ["kept", "dense"])
def test_training_step_emulated(emulated, transposable, gradient):
    model = mlp()
    masks = masks_of(model, transposable)
    plain = copy.deepcopy(model)
    assert semi_structured_(model, masks, transposable=transposable, gradient=gradient) == {"0": None, "2": None}
    for step in range(2):
        x = torch.randn(5, 7, 64).bfloat16()
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = model(mine), reference(plain, masks, theirs)
        torch.testing.assert_close(y, want, rtol=3e-2, atol=3e-2)
        y.float().square().sum().backward()
        want.float().square().sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=5e-2, atol=5e-1)
        masked = model[0].weight.grad[~masks["0.weight"]]
        assert bool(masked.any()) == (gradient == "dense")
        torch.testing.assert_close(model[0].weight.grad * masks["0.weight"], plain[0].weight.grad, rtol=5e-2, atol=1.0)
        each = [(128, 64), (64, 128)]
        turned = [(64, 128), (128, 64)] if transposable else []
        expected = [turned[0], each[0], turned[1], each[1]] if transposable else each
        assert emulated.shapes == expected * (step + 1)
        with torch.no_grad():
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                p.sub_(0.01 * p.grad)
                q.copy_(p)
        model.zero_grad()
        plain.zero_grad()


def test_inference_compresses_once(emulated):
    model = mlp()
    with torch.no_grad():
        for name, mask in masks_of(model).items():
            model.get_parameter(name).mul_(mask)
    plain = copy.deepcopy(model)
    assert semi_structured_(model) == {"0": None, "2": None}
    x = torch.randn(3, 64).bfloat16()
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(model(x), plain(x))
    assert emulated.shapes == [(128, 64), (64, 128)]
    mask = model[0].mask.roll(1, 1).view(128, -1, 4).roll(1, 2).view(128, 64) & model[0].mask
    model[0].set_mask_(mask)
    with torch.inference_mode():
        model(x)
    assert len(emulated.shapes) == 3  # the one that changed
    model(x).float().sum().backward()  # on what was compressed for inference
    assert len(emulated.shapes) == 3 and model[0].weight.grad is not None
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_autocast_computes_in_its_dtype(emulated):
    model = mlp(torch.float32)
    masks = masks_of(model)
    assert "float32" in semi_structured_(model, masks)["0"]
    assert semi_structured_(model, masks, dtype=torch.bfloat16) == {"0": None, "2": None}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(3, 64))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32


def test_what_does_not_fit_stays_and_says_why(emulated):
    model = nn.Sequential(nn.Linear(64, 60), nn.Linear(60, 64), nn.Linear(64, 64)).bfloat16()
    kind = type("Mine", (nn.Linear,), {})
    model.append(kind(64, 64))
    with torch.no_grad():
        model[2].weight.mul_(two_of_four(model[2].weight))
    verdicts = semi_structured_(model)
    assert [*verdicts] == ["0", "1", "2", "3"] and verdicts["2"] is None
    assert "multiple" in verdicts["0"] and "multiple" in verdicts["1"] and "Mine" in verdicts["3"]
    assert [type(m) for m in model] == [nn.Linear, nn.Linear, SemiStructuredLinear, kind]
    wrong = {"0": torch.ones(3, 3, dtype=torch.bool)}
    assert "its mask is" in semi_structured_(nn.Sequential(nn.Linear(64, 64)).bfloat16(), wrong)["0"]
    with pytest.raises(ModelError, match="no linear layer 7"):
        semi_structured_(model, {"7": torch.ones(3, 3, dtype=torch.bool)})
    with pytest.raises(OptionError, match="gradient='none'"):
        semi_structured_(model, gradient="none")
    with pytest.raises(OptionError, match="not 2:4"):
        model[2].set_mask_(torch.ones(64, 64, dtype=torch.bool))
    with pytest.raises(OptionError, match="a mask of"):
        model[2].set_mask_(torch.ones(64, 32, dtype=torch.bool))


def test_a_pass_that_cannot_run_so_is_never_silent(monkeypatch, emulated):
    model = mlp()
    masks = masks_of(model)
    semi_structured_(model, masks)
    x = torch.randn(3, 64).bfloat16()
    fast = model(x)
    assert model[0].reason is None
    monkeypatch.setattr(semi_structured, "device_problem", lambda device: f"it is on {device}")
    with pytest.warns(UserWarning, match="runs dense: it is on cpu"):
        dense = model(x)
    torch.testing.assert_close(dense, fast, rtol=3e-2, atol=3e-2)
    assert model[0].reason == "it is on cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)  # once


@pytest.mark.parametrize("gradient", ["kept", "dense"])
def test_a_dense_pass_takes_the_same_gradient(monkeypatch, emulated, gradient):
    model = mlp()
    masks = masks_of(model)
    semi_structured_(model, masks, gradient=gradient)
    x, grads = torch.randn(3, 64).bfloat16(), []
    for problem in (None, "it is on another device"):
        monkeypatch.setattr(semi_structured, "device_problem", lambda device, problem=problem: problem)
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(x).float().sum().backward()
        grads.append(model[0].weight.grad)
        assert bool(grads[-1][~masks["0.weight"]].any()) == (gradient == "dense")
    torch.testing.assert_close(*grads, rtol=5e-2, atol=5e-2)


class Strict(Tensor):
    """A packed weight as particular as PyTorch's: operands of 1 row or more, contiguous, and of the packed dtype."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        x, *others = args
        if func is F.linear:
            assert x.is_contiguous() and x.dtype == others[0].dtype
            assert len(x) > 0, "the unspecified dimension size -1 can be any value"
        plain = [a.as_subclass(Tensor) if isinstance(a, Strict) else a for a in args]
        return func(*plain, **(kwargs or {}))


@pytest.mark.parametrize("transposable", [True, False])
def test_any_strides_and_no_samples(monkeypatch, emulated, transposable):
    monkeypatch.setattr(semi_structured, "convert", lambda weight: weight.as_subclass(Strict))
    model = mlp()
    semi_structured_(model, masks_of(model, transposable), transposable=transposable)
    wide = torch.randn(4, 5, 128).bfloat16()
    for x in (wide[..., :64], wide[0, :, :64], wide[..., ::2], wide[:, 0, 64:], wide[0, 0, :64]):
        torch.testing.assert_close(model(x), model(x.clone(memory_format=torch.contiguous_format)))
    turned = torch.randn(64, 5).bfloat16().t().requires_grad_()
    model(turned).float().sum().backward()
    assert turned.grad.shape == (5, 64)
    for shape in ((0, 64), (3, 0, 64)):
        model.zero_grad()
        x = torch.randn(shape).bfloat16().requires_grad_()
        y = model(x)
        y.float().sum().backward()
        assert y.shape == shape and x.grad.shape == shape and not model[0].weight.grad.any()


def test_the_mask_is_its_own_and_what_it_drops_may_be_anything(emulated):
    layer = mlp()[0]
    masks = {"weight": two_of_four(layer.weight)}
    given = masks["weight"].clone()
    assert semi_structured_(layer, masks) == {"": None}
    layer.set_mask_(torch.zeros_like(given))
    assert torch.equal(masks["weight"], given)
    layer.set_mask_(given)
    with torch.no_grad():
        layer.weight[~given] = torch.nan
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    layer(x).float().sum().backward()
    assert bool(layer(x).isfinite().all()) and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("transposable", [True, False])
def test_a_mask_that_is_not_2_4_is_not_loaded(emulated, transposable):
    model = mlp()
    semi_structured_(model, masks_of(model), transposable=transposable)
    before = model[0].mask.clone()
    rows = two_of_four(torch.randn(128, 64), transposable=False)
    model.load_state_dict({**model.state_dict(), "0.mask": two_of_four(torch.randn(128, 64))})
    model.load_state_dict({**model.state_dict(), "0.mask": before})
    if transposable:
        with pytest.raises(RuntimeError, match=r"0\.mask is not 2:4: .* outputs"):
            model.load_state_dict({**model.state_dict(), "0.mask": rows})
    with pytest.raises(RuntimeError, match=r"0\.mask is not 2:4: it keeps 4 of 4 neighbouring inputs"):
        model.load_state_dict({**model.state_dict(), "0.mask": torch.ones_like(before)})
    assert torch.equal(model[0].mask, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("transposable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype, transposable):
    problem = semi_structured.device_problem(torch.device("cuda"))
    if problem is not None:
        pytest.skip(problem)
    model = mlp(dtype, "cuda")
    masks = masks_of(model, transposable)
    plain = copy.deepcopy(model)
    assert semi_structured_(model, masks, transposable=transposable) == {"0": None, "2": None}
    x = torch.randn(96, 128, device="cuda", dtype=dtype)[:, 32:96]  # strides of its own
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = model(mine), reference(plain, masks, theirs)
    torch.testing.assert_close(y, want, rtol=3e-2, atol=3e-2)
    y.float().mean().backward()
    want.float().mean().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=5e-2, atol=1e-3)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=5e-2, atol=1e-3)
    assert model[0].reason is None
