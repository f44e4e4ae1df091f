"""Options that cannot be: for every option of every method, an error that names it, before there is a model to touch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from rarefy import methods
from rarefy.errors import OptionError, RarefyError

SAID = {"masks": "method", "restriction": "decay"}  # what the error calls an option that is another part's name
OPTIONS = [(name, option) for name, cls in methods.available().items() for option in dataclasses.fields(cls)]
named = pytest.mark.parametrize(("method", "option"), OPTIONS, ids=[f"{name}-{o.name}" for name, o in OPTIONS])


@named
def test_nonsense_is_refused_by_name(method: str, option: Any) -> None:
    refused: list[Any] = ["nonsense", math.nan, -math.inf, [], (1, 2), object(), 1 + 1j]
    if option.name not in ("connected", "dense_stem", "match_flops", "size_cost"):
        refused += [True, False]
    if option.name != "hash_seed":
        refused += [-1, -0.5]
    for value in refused:
        with pytest.raises(RarefyError) as said:
            methods.make(method, **{option.name: value})
        assert SAID.get(option.name, option.name) in str(said.value)
    with pytest.raises(RarefyError):
        methods.make(method, **{option.name: math.inf})


@pytest.mark.parametrize("method", ["gradual", "movement", "soft-movement", "ac-dc"])
def test_a_sparsity_that_is_reached_at_an_end_needs_one(method: str) -> None:
    with pytest.raises(OptionError, match="stop=None"):
        methods.make(method, stop=None)


@pytest.mark.parametrize("method", ["issp", "iss-r", "greg", "wgsef"])
def test_a_mask_that_is_made_at_the_end_needs_a_step_before_it(method: str) -> None:
    """With an end at step 0 nothing was ever pruned, and nothing said so."""
    for options, total in (({"stop": 0}, 10), ({"stop": 0}, None), ({"stop": 0.01}, 10)):
        with pytest.raises(OptionError, match=f"{method} makes its mask at the step `stop`, and that is step 0"):
            methods.make(method, **options).clock(total)
    assert methods.make(method, stop=1).clock(10).last == 1
