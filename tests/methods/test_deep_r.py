"""DEEP R: what it drops, how it drifts, and when it does neither; on both storages."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import rarefy
from tests.engine.common import batch, mlp
from tests.engine.compressed import step

both = pytest.mark.parametrize("storage", ["masked", "compressed"])


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@both
def test_deep_r_drops_what_crosses_zero_and_nothing_else(storage: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    sparse = rarefy.sparsify(
        model, "deep-r", sparsity=0.7, optimizer=optimizer, storage=storage, l1=0.0, temperature=0.0
    )
    crossings = 0
    for i in range(25):
        signs = {name: sparse.memory[f"signs {name}"] for name in sparse.layers}
        before = {name: layer.mask() for name, layer in sparse.layers.items()}
        weights: dict[str, Tensor] = {}
        hook = optimizer.register_step_post_hook(  # after the update, before the method: hooks run in order
            lambda *_, into=weights: into.update({n: layer.weight().clone() for n, layer in sparse.layers.items()})
        )
        optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
        step(model, optimizer, batch(i))
        hook.remove()
        for name, layer in sparse.layers.items():
            crossed = torch.zeros_like(before[name])
            crossed[before[name]] = weights[name][before[name]] * signs[name] < 0
            absent = int((~before[name]).sum())
            dropped = before[name] & ~layer.mask()
            assert int(dropped.sum()) == min(int(crossed.sum()), absent) and not bool((dropped & ~crossed).any())
            crossings += int(dropped.sum())
            now = sparse.memory[f"signs {name}"]
            assert set(now.tolist()) <= {-1, 1} and bool((layer.values() * now >= 0).all())
    assert crossings > 20


@both
def test_deep_r_drifts_towards_zero_with_noise_in_proportion(storage: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparse = rarefy.sparsify(
        model, "deep-r", sparsity=0.5, optimizer=optimizer, storage=storage, l1=1e-4, allocation="uniform", every=99
    )
    before = {name: layer.values() for name, layer in sparse.layers.items()}
    for _ in range(30):
        optimizer.step()  # no gradient at all
    moves = torch.cat([(before[n] - layer.values()) * before[n].sign() for n, layer in sparse.layers.items()])
    moves = moves[torch.cat([values.abs() > 5e-3 for values in before.values()])]  # what has crossed zero waits there
    assert float(moves.mean()) == pytest.approx(30 * 0.5e-4, rel=0.02)
    assert float(moves.std()) == pytest.approx(math.sqrt(30) * 0.5e-4 / 3, rel=0.1)


@both
def test_deep_r_moves_nothing_before_it_starts_or_after_it_stops_nor_what_has_crossed(storage: str) -> None:
    """The drift goes along the remembered sign: once a weight is on the other side, it would make it larger for ever."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"l1": 1e-2, "temperature": 0.0, "every": 10, "start": 10, "stop": 20, "sparsity": 0.5}
    sparse = rarefy.sparsify(model, "deep-r", optimizer=optimizer, storage=storage, allocation="uniform", **options)
    for layer in sparse.layers.values():
        layer.write(-layer.values())  # before the start every weight may change its sign
    for step_count in range(1, 31):
        before = {name: layer.values() for name, layer in sparse.layers.items()}
        crossed = {name: torch.arange(len(values)) % 3 == 0 for name, values in before.items()}
        if step_count == 15:
            for name, layer in sparse.layers.items():
                before[name] = torch.where(crossed[name], -before[name], before[name])
                layer.write(before[name])
        optimizer.step()  # no gradient at all
        for name, layer in sparse.layers.items():
            moved = before[name].abs() - layer.values().abs()
            if step_count <= 10 or step_count > 20:
                assert not moved.any(), (name, step_count)
            elif step_count < 15:
                far = before[name].abs() > 1e-2
                torch.testing.assert_close(moved[far], torch.full_like(moved[far], 1e-3))
            elif step_count < 20:
                assert not moved[crossed[name] & (before[name].abs() > 1e-2)].any()
    dropped = {event.step: 0 for event in sparse.events if event.step}
    assert set(dropped) == {20}, "what crossed before the start is not dropped; what crossed later is, at the update"
