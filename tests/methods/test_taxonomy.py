"""Every method has a place in the taxonomy, and a short run behaves as that place says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy
from rarefy.engine import FAMILIES, Method
from rarefy.patterns import Pattern, parse_pattern
from tests.engine.common import backward, batch, mlp

DOCS = Path(__file__).parents[2] / "docs" / "taxonomy.md"
METHODS = rarefy.methods.available()
SPARSITY, STEPS = 0.8, 12


def of(*families: str) -> list[str]:
    """Methods of these families that take a network as it is; some build their own."""
    return [n for n, cls in METHODS.items() if getattr(cls, "family", None) in families and cls.model is Method.model]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_states_its_own_family(name: str) -> None:
    cls = METHODS[name]
    assert "family" in vars(cls), f"{cls.__name__} inherits its family or has none: state it beside its name"
    assert cls.family in FAMILIES
    assert name in rarefy.methods.by_family()[cls.family]


def test_families_hold_every_method_once() -> None:
    groups = rarefy.methods.by_family()
    assert sorted(name for members in groups.values() for name in members) == sorted(METHODS)
    assert [*groups] == [family for family in FAMILIES if family in groups]


@pytest.mark.parametrize("name", METHODS)
def test_the_taxonomy_page_has_every_method_under_its_family(name: str) -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(rf"\| (\[`{re.escape(name)}`\]|`{re.escape(name)}` )", line)]
    assert len(rows) == 1, f"{name} needs one row in docs/taxonomy.md"
    assert f"| {METHODS[name].family} |" in rows[0]


def level(name: str) -> float:
    """The sparsity that a probe asks for: SPARSITY, or what the method's default pattern prescribes."""
    fixed = parse_pattern(getattr(METHODS[name], "pattern", "unstructured")).fixed_sparsity
    return SPARSITY if fixed is None else fixed


def fits(pattern: Pattern, shape: torch.Size) -> bool:
    try:
        pattern.check(shape)
    except rarefy.errors.PatternError:
        return False
    return True


def probe(name: str) -> tuple[rarefy.Sparsifier, list[int], list[dict[str, torch.Tensor]]]:
    """Train a few steps; return the sparsifier, kept weights and masks after every step (and before the first)."""
    model = mlp()
    pattern = parse_pattern(getattr(METHODS[name], "pattern", "unstructured"))
    if not any(fits(pattern, p.shape) for p in model.parameters()):  # tiles of 8 x 8
        model[3], model[5] = nn.Linear(16, 24), nn.Linear(24, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"sparsity": level(name), "every": 2}
    method = METHODS[name].make(**{k: v for k, v in options.items() if k in METHODS[name].__dataclass_fields__})
    calibration = [batch(i) for i in range(3)] if method.needs_calibration else None
    sparse = rarefy.sparsify(model, method, optimizer=optimizer, total_steps=STEPS, calibration=calibration)
    kept, masks = [sparse.nnz], [sparse.masks()]
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        kept.append(sparse.nnz)
        masks.append(sparse.masks())
    return sparse, kept, masks


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", of("before training"))
def test_before_training_means_masks_that_never_change(name: str) -> None:
    sparse, kept, masks = probe(name)
    assert all(same(masks[0], later) for later in masks)
    assert set(kept) == {int((1 - SPARSITY) * sparse.numel + 0.5)}


@pytest.mark.parametrize("name", of("sparse to sparse"))
def test_sparse_to_sparse_is_never_denser_than_asked_and_moves(name: str) -> None:
    sparse, kept, masks = probe(name)
    rounding = sum(
        0.5 * layer.groups for layer in sparse.layers.values()
    )  # so many weights per group are whole numbers
    assert max(kept) <= (1 - level(name)) * sparse.numel + rounding
    assert any(not same(masks[0], later) for later in masks)


@pytest.mark.parametrize("name", of("dense to sparse"))
def test_dense_to_sparse_begins_dense_and_ends_sparser(name: str) -> None:
    sparse, kept, _ = probe(name)
    assert kept[0] > 0.5 * sparse.numel
    if "sparsity" in METHODS[name].__dataclass_fields__:  # where it emerges, a few steps need not show it
        assert kept[-1] < kept[0]


def test_a_method_from_elsewhere_needs_no_family_to_run() -> None:
    class Mine(Method):
        name = "mine"

    sparse = rarefy.sparsify(nn.Linear(4, 3), Mine())
    assert sparse.sparsity == 0.0
