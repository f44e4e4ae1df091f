"""The simulator on networks: its bounds, what it counts, what it keeps dense and why, and what must never get slower."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy import models
from rarefy.errors import OptionError
from rarefy.systems.sat import Accelerator, compare, simulate
from rarefy.systems.sat.report import rows, to_dict
from rarefy.systems.sat.timing import ceil_div

FAST = Accelerator(bandwidth=1e6, elementwise=False)  # the array alone is the limit


def on_meta(name: str, batch: int = 16, side: int = 32, **options: Any) -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        return models.build(name, **options), torch.empty(batch, 3, side, side)


def mlp(*widths: int) -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def samples(batch: int, width: int) -> Tensor:
    return torch.empty(batch, width, device="meta")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from((16, 24, 32, 64, 80, 10)), min_size=3, max_size=6), st.integers(1, 200),
    st.sampled_from(("1:2", "2:4", "2:8", "1:4", "1:8", "2:16")),
)  # fmt: skip
def test_bounds_of_whole_networks(widths: list[int], batch: int, pattern: str) -> None:
    found = compare(mlp(*widths), samples(batch, widths[0]), pattern, FAST)
    n, m = map(int, pattern.split(":"))
    assert 1 <= found.bound <= 3 / (1 + 2 * n / m) + 1e-9
    for step, dense in zip(found.sparse.instructions, found.dense.instructions, strict=True):
        assert (step.layer, step.stage) == (dense.layer, dense.stage)
        if step.pattern == "1:1":
            assert step.cycles == dense.cycles
        else:
            assert step.cycles <= dense.cycles and dense.cycles * n <= step.cycles * m
    assert found.sparse.cycles <= found.forward_only.cycles <= found.dense.cycles
    assert found.sparse.cycles <= found.no_pregeneration.cycles and found.sparse.cycles <= found.no_interleaving.cycles
    for run in (found.sparse, found.dense, found.forward_only, found.no_pregeneration, found.no_interleaving):
        assert all(0 <= step.macs <= step.cycles * 1024 for step in run.instructions)
        assert 0 < run.utilisation <= 1 and run.gflops <= run.array.peak_gflops


@pytest.mark.parametrize("name", ["resnet-20", "resnet-9", "vgg-19-bn", "vit", "mobilenet-v2"])
def test_bounds_with_memory_and_passes(name: str) -> None:
    model, x = on_meta(name)
    for n, m in ((2, 4), (2, 8), (1, 8)) if name == "resnet-9" else ((2, 8),):
        found = compare(model, x, f"{n}:{m}")
        assert 1 <= found.speedup <= found.product_speedup <= found.bound <= 3 / (1 + 2 * n / m)
        assert found.sparse.utilisation <= 1


def test_sparsifiable_layers_keep_exactly_their_share_of_multiply_adds() -> None:
    model, x = on_meta("resnet-9")
    for n, m in ((2, 4), (2, 8), (1, 8), (2, 16)):
        for layer in simulate(model, x, f"{n}:{m}").layers:
            kept, whole = (sum(getattr(g, what) for g in layer.gemms) for what in ("macs", "dense_macs"))
            if layer.dense_because:
                assert kept == whole
            else:
                assert kept * 3 * m == whole * (m + 2 * n)  # (1 + 2 rho) / 3


@pytest.mark.parametrize("pattern", ["4:4", "8:8", "1:1"])
def test_all_kept_is_dense_training(pattern: str) -> None:
    model, x = on_meta("resnet-20")
    found = compare(model, x, pattern)
    assert found.sparse.instructions == found.dense.instructions == found.forward_only.instructions
    assert found.sparse.cycles == found.no_pregeneration.cycles and found.speedup == 1


def test_more_of_anything_is_never_slower() -> None:
    model, x = on_meta("resnet-9", 8)
    base = Accelerator(rows=16, columns=16, bandwidth=6.4)

    def seconds(pattern: str = "2:8", **fields: Any) -> float:
        return simulate(model, x, pattern, base.changed(**fields)).seconds

    kept = [seconds(f"{n}:8") for n in (1, 2, 3, 4, 6)]
    assert kept == sorted(kept) and kept[0] < kept[-1] < seconds("8:8")
    for field, values in (
        ("mhz", (50.0, 100.0, 200.0, 500.0)),
        ("bandwidth", (0.8, 3.2, 6.4, 25.6, 100.0)),
        ("interleave", (1, 2, 3, 4, 8)),
        ("row_buffer", (16, 64, 1024)),
        ("column_buffer", (16, 64, 1024)),
        ("output_buffer", (16, 64, 1024)),
        ("lanes", (8, 32, 64)),
    ):
        times = [seconds(**{field: value}) for value in values]
        assert times == sorted(times, reverse=True), field
        assert times[0] > times[-1] or field.endswith("buffer"), field
    arrays = [seconds(rows=side, columns=side) for side in (4, 8, 16, 32)]
    assert arrays == sorted(arrays, reverse=True) and arrays[0] > arrays[-1]


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_zeros_between_the_pixels_of_a_stride_are_not_multiplied(stride: int) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, stride, 1), nn.Conv2d(32, 16, 3, 1, 1))
        run = simulate(model, torch.empty(4, 3, 12, 12), "2:8")
    ff, bp, wu = run.layers[1].gemms
    assert ff.dense_macs == bp.dense_macs == wu.dense_macs == 4 * (12 // stride) ** 2 * 16 * 32 * 9
    assert (bp.rows, bp.reduction, bp.columns) == (ff.rows, 32 * 9, 16)
    assert (wu.rows, wu.reduction, wu.columns) == (16 * 9, ff.rows, 32)


def test_pixels_that_a_stride_leaves_out_are_not_read() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 1, 2))
        ff, bp, wu = simulate(model, torch.empty(4, 3, 8, 8), "2:8").layers[1].gemms
    assert ff.left == bp.out == wu.left == 4 * 16 * 4 * 4


def test_reasons_for_dense_layers_come_from_their_shapes() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head_first = nn.Conv2d(16, 32, 1)  # names say nothing
            self.a = nn.Conv2d(32, 36, 3)
            self.b = nn.Conv2d(36, 32, 3)
            self.c = nn.Conv2d(32, 32, 3, groups=32)
            self.d = nn.Conv2d(32, 32, 3, groups=8)
            self.fine = nn.Conv2d(32, 32, 1)
            self.stem = nn.Conv2d(32, 64, 1)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.children():
                x = layer(x)
            return x @ x.transpose(2, 3)

    with torch.device("meta"):
        model, x = Odd(), torch.empty(2, 16, 16, 16)
    run = simulate(model, x, "2:8")
    assert {layer.name: layer.dense_because for layer in run.layers} == {
        "head_first.weight": "first layer: no gradient goes on to its input",
        "a.weight": "36 outputs are no multiple of 8",
        "b.weight": "36 inputs are no multiple of 8",
        "c.weight": "depthwise: no sum over channels",
        "d.weight": "4 inputs and 4 outputs of a group are no multiple of 8",
        "fine.weight": None,
        "stem.weight": "last layer",
        "model:matmul": "both factors are activations",
    }
    free = simulate(model, x, "2:4", ends=False, dense=["fi*"])
    assert [layer.dense_because for layer in free.layers[:1]] == [None]
    assert {layer.name: layer.dense_because for layer in free.layers}["fine.weight"] == "asked to stay dense"
    assert [g.stage for g in free.layers[0].gemms] == ["FF", "WU"]  # nothing before the first layer wants a gradient


def test_modes_prune_the_stages_that_they_name() -> None:
    model, x = mlp(16, 32, 32, 10), samples(64, 16)

    def sparse(stages: Any) -> list[tuple[str, str]]:
        steps = simulate(model, x, "2:8", stages=stages).of("1.weight")
        return [(step.stage, step.pattern) for step in steps if step.stage in ("FF", "BP", "WU")]

    assert sparse(("FF", "BP")) == [("FF", "2:8"), ("BP", "2:8"), ("WU", "1:1")]
    assert sparse(("FF",)) == [("FF", "2:8"), ("BP", "1:1"), ("WU", "1:1")]
    assert sparse(("BP",)) == [("FF", "1:1"), ("BP", "2:8"), ("WU", "1:1")]
    with pytest.raises(OptionError, match="'WU' cannot be pruned"):
        simulate(model, x, stages=("WU",))  # type: ignore[arg-type]


def test_pregeneration_moves_the_method_sheets_bytes_and_hides_the_pruning() -> None:
    model, x, weights = mlp(16, 64, 128, 10), samples(8, 16), 64 * 128
    for pattern, packed in (("2:8", 0.59375), ("2:4", 1.125)):
        bytes_, heads = {}, {}
        for on in (True, False):
            steps = {s.stage: s for s in simulate(model, x, pattern, pregenerate=on).of("1.weight")}
            data = 2 * 8 * (64 + 128)
            bytes_[on] = [steps["FF"].bytes - data, steps["BP"].bytes - data, steps["UP"].bytes - 16 * weights]
            heads[on] = steps["FF"].head, steps["BP"].head, steps["WU"].head
        assert bytes_[True] == [packed * weights, packed * weights, 2 * packed * weights]
        assert bytes_[False] == [2 * weights] * 3
        assert heads == {True: (0, 0, 0), False: (weights // 32, weights // 32, 0)}
    forward_only = {s.stage: s for s in simulate(model, x, "2:8", stages=("FF",)).of("1.weight")}
    assert forward_only["UP"].bytes == (16 + 0.59375 + 2) * weights  # the backward product reads them dense


def test_the_update_takes_four_vector_operations_and_comes_once() -> None:
    model = mlp(64, 64, 64, 64)
    model[2] = model[1]  # one weight, used twice: its gradients add up, its update is one
    run = simulate(model, samples(8, 64), "2:8")
    updates = [step for step in run.instructions if step.stage == "UP"]
    assert [step.layer for step in updates] == ["1.weight", "0.weight"]
    assert all(step.compute == 4 * 64 * 64 // 32 and step.ops == 4 * 64 * 64 for step in updates)
    model[0].weight.requires_grad_(False)
    assert [s.stage for s in simulate(model, samples(8, 64), "2:8").of("0.weight")] == ["FF"]


def test_passes_over_data_are_counted_by_what_they_read_and_write() -> None:
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 8)
        )
        x = torch.empty(16, 3, 8, 8)
    size = 16 * 8 * 64
    steps = [s for s in simulate(model, x, "2:4").instructions if s.stage in ("EF", "EB")]
    assert [(s.stage, s.operation, s.ops, s.bytes) for s in steps] == [
        ("EF", "native_batch_norm", 3 * size, 2 * 3 * size),
        ("EF", "relu", size, 2 * 2 * size),
        ("EF", "avg_pool2d", size, 2 * 1.25 * size),
        ("EB", "avg_pool2d", size, 2 * 1.25 * size),
        ("EB", "relu", size, 2 * 3 * size),
        ("EB", "native_batch_norm", 4 * size, 2 * 5 * size),
    ]
    assert all(s.compute == math.ceil(s.ops / 32) and s.memory == math.ceil(s.bytes / 128) for s in steps)
    hidden = simulate(model, x, "2:4", Accelerator(elementwise=False))
    assert hidden.pass_cycles == 0 and hidden.cycles == simulate(model, x, "2:4").cycles - sum(s.cycles for s in steps)


def test_what_is_not_modelled_is_named() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.LSTM(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).cumsum(0))[0]

    said = simulate(Sorted(), torch.zeros(4, 8), "2:4").not_modelled
    assert said == ("b: recurrent layers run step by step and are not read", "passes of cumsum over data")


def test_instructions_run_forward_then_backward_and_add_up() -> None:
    model, x = on_meta("resnet-20", 4)
    run = simulate(model, x, "2:8")
    stages = [step.stage for step in run.instructions]
    turn = stages.index("WU") - 1
    assert set(stages[:turn]) == {"FF", "EF"} and not {"FF", "EF"} & set(stages[turn + 1 :])
    forward = [s.layer for s in run.instructions if s.stage == "FF"]
    assert [s.layer for s in run.instructions if s.stage == "WU"] == forward[::-1]
    assert run.cycles == run.product_cycles + run.pass_cycles + run.update_cycles
    for layer in run.layers:
        order = [s.stage for s in run.of(layer.name)]
        assert order == ["FF", "BP", "WU", "UP"] or (layer is run.layers[0] and order == ["FF", "WU", "UP"])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from((1, 3)), st.integers(1, 2), st.sampled_from((1, 2, 4))),
        min_size=2, max_size=4,
    )
)  # fmt: skip
def test_any_network_is_read_layer_by_layer(plan: Any) -> None:
    with torch.device("meta"):
        parts, channels = [], 3
        for wide, kernel, stride, groups in plan:
            groups = groups if channels % groups == 0 else 1
            parts.append(nn.Conv2d(channels, wide * groups, kernel, stride, kernel // 2, groups=groups))
            channels = wide * groups
        model, x = nn.Sequential(*parts), torch.empty(2, 3, 16, 16)
    run, side = simulate(model, x, "2:4"), 16
    for i, (part, layer) in enumerate(zip(parts, run.layers, strict=True)):
        side = ceil_div(side, part.stride[0])
        pixels, area, g = 2 * side**2, part.kernel_size[0] ** 2, part.groups
        inputs, outputs = part.in_channels // g, part.out_channels // g
        found = {gemm.stage: (gemm.groups, gemm.rows, gemm.reduction, gemm.columns) for gemm in layer.gemms}
        expected = {
            "FF": (g, pixels, inputs * area, outputs), "BP": (g, pixels, outputs * area, inputs),
            "WU": (g, inputs * area, pixels, outputs),
        }  # fmt: skip
        assert found == {stage: expected[stage] for stage in found} and ("BP" in found) == (i > 0)
        prunable = 0 < i < len(parts) - 1 and inputs % 4 == outputs % 4 == 0
        assert (layer.dense_because is None) == prunable
        assert [gemm.sparse for gemm in layer.gemms[:-1]] == [prunable] * (len(found) - 1)


def test_prototype_figures_of_the_method_sheet() -> None:
    """CIFAR ResNet-18, no passes over data. The sheet's own prototype: 1.99x at 2:8, 1.50x at 2:4, SR-STE 1.33x."""
    model, x = on_meta("resnet-18", 128, stem="small", num_classes=10)
    found = compare(model, x, "2:8", Accelerator(elementwise=False))
    assert found.dense.product_cycles / found.sparse.product_cycles == pytest.approx(1.99, abs=0.02)
    assert found.dense.product_cycles / found.forward_only.product_cycles == pytest.approx(1.33, abs=0.01)
    four = compare(model, x, "2:4", Accelerator(elementwise=False))
    assert four.dense.product_cycles / four.sparse.product_cycles == pytest.approx(1.50, abs=0.01)
    slow = compare(model, x, "2:8", Accelerator(elementwise=False, bandwidth=3.2))
    assert slow.speedup < found.speedup


def test_rows_add_up_and_are_plain_data() -> None:
    model, x = on_meta("resnet-20", 8)
    found = compare(model, x, "2:8")
    *parts, passes, total = rows(found)
    assert (passes.layer, total.layer, total.cycles) == ("passes over data", "total", found.sparse.cycles)
    for field in ("cycles", "dense_cycles", "ff", "bp", "wu", "update", "energy"):
        assert sum(getattr(row, field) for row in (*parts, passes)) == pytest.approx(getattr(total, field))
    assert total.speedup == found.speedup and total.utilisation == pytest.approx(found.sparse.utilisation)
    assert [row.layer for row in parts] == [layer.name for layer in found.sparse.layers]
    assert all(row.ff + row.bp + row.wu + row.update == row.cycles for row in parts)
    plain = json.loads(json.dumps(to_dict(found)))
    assert plain["speedup"] == found.speedup and plain["accelerator"]["rows"] == 32
    assert plain["runs"]["dense"]["cycles"] == found.dense.cycles and len(plain["layers"]) == len(parts) + 2


def test_energy_is_counted_as_documented() -> None:
    model, x = on_meta("resnet-20", 8)
    run = simulate(model, x, "2:8", Accelerator(energy_mac=2.0, energy_byte=7.0))
    ops = sum(step.macs + step.ops for step in run.instructions)
    assert run.energy == pytest.approx(2 * ops + 7 * run.bytes)
