"""accelerate(): the same outputs on every kind of network, a plan that tells, and clear refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rarefy
from rarefy import models
from rarefy.deploy import AcceleratedModel, LayerPlan
from rarefy.deploy.measure import Memory, fingerprint, race
from rarefy.errors import ModelError, OptionError
from rarefy.patterns import NM


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "cache"))


def thin(model: nn.Module, sparsity: float = 0.9, seed: int = 0) -> nn.Module:
    """Zero random weights, and give batch norms statistics that matter."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            keep = torch.rand(module.weight.shape, generator=g) >= sparsity
            module.weight.data.mul_(keep).mul_((1 / (1 - sparsity)) ** 0.5)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=g)
            module.running_var.uniform_(0.5, 1.5, generator=g)
    return model.eval()


def native(fast: AcceleratedModel, *args: Tensor):
    """Run the native network, whatever was chosen."""
    from rarefy.deploy.compile import compile_graph

    assert fast._graph is not None
    compiled = compile_graph(fast._graph, args, Memory(""))
    return compiled, compiled(*args)


def same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


class Odd(nn.Module):
    """Every operation that the native programs know, and some that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 5, padding=2, groups=12)
        self.grouped = nn.Conv2d(12, 24, 3, padding=2, dilation=2, groups=3)
        self.lone_norm = nn.BatchNorm2d(24)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.pool, self.mean_pool = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, ceil_mode=True)
        self.wide = nn.Conv2d(48, 40, (1, 3), padding=(0, 1))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = F.relu6(self.norm(self.stem(x)))
        x = x + F.hardswish(self.depthwise(x))
        y = self.grouped(x)
        z = F.silu(self.lone_norm(F.relu(y)))
        z = z * torch.sigmoid(self.excite(F.relu(self.squeeze(z.mean((2, 3), keepdim=True)))))
        z = torch.cat([self.pool(z), self.pool(y)], 1)
        z = torch.roll(z, 1, dims=2)  # no native kernel: leaves the program and comes back
        z = self.mean_pool(self.wide(z))
        features = F.adaptive_avg_pool2d(z, 1).flatten(1)
        return self.head(self.drop(features)), {"features": features, "y": y}


class Branching(nn.Module):
    """Python that no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 30), nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(x) if float(x.sum()) > 0 else self.b(-x)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_operation(batch):
    torch.manual_seed(0)
    model = thin(Odd(), 0.7)
    x = torch.randn(batch, 3, 37, 29)
    fast = rarefy.accelerate(model, x)
    compiled, (out, more) = native(fast, x)
    expected, expected_more = model(x)
    same(out, expected)
    for key in more:
        same(more[key], expected_more[key])
    assert len(compiled.programs) == 2
    assert [layer.name for layer in fast.plan.layers] == [
        "stem", "depthwise", "grouped", "squeeze", "excite", "wide", "head",
    ]  # fmt: skip
    same(fast(x)[0], expected)


@pytest.mark.parametrize("name", ["resnet-20", "mobilenet-v2", "vgg-19-bn", "lenet-5", "lenet-300-100", "wrn-22-2"])
def test_networks(name):
    torch.manual_seed(0)
    gray = name.startswith("lenet")
    model = thin(models.build(name, in_channels=1 if gray else 3))
    x = torch.randn(2, 1, 28, 28) if gray else torch.randn(2, 3, 32, 32)
    fast = rarefy.accelerate(model, x)
    _, out = native(fast, x)
    same(out, model(x))
    same(fast(x), model(x))
    larger = torch.randn(5, *x.shape[1:])
    same(fast(larger), model(larger))  # another batch size


def test_vision_transformer_keeps_what_has_no_native_kernel():
    torch.manual_seed(0)
    model = thin(models.build("vit", image_size=32))
    x = torch.randn(2, 3, 32, 32)
    same(rarefy.accelerate(model, x)(x), model(x))


def test_what_cannot_be_traced_is_replaced_layer_by_layer():
    torch.manual_seed(0)
    model = thin(Branching(), 0.5)
    x = torch.randn(4, 20)
    fast = rarefy.accelerate(model, x)
    assert "not traced" in fast.plan.notes[0]
    assert [layer.name for layer in fast.plan.layers] == ["a", "b"]
    same(fast(x), model(x))
    same(fast(torch.ones(7, 20)), model(torch.ones(7, 20)))


def test_the_model_stays_as_it_was():
    model = thin(models.build("lenet-5", in_channels=1)).train()
    before = copy.deepcopy(model.state_dict())
    rarefy.accelerate(model, torch.randn(1, 1, 28, 28))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_copies_and_pickles():
    model = thin(models.build("lenet-5", in_channels=1))
    x = torch.randn(1, 1, 28, 28)
    fast = rarefy.accelerate(model, x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        same(other(x), model(x))


def test_plan_tells():
    model = thin(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 1)), 0.95)
    fast = rarefy.accelerate(model, torch.randn(1, 64, 14, 14))
    plan = fast.plan
    text = str(plan)
    assert "whole network" in text and all(layer.name in text for layer in plan.layers)
    assert plan.seconds == plan.times[plan.choice] == min(plan.times.values())
    assert plan.as_dict()["layers"][0]["sparsity"] == pytest.approx(0.95, abs=0.01)
    assert isinstance(plan.layers[0], LayerPlan) and plan.layers[0].dense_seconds > 0


def test_refusals():
    model = nn.Linear(4, 3)
    for wrong in (
        lambda: rarefy.accelerate(model, torch.randn(2, 4), objective="size"),
        lambda: rarefy.accelerate(model, torch.randn(2, 4), dtype=torch.float16),
        lambda: rarefy.accelerate(model, torch.randn(2, 4).double()),
        lambda: rarefy.accelerate(model, [1, 2]),
        lambda: rarefy.accelerate(model, torch.randn(2, 5)),
    ):
        with pytest.raises((OptionError, ModelError)):
            wrong()
    fast = rarefy.accelerate(model, torch.randn(2, 4))
    for wrong in (
        lambda: fast.train(),
        lambda: fast(torch.randn(2, 4, requires_grad=True)),
        lambda: fast(torch.randn(2, 4).double()),
        lambda: fast(torch.randn(2, 4), torch.randn(2, 4)),
    ):
        with pytest.raises(ModelError):
            wrong()


def test_a_network_that_would_differ_is_not_used(monkeypatch):
    from rarefy.deploy import accelerated as module

    monkeypatch.setattr(module, "_difference", lambda found, expected: 0.5)
    fast = rarefy.accelerate(nn.Linear(4, 3), torch.randn(2, 4))
    assert fast.plan.choice != "rarefy" and "differs" in fast.plan.notes[0]


def test_measurements_are_remembered(tmp_path):
    memory = Memory(str(tmp_path))
    key = fingerprint("conv", torch.ones(2, 2))
    assert key != fingerprint("conv", torch.eye(2))
    memory.put(key, {"native": 0.5})
    memory.save()
    assert Memory(str(tmp_path)).get(key) == {"native": 0.5}
    (tmp_path / "measured.json").write_text('{"format": 1, "times": {"k": {"native": "soon"}, "l": {"a": 1.5}}}')
    damaged = Memory(str(tmp_path))
    assert damaged.get("k") is None and damaged.get("l") == {"a": 1.5}
    (tmp_path / "measured.json").write_text("{")
    assert Memory(str(tmp_path)).get(key) is None


def test_race_takes_turns():
    order: list[str] = []
    times = race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.001)
    assert times.keys() == {"a", "b"} and order[2:6] == ["a", "b", "a", "b"]


@pytest.mark.parametrize("residual", [False, True])
def test_bfloat16_products_compete_where_they_are_allowed(residual: bool) -> None:
    from rarefy.deploy.graph import trace
    from rarefy.deploy.lower import in_torch, native_layers

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pointwise, self.head = nn.Conv2d(32, 32, 1), nn.Linear(32, 40)

        def forward(self, x: Tensor) -> Tensor:
            y = self.pointwise(x)
            return self.head(F.relu(y + x if residual else y).mean((2, 3)))

    torch.manual_seed(0)
    model, x = thin(Net(), 0.8), torch.randn(3, 32, 7, 5)
    ways = {}
    values = {"x": x}
    for step in trace(model).steps:
        inputs = [values[name] for name in step.inputs]
        out = values[step.name] = in_torch(step)(*inputs)
        assert [*native_layers(step, inputs, out, 1)] in (["native"], [])
        layers = native_layers(step, inputs, out, 2, torch.bfloat16)
        if step.kind in ("conv", "linear"):
            ways[step.kind] = [*layers]
            for name, tolerance in (("native", 1e-5), ("native bfloat16", 3e-2)):
                found = torch.empty_like(out)
                layers[name].run([t.numpy() for t in inputs], found.numpy(), 3, 1)
                gap = float((found - out).abs().max() / out.abs().max())
                assert gap <= tolerance and (name == "native" or gap > 1e-5)  # really rounded
    assert ways == {"conv": ["native", "native bfloat16"], "linear": ["native", "native bfloat16"]}
    fast = rarefy.accelerate(model, x, dtype=torch.bfloat16)
    assert float((fast(x) - model(x)).abs().max()) <= 3e-2 * float(model(x).abs().max())


def test_n_m_layers_have_a_kernel_of_their_own_to_choose() -> None:
    from rarefy.deploy.graph import trace
    from rarefy.deploy.lower import in_torch, native_layers

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    masks = {name: NM(2, 8).project(model[int(name)].weight.detach().abs(), 2) for name in ("0", "2")}
    rarefy.nn.n_m_(model, {"0": masks["0"]}, 2, 8, transposable=False)
    with torch.no_grad():
        model[2].weight.mul_(torch.rand(32, 48) < 0.25)  # as sparse, but not N:M
    x = torch.randn(3, 5, 64)
    fast = rarefy.accelerate(model, x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert type(model[0]) is rarefy.nn.NMLinear and type(fast.model[0]) is nn.Linear
    values, ways = x, []
    for step in trace(fast.model).steps:
        out = in_torch(step)(values)
        layers = native_layers(step, [values], out, 1)
        if step.kind == "linear":
            ways.append([*layers])
        for layer in layers.values():
            found = torch.full_like(out, torch.nan)
            layer.run([values.numpy()], found.numpy(), 3, 1)
            torch.testing.assert_close(found, out, rtol=1e-4, atol=1e-5)
        values = out
    assert ways == [["native", "native n:m"], ["native"]]


@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_transformers_run_their_linear_layers_natively(name: str) -> None:
    """Also those over tokens, also in a model that cannot be traced, and also behind whole numbers."""
    torch.manual_seed(0)
    model = thin(
        models.build(name, dim=64, depth=2, heads=2, tied=False) if name == "gpt" else models.build(name, depth=2)
    )
    x = torch.randint(0, 256, (2, 16)) if name == "gpt" else torch.randn(2, 3, 32, 32)
    fast = rarefy.accelerate(model, x)
    same(fast(x), model(x))
    linear = [layer for layer in fast.plan.layers if layer.kind == "linear"]
    assert len(linear) == 13
    assert all("no native kernel" not in layer.why for layer in linear)
    shorter = x[:1, :7] if name == "gpt" else x[:1]
    same(fast(shorter), model(shorter))
    again = pickle.loads(pickle.dumps(fast))
    same(again(x), model(x))
    with pytest.raises(ModelError, match="takes torch"):
        fast(x.double())


def test_what_was_trained_compressed_is_traced_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from rarefy.deploy import accelerated

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, "static", sparsity=0.9, optimizer=optimizer, storage="compressed")
    sparse.finalize(compressed=True)
    x = torch.randn(2, 4, 8, 8)
    expected, before = model(x).detach(), {k: v.clone() for k, v in model.state_dict().items()}
    fast = rarefy.accelerate(model, x)
    same(fast(x), expected)
    assert [(layer.name, layer.kind) for layer in fast.plan.layers] == [("0", "conv"), ("3", "linear")]
    assert all(0.8 < layer.sparsity < 1 for layer in fast.plan.layers) and not fast.plan.notes
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())
    monkeypatch.setattr(accelerated, "LARGEST", 16 * 36 * 12 - 1)  # as if the linear layer were too large
    fast = rarefy.accelerate(model, x)
    same(fast(x), expected)
    assert any(note.startswith("3: 12 x 576 is too large") for note in fast.plan.notes)
