"""Groups are right when any reordering of their units leaves the outputs as they are, and nothing is held needlessly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rarefy import models
from rarefy.coupling import Coupling, Group, couple
from rarefy.errors import ModelError


def reorder(model: nn.Module, group: Group, order: Tensor) -> None:
    """Move unit order[i] to place i, written out one unit at a time."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for member in group.members:
            whole = tensors[member.name].data
            part = whole if member.rows is None else whole[slice(*member.rows)]
            before = part.clone()
            for new, old in enumerate(order.tolist()):
                for a, b in zip(member.index[new].tolist(), member.index[old].tolist(), strict=True):
                    part.select(member.dim, a).copy_(before.select(member.dim, b))


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic its own values, so that no wrong move goes unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point():
                noise = torch.randn(t.shape, generator=generator).to(t.dtype)
                t.copy_(
                    noise.abs() + 0.5 if "running_var" in name else noise / max(1, t[0].numel() if t.ndim else 1) ** 0.5
                )
    return model


def check(model: nn.Module, example: Any) -> Coupling:
    """Reorder every group at random, and compare outputs in float64."""
    model = randomise(model).double().eval()
    example = example.double() if isinstance(example, Tensor) and example.is_floating_point() else example
    coupling = couple(model, example)
    with torch.no_grad():
        before = model(example)
        for i, group in enumerate(coupling.groups):
            reorder(model, group, torch.randperm(group.units, generator=torch.Generator().manual_seed(i)))
        after = model(example)
    assert float(before.abs().max()) > 0
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9 * float(before.abs().max()))
    return coupling


def units(coupling: Coupling, name: str, dim: int) -> list[int]:
    return [group.units for group, _ in coupling.of(name, dim)]


@pytest.mark.parametrize(
    ("name", "size", "options", "groups"),
    [
        ("lenet-5", 28, {"in_channels": 1}, 3),
        ("resnet-20", 16, {}, 12),
        ("resnet-20", 16, {"shortcut": "conv"}, 12),
        ("resnet-50", 32, {"width": 0.25}, 37),
        ("wrn-22-2", 16, {}, 13),
        ("mobilenet-v1", 32, {"width": 0.25}, 14),
        ("mobilenet-v2", 32, {"width": 0.5}, 25),
        ("efficientnet-b0", 32, {"width": 0.5}, 40),
        ("vgg-19-bn", 32, {"width": 0.25}, 16),
        ("squeezenet", 64, {"width": 0.5}, 25),
        ("vit", 32, {"dim": 24, "depth": 2, "heads": 3}, 1 + 2 * (3 + 3 + 1)),
    ],
)
def test_reference_networks(name: str, size: int, options: dict[str, Any], groups: int) -> None:
    torch.manual_seed(0)
    model = models.build(name, num_classes=7, **options)
    channels = options.get("in_channels", 3)
    coupling = check(model, torch.randn(2, channels, size, size))
    assert len(coupling.groups) == groups
    # every weight but the first's inputs and the last's outputs moves whole
    fixed = {(p.name, p.dim) for p in coupling.pinned if dict(model.named_parameters())[p.name].ndim > 1 and p.dim < 2}
    position = {("position", 1)} if name == "vit" else set()
    weights = [n for n, p in model.named_parameters() if p.ndim > 1 and n not in ("token", "position")]
    assert fixed == {(weights[0], 1), (weights[-1], 0)} | position


def test_gpt_with_its_tied_head() -> None:
    torch.manual_seed(0)
    model = models.build("gpt", num_classes=11)
    coupling = check(model, torch.randint(0, 11, (2, 9)))
    (stream,) = [g for g in coupling.groups if g.units == 128 and g.members[0].name == "token.weight"]
    assert sum(m.name.endswith("q.weight") for m in stream.members) == 4


class Lambda(nn.Module):
    """A network of some named layers and a function of them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(a: int, b: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5))


def test_flatten_moves_blocks_of_columns() -> None:
    net = Lambda(
        lambda m, x: m.c(m.b(m.a(x).relu().flatten(1)).relu()), a=conv(3, 4), b=nn.Linear(144, 5), c=nn.Linear(5, 2)
    )
    coupling = check(net, IMAGE)
    ((group, member),) = coupling.of("b.weight", 1)
    assert (group.units, member.block, member.offset) == (4, 36, 0)
    assert member.index[2].tolist() == list(range(72, 108))


def test_flatten_of_channels_last() -> None:
    net = Lambda(lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 4), b=nn.Linear(144, 5))
    ((_, member),) = check(net, IMAGE).of("b.weight", 1)
    assert member.index[1].tolist() == list(range(1, 144, 4)) and member.offset is None


def test_concatenation_and_slices() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        one, two = y[:, :2], y[:, 2:]
        return m.d(torch.cat([m.b(one), two, m.c(y)], 1))

    coupling = check(Lambda(run, a=conv(3, 6), b=conv(2, 3), c=conv(6, 5), d=conv(12, 2)), IMAGE)
    assert units(coupling, "a.weight", 0) == [2, 4]
    assert units(coupling, "d.weight", 1) == [4, 3, 5]
    assert [m.index[:, 0].tolist() for _, m in coupling.of("d.weight", 1)] == [
        [3, 4, 5, 6],
        [0, 1, 2],
        [7, 8, 9, 10, 11],
    ]


def test_dense_block_reuses_every_slice() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        x = torch.cat([x, m.b(m.n1(x).relu())], 1)
        return m.d(torch.cat([x, m.c(m.n2(x).relu())], 1))

    layers = dict(a=conv(3, 4), b=conv(4, 3), c=conv(7, 3), d=conv(10, 2), n1=nn.BatchNorm2d(4), n2=nn.BatchNorm2d(7))
    coupling = check(Lambda(run, **layers), IMAGE)
    assert [g.units for g in coupling.groups] == [4, 3, 3]
    assert units(coupling, "n2.running_var", 0) == [4, 3]


def test_grouped_convolutions_move_inside_their_groups() -> None:
    net = Lambda(lambda m, x: m.c(m.b(m.a(x)).relu()), a=conv(3, 8), b=conv(8, 6, groups=2), c=conv(6, 2))
    coupling = check(net, IMAGE)
    assert units(coupling, "a.weight", 0) == [4, 4] and units(coupling, "b.weight", 0) == [3, 3]
    assert [m.rows for _, m in coupling.of("b.weight", 1)] == [(0, 3), (3, 6)]


def test_depthwise_with_two_filters_a_channel() -> None:
    net = Lambda(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 4), b=conv(4, 8, groups=4), c=conv(8, 2))
    coupling = check(net, IMAGE)
    ((group, member),) = coupling.of("b.weight", 0)
    assert group.units == 4 and member.block == 2


def test_squeeze_and_excitation() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        gate = torch.sigmoid(m.up(m.down(y.mean((2, 3), keepdim=True)).relu()))
        return m.b(y * gate)

    coupling = check(Lambda(run, a=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), b=conv(8, 2)), IMAGE)
    assert [g.units for g in coupling.groups] == [8, 4]
    assert {m.name for m in coupling.groups[0].members} == {
        "a.weight", "a.bias", "down.weight", "up.weight", "up.bias", "b.weight"
    }  # fmt: skip


def test_gate_over_pixels_holds_nothing() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        gate = torch.sigmoid(m.g(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)))
        return m.b(y * gate)

    coupling = check(Lambda(run, a=conv(3, 8), g=conv(2, 1), b=conv(8, 2)), IMAGE)
    assert [g.units for g in coupling.groups] == [8]


def test_a_channel_that_scales_all_others_stays() -> None:
    net = Lambda(lambda m, x: m.b(m.a(x) * m.a(x)[:, 2:3]), a=conv(3, 8), b=conv(8, 2))
    coupling = check(net, IMAGE)
    assert units(coupling, "a.weight", 0) == [7]


def test_the_image_added_to_channels_fixes_them() -> None:
    net = Lambda(lambda m, x: m.b(m.a(x) + x), a=conv(3, 3), b=conv(3, 2))
    coupling = check(net, IMAGE)
    assert not coupling.groups
    assert "add" in next(p.reason for p in coupling.pinned if p.name == "a.weight" and p.dim == 0)


def test_channel_shuffle_is_followed() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x))
        n, c, h, w = y.shape
        return m.d(m.c(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)))

    coupling = check(Lambda(run, a=conv(3, 8, 1), b=conv(8, 8, groups=2), c=conv(8, 8, groups=2), d=conv(8, 2)), IMAGE)
    assert [g.units for g in coupling.groups if g.name == "b.weight"] == [2, 2, 2, 2]


def test_a_sum_with_its_own_shuffle_is_not_taken_apart() -> None:
    """Of 8 channels shuffled in two, two cycles of three look alike, and no order of their channels is the right one."""
    shuffle = nn.ChannelShuffle(2)
    net = Lambda(lambda m, x: m.b(m.a(x) + shuffle(m.a(x))), a=conv(3, 8), b=conv(8, 2))
    coupling = check(net, IMAGE)
    assert units(coupling, "a.weight", 0) == [2]  # the two that the shuffle leaves in place
    assert any("told apart" in p.reason for p in coupling.pinned)


def test_channels_taken_by_a_crossing_index() -> None:
    """Two pairs of channels whose order is swapped: the depthwise filters tell which belongs to which."""
    index = torch.tensor([0, 3, 2, 1])
    net = Lambda(
        lambda m, x: m.b(m.d(m.a(x)[:, index]) + m.a(x)[:, [1, 2, 3, 0]]),
        a=conv(3, 4),
        d=conv(4, 4, groups=4),
        b=conv(4, 2),
    )
    check(net, IMAGE)


def test_pixel_shuffle_moves_blocks() -> None:
    net = Lambda(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 12), b=conv(3, 2))
    ((group, member),) = check(net, IMAGE).of("a.weight", 0)
    assert group.units == 3 and member.block == 4


def test_shared_and_tied_weights() -> None:
    net = Lambda(lambda m, x: m.c(m.b(m.b(m.a(x)).relu())), a=conv(3, 6), b=conv(6, 6), c=conv(6, 2))
    coupling = check(net, IMAGE)
    (group,) = coupling.groups
    assert [(m.name, m.dim) for m in group.members if m.name == "b.weight"] == [("b.weight", 0), ("b.weight", 1)]


def test_two_inputs_and_keyword_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.c(torch.tanh(self.a(x) + self.b(y)))

    example = {"x": torch.randn(3, 4), "y": torch.randn(3, 5)}
    (group,) = couple(Two(), example).groups
    assert {m.name for m in group.members} == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight"}
    assert len(couple(Two(), tuple(example.values())).groups) == 1


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 8), nn.GroupNorm(1, 8), nn.GroupNorm(8, 8), nn.InstanceNorm2d(8, affine=True), nn.PReLU(8)]
)
def test_norms(norm: nn.Module) -> None:
    coupling = check(Lambda(lambda m, x: m.b(m.n(m.a(x))), a=conv(3, 8), n=norm, b=conv(8, 2)), IMAGE)
    assert units(coupling, "b.weight", 1) == ([4, 4] if getattr(norm, "num_groups", 1) == 2 else [8])


def test_scales_and_offsets_that_are_parameters() -> None:
    scale, offset = nn.Parameter(torch.randn(6, 1, 1)), nn.Parameter(torch.randn(1, 6, 1, 1))
    net = Lambda(lambda m, x: m.b(m.a(x) * m.s.exp() + m.o), a=conv(3, 6), s=scale, o=offset, b=conv(6, 2))
    (group,) = check(net, IMAGE).groups
    assert {(m.name, m.dim) for m in group.members} >= {("s", 0), ("o", 1)}


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_convolution(groups: int) -> None:
    up = nn.ConvTranspose2d(4, 4, 2, 2, groups=groups)
    check(Lambda(lambda m, x: m.b(m.u(m.a(x))), a=conv(3, 4), u=up, b=conv(4, 2)), IMAGE)


def test_attention_moves_inside_heads() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    net = nn.Sequential(nn.Linear(5, 12), layer, nn.Linear(12, 2))
    coupling = check(net, torch.randn(2, 7, 5))
    assert sorted(g.units for g in coupling.groups) == [4, 4, 4, 4, 4, 4, 12, 20]


def test_mixer_moves_channels_and_not_places() -> None:
    """A linear layer over tokens: channels pass through it, and its own dimensions stay."""
    net = Lambda(
        lambda m, x: m.c(m.t(m.a(x).transpose(1, 2)).transpose(1, 2)),
        a=nn.Linear(5, 6),
        t=nn.Linear(7, 7),
        c=nn.Linear(6, 2),
    )
    coupling = check(net, torch.randn(2, 7, 5))
    assert [g.units for g in coupling.groups] == [6] and not coupling.of("t.weight", 0)


def test_what_is_not_understood_is_fixed_and_named() -> None:
    net = Lambda(lambda m, x: m.c(torch.cumsum(m.b(m.a(x)), 1)), a=conv(3, 4), b=conv(4, 6), c=conv(6, 2))
    coupling = check(net, IMAGE)
    assert [g.name for g in coupling.groups] == ["a.weight"]
    reasons = {(p.name, p.dim): p.reason for p in coupling.pinned}
    assert "cumsum" in reasons["b.weight", 0] and "do not move" in reasons["c.weight", 1]


def test_numbers_that_are_read_out_fix_their_channels() -> None:
    net = Lambda(lambda m, x: m.b(m.a(x)) * m.a(x)[0, 1].sum().item(), a=conv(3, 4), b=conv(4, 2))
    assert units(check(net, IMAGE), "a.weight", 0) == [3]


def test_writing_into_a_value_fixes_it() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, 1] = 0
        return m.b(y)

    assert not check(Lambda(run, a=conv(3, 4), b=conv(4, 2)), IMAGE).groups


def test_in_place_operations_on_a_part_fix_it() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, 1].mul_(2)
        return m.b(F.relu(y, inplace=True))

    assert units(check(Lambda(run, a=conv(3, 4), b=conv(4, 2)), IMAGE), "a.weight", 0) == [3]


def test_computed_weights_are_fixed() -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    net = nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 2))
    parametrize.register_parametrization(net[1], "weight", Double())
    coupling = check(net, IMAGE)
    assert not coupling.groups
    assert any("computed" in p.reason for p in coupling.pinned)


def test_weights_that_are_cast_to_what_they_are() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = F.conv2d(x, m.a.weight.to(x.dtype), m.a.bias.type_as(x))
        return F.conv2d(y, m.b.weight.contiguous())

    assert units(check(Lambda(run, a=conv(3, 4), b=conv(4, 2)), IMAGE), "b.weight", 1) == [4]


def test_python_control_flow_is_no_obstacle() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        if float(x.sum()) != 123.0:
            y = m.b(y)
        return m.c(y)

    assert len(check(Lambda(run, a=conv(3, 4), b=conv(4, 4), c=conv(4, 2)), IMAGE).groups) == 2


def test_the_model_is_left_as_it_was() -> None:
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Dropout(0.5), conv(4, 2)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    couple(net, IMAGE)
    assert net.training and all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_errors() -> None:
    net = nn.Sequential(conv(3, 4), conv(4, 2))
    with pytest.raises(ModelError, match="does not run on the example"):
        couple(net, torch.zeros(1, 5, 6, 6))
    with pytest.raises(ModelError, match="TorchScript"):
        couple(torch.jit.script(net), IMAGE)

    class Hidden:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    with pytest.raises(ModelError, match="returns a Hidden"):
        couple(Lambda(lambda m, x: Hidden(m.a(x)), a=conv(3, 4)), IMAGE)  # type: ignore[arg-type, return-value]
