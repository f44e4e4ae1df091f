"""Compressed storage: the same run as on masks, in the memory of the kept weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy import Sparsifier, kernels
from rarefy.engine.dense_gradient import BLOCK, DenseGradient
from rarefy.errors import OptionError, PatternError, SelectionError, StateError
from rarefy.nn import SparseConv2d, SparseLinear, SparseModule
from tests.engine.common import batch, mlp

Make = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)


def convnet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def images(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    "mlp": (mlp, batch),
    "convnet": (convnet, images),
}
METHODS: dict[str, dict[str, Any]] = {
    "static": {},
    "set": {"every": 10},
    "rigl": {"every": 10},
    "gradual": {"every": 15, "start": 20, "stop": 150, "allocation": "erk"},
    "magnitude": {"start": 40},
}


def train(
    net: str, storage: str, make: Make, method: str, steps: int, **options: Any
) -> tuple[Sparsifier, list[float], torch.optim.Optimizer]:
    model, data = NETS[net][0](), NETS[net][1]
    optimizer = make(model)
    sparse = rarefy.sparsify(
        model, method, optimizer=optimizer, storage=storage, total_steps=200, seed=3, **{"sparsity": 0.8} | options
    )
    dtype = next(model.parameters()).dtype
    batches = ((x.to(dtype), y) for x, y in map(data, range(steps)))
    return sparse, [step(sparse.model, optimizer, pair) for pair in batches], optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor]) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(data[0]), data[1])
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.fixture
def double() -> Iterator[None]:
    """Rounding then decides nothing: in float32 a near tie between two weights to drop may fall the other way."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same_run(masked: tuple[Any, ...], compressed: tuple[Any, ...]) -> None:
    a, b = masked[0], compressed[0]
    assert a.nnz == b.nnz and a.explored() == b.explored() and a.events == b.events
    for name, mask in a.masks().items():
        assert torch.equal(mask, b.layers[name].mask()), name
        torch.testing.assert_close(a.layers[name].weight(), b.layers[name].weight(), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(masked[1]), torch.tensor(compressed[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.usefixtures("double")
def test_the_run_is_the_masked_one(net: str, method: str, make: Make) -> None:
    runs = [train(net, storage, make, method, 200, **METHODS[method]) for storage in ("masked", "compressed")]
    assert_same_run(runs[0], runs[1])
    assert method in ("static", "magnitude") or len(runs[1][0].events) > 20


@pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("method", ["static", "set", "rigl"])
@pytest.mark.parametrize("net", NETS)
def test_the_native_run_is_the_masked_one(net: str, method: str, make: Make) -> None:
    def slower(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = make(model)
        optimizer.param_groups[0]["lr"] /= 4
        return optimizer

    runs = [train(net, storage, slower, method, 200, **METHODS[method]) for storage in ("masked", "compressed")]
    for name, mask in runs[0][0].masks().items():
        assert torch.equal(mask, runs[1][0].layers[name].mask()), name
    torch.testing.assert_close(torch.tensor(runs[0][1]), torch.tensor(runs[1][1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["static", "set", "rigl"])
def test_constant_fan_in_too(method: str) -> None:
    runs = [train("mlp", s, sgd, method, 60, pattern="fan-in", **METHODS[method]) for s in ("masked", "compressed")]
    assert_same_run(runs[0], runs[1])


def test_snip_too() -> None:
    runs = [train("mlp", s, sgd, "snip", 30, calibration=[batch(99)]) for s in ("masked", "compressed")]
    assert_same_run(runs[0], runs[1])


def test_blocks_of_rows_find_what_the_whole_gradient_does(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [train(net, "compressed", sgd, "rigl", 40, every=5)[0].masks() for net in NETS]
    monkeypatch.setattr("rarefy.engine.dense_gradient.BLOCK", 37)
    monkeypatch.setattr("rarefy.engine.compressed.BLOCK", 37)
    parts = [train(net, "compressed", sgd, "rigl", 40, every=5)[0].masks() for net in NETS]
    for a, b in zip(whole, parts, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    fan_in = [train("mlp", s, sgd, "set", 20, pattern="fan-in", every=5)[0].masks() for s in ("masked", "compressed")]
    assert all(torch.equal(fan_in[0][name], fan_in[1][name]) for name in fan_in[0])


@pytest.mark.parametrize("shape", [(40, 130), (3, 20_000)])
def test_the_largest_entries_are_found_block_by_block(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, cols = shape
    module = SparseLinear(cols, rows, sparsity=0.9)
    collected = DenseGradient()
    collected.watch(module)
    whole = torch.zeros(shape)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # small integers: exact sums with many ties
        x, dy = (torch.randint(-2, 3, (2, n), generator=generator).float() for n in (cols, rows))
        (module(x) * dy).sum().backward()
        collected.commit(module.values)
        whole += dy.T @ x
    besides = torch.randperm(rows * cols, generator=generator)[:500].sort().values
    scores = whole.abs().view(-1).index_fill(0, besides, -1)
    for block in (BLOCK, 7 * cols):
        monkeypatch.setattr("rarefy.engine.dense_gradient.BLOCK", block)
        for count in (0, 1, 300, 2500):
            expected = kernels.select_k(scores, count).nonzero().squeeze(1)
            assert torch.equal(collected.largest(module, count, besides), expected)


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


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
        lambda p: torch.optim.Rprop(p, lr=1e-3),
        lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True, foreach=True),
        lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
        lambda p: torch.optim.NAdam(p, lr=1e-3),
        lambda p: torch.optim.RAdam(p, lr=1e-3),
        lambda p: torch.optim.Adadelta(p),
        lambda p: torch.optim.Adamax(p),
        lambda p: torch.optim.ASGD(p),
        lambda p: torch.optim.SGD(p, lr=0.05, nesterov=True, momentum=0.9),
    ],
)
@pytest.mark.usefixtures("double")
def test_every_elementwise_optimizer(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    runs = [train("mlp", s, lambda m: make(m.parameters()), "rigl", 40, every=8) for s in ("masked", "compressed")]
    a, b = runs[0][0], runs[1][0]
    for name, layer in a.layers.items():
        assert torch.equal(layer.mask(), b.layers[name].mask())
        torch.testing.assert_close(layer.weight(), b.layers[name].weight(), rtol=0, atol=1e-6)


def test_state_that_was_gathered_before_goes_along() -> None:
    """The model was trained densely for a while: momentum follows its weights into the vector of kept ones."""
    results = []
    for storage in ("masked", "compressed"):
        model = mlp()
        optimizer = adamw(model)
        for i in range(5):
            step(model, optimizer, batch(i))
        sparse = rarefy.sparsify(model, "magnitude", sparsity=0.7, optimizer=optimizer, storage=storage)
        losses = [step(model, optimizer, batch(i)) for i in range(30)]
        results.append((sparse, losses))
    assert_same_run(results[0], results[1])


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


def test_accumulated_passes_decide_together_and_probing_leaves_no_trace() -> None:
    def run(storage: str) -> dict[str, Tensor]:
        model = mlp().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sparse = rarefy.sparsify(model, "rigl", sparsity=0.8, every=1, optimizer=optimizer, storage=storage)
        for i in range(6):
            for j in range(2):
                x, y = batch(2 * i + j)
                loss = F.cross_entropy(model(x), y)
                probe = F.cross_entropy(model(batch(100 + i)[0]), batch(100 + i)[1])
                torch.autograd.grad(probe * 100, list(model.parameters()))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=i % 2 == 0)
        return sparse.masks()

    masked, compressed = run("masked"), run("compressed")
    assert all(torch.equal(masked[name], compressed[name]) for name in masked)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def test_a_layer_that_is_used_twice_in_a_pass() -> None:
    results = []
    for storage in ("masked", "compressed"):
        model = Twice()
        optimizer = sgd(model)
        sparse = rarefy.sparsify(model, "rigl", sparsity=0.7, every=2, optimizer=optimizer, storage=storage)
        results.append((sparse, [step(model, optimizer, batch(i)) for i in range(12)]))
    assert_same_run(results[0], results[1])


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


def test_compiled_training_follows_eager() -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = mlp()
        optimizer = sgd(model)
        sparse = rarefy.sparsify(
            model, "rigl", sparsity=0.8, every=3, optimizer=optimizer, storage="compressed", total_steps=20
        )
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        results.append(([step(run, optimizer, batch(i)) for i in range(12)], sparse.masks()))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.tensor(results[0][0]), torch.tensor(results[1][0]), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


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


def test_flops_are_counted_from_what_is_kept() -> None:
    reports = [train("convnet", s, sgd, "set", 0)[0].summary(images(0)[0]) for s in ("masked", "compressed")]
    assert reports[0].rows == reports[1].rows and reports[0].flops == reports[1].flops


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
