"""Every reference network has its published size, shape and names, and can be traced, copied and narrowed."""

from __future__ import annotations

import copy
import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy import models
from rarefy.errors import ModelError
from rarefy.models.wide_resnet import WideResNet

NAMES = models.available()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return models.build(name, **options)


def inputs(name: str, batch: int = 2, side: int = 0) -> Tensor:
    known = models.options(name)
    if name == "gpt":
        return torch.randint(0, 256, (batch, 16))
    side = side or known["image_size"] or 32
    return torch.randn(batch, known["in_channels"], side, side)


def block(dim: int) -> int:
    """Parameters of a transformer block: 4 projections, 2 layers of 4x width, biases, 2 normalisations."""
    return 12 * dim**2 + 13 * dim


SIZES = [
    ("lenet-300-100", {}, 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10),  # = 266,610, the pruning papers
    ("lenet-300-100", {"image_size": 8}, 64 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10),
    ("lenet-5", {}, 431_080),
    ("convnet", {}, 9 * (16 + 16 * 32 + 32 * 64 + 64 * 64) + 2 * (16 + 32 + 64 + 64) + 64 * 10 + 10),
    ("resnet-9", {}, 6_573_130),
    ("resnet-8", {}, 269_722 - sum(2 * (2 * 9 * c**2 + 4 * c) for c in (16, 32, 64))),  # two blocks fewer in each stage
    ("resnet-20", {}, 269_722),
    ("resnet-20", {"shortcut": "conv"}, 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)),
    ("resnet-32", {}, 464_154),
    ("resnet-56", {}, 853_018),
    ("wrn-28-2", {}, 1_467_610),
    ("wrn-22-2", {}, 1_467_610 - sum(2 * 9 * c**2 + 4 * c for c in (32, 64, 128))),  # one block fewer in each stage
    ("vgg-19-bn", {}, 20_035_018),
    ("resnet-18", {}, 11_689_512),
    ("resnet-18", {"stem": "small", "num_classes": 10}, 11_173_962),  # the usual CIFAR variant
    ("resnet-50", {}, 25_557_032),
    ("mobilenet-v1", {}, 4_231_976),
    ("mobilenet-v2", {}, 3_504_872),
    ("efficientnet-b0", {}, 5_288_548),
    ("squeezenet", {}, 1_248_424),
    ("gpt", {}, (256 + 128) * 128 + 4 * block(128) + 2 * 128),
    ("gpt", {"tied": False}, (256 + 128 + 256) * 128 + 4 * block(128) + 2 * 128),
    ("gpt", {"num_classes": 50257, "context": 1024, "dim": 768, "depth": 12, "heads": 12}, 124_439_808),  # GPT-2
    ("vit", {}, (3 * 16 + 1) * 192 + (64 + 1 + 1) * 192 + 6 * block(192) + 2 * 192 + 192 * 10 + 10),
    (
        "vit",  # ViT-B/16
        {"num_classes": 1000, "image_size": 224, "patch": 16, "dim": 768, "depth": 12, "heads": 12},
        86_567_656,
    ),
]


@pytest.mark.parametrize(("name", "options", "size"), SIZES)
def test_published_parameter_counts(name: str, options: dict[str, Any], size: int) -> None:
    assert count(on_meta(name, **options)) == size


def test_every_model_has_its_size_tested() -> None:
    assert {name for name, _, _ in SIZES} == set(NAMES)


def test_wide_resnet_of_the_paper() -> None:
    with torch.device("meta"):
        assert count(WideResNet(28, 10)) == 36_479_194


@pytest.mark.parametrize(
    ("name", "entries", "some"),
    [
        ("resnet-18", 122, {"conv1.weight": (64, 3, 7, 7), "layer2.0.downsample.0.weight": (128, 64, 1, 1)}),
        ("resnet-50", 320, {"layer1.0.downsample.1.running_var": (256,), "layer4.2.conv3.weight": (2048, 512, 1, 1)}),
        ("mobilenet-v2", 314, {"features.1.conv.1.weight": (16, 32, 1, 1), "features.18.0.weight": (1280, 320, 1, 1)}),
        ("mobilenet-v2", 314, {"features.2.conv.1.0.weight": (96, 1, 3, 3), "classifier.1.weight": (1000, 1280)}),
    ],
)
def test_names_are_torchvisions(name: str, entries: int, some: dict[str, tuple[int, ...]]) -> None:
    state = on_meta(name).state_dict()
    assert len(state) == entries
    assert {key: tuple(state[key].shape) for key in some} == some


@pytest.mark.parametrize("name", NAMES)
def test_output_shapes(name: str) -> None:
    side = 224 if models.options(name)["num_classes"] == 1000 else 0
    shape = (3, 16, 256) if name == "gpt" else (3, models.options(name)["num_classes"])
    assert on_meta(name)(inputs(name, 3, side).to("meta")).shape == shape
    assert on_meta(name, num_classes=7)(inputs(name).to("meta")).shape[-1] == 7


@pytest.mark.parametrize(
    ("name", "channels", "side"),
    [
        ("lenet-300-100", 1, 8),
        ("lenet-300-100", 3, 32),
        ("lenet-5", 3, 32),
        ("lenet-5", 1, 16),
        ("resnet-20", 1, 28),
        ("resnet-20", 1, 8),
        ("wrn-22-2", 1, 28),
        ("vgg-19-bn", 1, 28),
        ("resnet-50", 3, 64),
        ("mobilenet-v2", 1, 32),
        ("vit", 1, 28),
        ("vit", 1, 8),
    ],
)
def test_other_images(name: str, channels: int, side: int) -> None:
    model = on_meta(name, in_channels=channels, image_size=side, num_classes=10)
    assert model(torch.empty(2, channels, side, side, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("name", NAMES)
def test_width_scales_hidden_units_only(name: str) -> None:
    full, half = on_meta(name).state_dict(), on_meta(name, width=0.5).state_dict()
    assert list(full) == list(half)
    matrices = [key for key, value in full.items() if value.dim() > 1]
    if name == "gpt":
        assert half["token.weight"].shape == (256, 64) and half["blocks.0.fc1.weight"].shape == (256, 64)
    else:
        first = next(key for key in matrices if key not in ("token", "position"))
        assert full[first].shape[1:] == half[first].shape[1:] and half[first].shape[0] == full[first].shape[0] // 2
        last = full[matrices[-1]].shape
        assert half[matrices[-1]].shape[:2] == (last[0], last[1] // 2)
    assert all(full[key].shape[2:] == half[key].shape[2:] for key in matrices if full[key].dim() == 4)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_never_fall_with_the_width(name: str) -> None:
    counts = [
        count(on_meta(name, width=width)) for width in (1e-6, 0.03, 0.05, 0.1, 0.17, 0.31, 0.5, 0.7, 0.99, 1.0, 1.5)
    ]
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.parametrize("name", NAMES)
def test_the_narrowest_net_runs(name: str) -> None:
    assert torch.isfinite(models.build(name, width=1e-6).eval()(inputs(name))).all()


@pytest.mark.parametrize("name", NAMES)
def test_exports_with_any_batch_size(name: str) -> None:
    torch.manual_seed(0)
    model, x = models.build(name, width=0.25).eval(), inputs(name)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for batch in (x, torch.cat([x, x[:1]])):
        torch.testing.assert_close(exported.module()(batch), model(batch))


@pytest.mark.parametrize("name", ["lenet-5", "resnet-20", "wrn-22-2", "mobilenet-v2", "gpt", "vit"])
def test_traced_by_torch_compile_as_one_graph(name: str) -> None:
    model, x = models.build(name, width=0.25).eval(), inputs(name)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_compiled_to_machine_code() -> None:
    torch.manual_seed(0)
    model, x = models.build("lenet-300-100", width=0.1), inputs("lenet-300-100")
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_a_model_can_be_copied_and_saved(tmp_path: Any) -> None:
    for name in NAMES:
        model = models.build(name, width=0.1)
        twin = copy.deepcopy(model)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_the_seed_is_the_callers() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(models.build("resnet-20", width=0.5).parameters())

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_convolutions_start_as_he_et_al() -> None:
    torch.manual_seed(0)
    model = models.build("vgg-19-bn")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.out_channels * 9)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)


def test_transformers_start_as_gpt2() -> None:
    torch.manual_seed(0)
    model = models.build("gpt")
    assert model.blocks[0].fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[3].fc2.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert model.blocks[0].attention.out.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)


def test_gpt_looks_back_only_and_shares_its_embedding() -> None:
    torch.manual_seed(0)
    model, x = models.build("gpt", dim=32, depth=2).eval(), inputs("gpt")
    changed = x.clone()
    changed[:, 9] = (x[:, 9] + 1) % 256
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert ((before[:, 9:] - after[:, 9:]).abs().amax(-1) > 0).all()
    assert model.head.weight is model.token.weight
    with pytest.raises(ModelError, match=r"129 tokens given.*context=128"):
        model(torch.zeros(1, 129, dtype=torch.long))


def test_vit_sees_every_patch() -> None:
    torch.manual_seed(0)
    model = models.build("vit", dim=24, depth=1, image_size=8)
    x = inputs("vit", 1, 8).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None and (x.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((-1, -2)) > 0).all()


def test_option_a_shortcut_pads_both_sides() -> None:
    model = models.build("resnet-20")
    x = torch.randn(1, 16, 5, 5)
    y = model.layer2[0].downsample(x)
    assert y.shape == (1, 32, 3, 3)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and y[:, :8].abs().sum() == y[:, 24:].abs().sum() == 0


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet20", {}, r"no model is called 'resnet20' \(did you mean 'resnet-20'\?\); known models: lenet-300-100"),
        ("resnet-20", {"shortcuts": "conv"}, r"no option 'shortcuts' \(did you mean 'shortcut'\?\)"),
        ("resnet-20", {"shortcut": "cnv"}, r"shortcut is 'cnv'; expected one of pad, conv \(did you mean 'conv'\?\)"),
        ("gpt", {"in_channels": 3}, "gpt has no option 'in_channels'"),
        ("gpt", {"image_size": 32}, "gpt has no option 'image_size'"),
        ("gpt", {"heads": 3}, "dim=128 does not divide into heads=3"),
        ("gpt", {"tied": "no"}, "tied is 'no'; expected True or False"),
        ("vit", {"image_size": 30}, "patch=4 does not divide image_size=30"),
        ("lenet-5", {"image_size": 8}, "at least 16x16, not 8x8"),
        ("vgg-19-bn", {"image_size": 8}, "vgg-19-bn needs images of at least 16x16, not 8x8"),
        ("resnet-20", {"image_size": -1}, "image_size is -1"),
        ("resnet-20", {"num_classes": 0}, "num_classes is 0; expected a whole number of at least 1"),
        ("resnet-20", {"num_classes": True}, "num_classes is True"),
        ("resnet-20", {"in_channels": 1.5}, "in_channels is 1.5"),
        ("mobilenet-v2", {"dropout": 1.0}, r"dropout is 1.0; expected a number in \[0, 1\)"),
        *(("lenet-5", {"width": width}, "width is") for width in (0, -1.0, float("nan"), float("inf"), "1", True)),
    ],
)
def test_errors_say_what_is_known(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        models.build(name, **options)


def test_depths_that_no_family_has() -> None:
    from rarefy.models.resnet import cifar_resnet, imagenet_resnet

    for make, says in (
        (lambda: cifar_resnet(21), "6n \\+ 2 layers"),
        (lambda: imagenet_resnet(20), "expected 18 or 50"),
        (lambda: WideResNet(20, 2), "6n \\+ 4 layers"),
    ):
        with pytest.raises(ModelError, match=says):
            make()


def test_one_step_of_training_helps() -> None:
    for name in ("lenet-5", "resnet-20", "gpt", "vit"):
        torch.manual_seed(0)
        model, x = models.build(name, width=0.25), inputs(name, 8)
        target = torch.randint(0, 10, x.shape if name == "gpt" else (8,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = []
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(x).flatten(0, -2), target.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            assert all(p.grad is not None for p in model.parameters()), name
        assert losses[-1] < losses[0], name


def test_families_do_not_import_each_other() -> None:
    """One file a family: what two of them need lies in _parts."""
    families = ("lenet", "mobilenet", "resnet", "transformer", "vgg", "wide_resnet")
    for one, other in itertools.permutations(families, 2):
        source = importlib.import_module(f"rarefy.models.{one}").__file__
        assert source is not None
        with open(source) as file:
            assert f"rarefy.models.{other}" not in file.read()
