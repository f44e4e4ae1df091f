"""Lottery tickets over one's own trainings."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy import Sparsifier
from rarefy.errors import OptionError, SelectionError, StateError
from rarefy.methods import LotteryTicket
from rarefy.search import Training, hold, lottery_ticket, retrain, shuffled
from tests.search.trainings import STEPS, net, train, train_until_killed

ROOT = Path(__file__).parents[2]


def test_rounds_follow_the_paper() -> None:
    model, seen, ends = net(), [], []
    first = {name: value.clone() for name, value in model.state_dict().items()}
    at_k: dict[str, Tensor] = {}

    def watched(model: nn.Module, sparse: Sparsifier, training: Training) -> dict[str, Any]:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        seen.append((training, sparse.masks(), state))
        assert training.sparsity == sparse.sparsity and torch.initial_seed() == training.seed
        result = train(model, sparse, training)
        if training.stop is not None:
            at_k.update({name: value.clone() for name, value in model.state_dict().items()})
        else:
            ends.append({name: layer.weight().clone() for name, layer in sparse.layers.items()})
        return result

    found = lottery_ticket(model, watched, LotteryTicket(sparsity=1 - 0.8**5, rounds=5, rewind_to=3))
    assert found.trainings == 6 and [(t.start, t.stop) for t, _, _ in seen] == [(0, 3), (3, None)] + 5 * [(3, None)]
    assert len({training.seed for training, _, _ in seen}) == 7
    assert all(torch.equal(value, first[name]) for name, value in seen[0][2].items())
    total = sum(mask.numel() for mask in seen[0][1].values())
    for round in range(1, 6):
        _, masks, start = seen[round + 1]
        before = seen[round][1]
        kept = torch.cat([ends[round - 1][n][masks[n]].abs() for n in masks])
        dropped = torch.cat([ends[round - 1][n][before[n] & ~masks[n]].abs() for n in masks])
        assert kept.min() > dropped.max() and all((before[n] | ~masks[n]).all() for n in masks)
        assert len(kept) == math.floor(0.8**round * total + 0.5)
        for name, value in start.items():
            assert torch.equal(value, at_k[name] * masks[name] if name in masks else at_k[name]), name
        assert all(torch.equal(mask, found.rounds[round].masks[n]) for n, mask in masks.items())
        assert found.rounds[round].result["steps"] == STEPS - 3
    assert found.rewound is not None
    assert all(torch.equal(value, at_k[name]) for name, value in found.rewound.items())
    assert all(not model.get_parameter(n)[~m].any() for n, m in found.rounds[-1].masks.items())
    assert not model[0].weight._post_accumulate_grad_hooks, "the model is not plain again"


def test_density_follows_the_papers_recursion_to_one_weight() -> None:
    """R <- R - ceil(p R) of the papers' code and the closed form (1 - p)^r R differ by rounding, which does not add up."""
    model, remaining, levels = net(), [], 12
    found = lottery_ticket(model, lambda *_: {}, LotteryTicket(sparsity=1 - 0.8**levels, rounds=levels))
    numel = sum(mask.numel() for mask in found.rounds[0].masks.values())
    count = numel
    for ticket in found.rounds:
        remaining.append(sum(int(mask.sum()) for mask in ticket.masks.values()))
        assert abs(remaining[-1] - count) <= 5  # sum of 0.8^i
        count -= math.ceil(0.2 * count)
    assert remaining[0] == numel


def test_an_excluded_layer_stays_dense_and_learning_rate_rewinding_keeps_weights() -> None:
    model, starts = net(), []

    def watched(model: nn.Module, sparse: Sparsifier, training: Training) -> dict[str, Any]:
        starts.append((training.start, model[0].weight.detach().clone()))
        return train(model, sparse, training)

    method = LotteryTicket(sparsity=0.5, rounds=2, rewind="learning-rate", rewind_to=3)
    found = lottery_ticket(model, watched, method, exclude="6")
    assert [start for start, _ in starts] == [0, 3, 3] and found.rewound is None
    assert "6.weight" not in found.rounds[-1].masks and bool(model[6].weight.all())
    assert not torch.equal(starts[1][1], starts[0][1] * found.rounds[1].masks["0.weight"])


@pytest.mark.parametrize("round", [0, 2])
def test_a_killed_search_ends_bit_for_bit_the_same(round: int, tmp_path: Path) -> None:
    method = "LotteryTicket(sparsity=0.7, rounds=3, rewind_to=2)"
    whole = net()
    found = lottery_ticket(
        whole, train, LotteryTicket(sparsity=0.7, rounds=3, rewind_to=2), seed=4, folder=tmp_path / "whole"
    )
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from functools import partial; from rarefy.methods import LotteryTicket; from rarefy.search import lottery_ticket\n"
        "from tests.search.trainings import net, train_until_killed\n"
        f"lottery_ticket(net(), partial(train_until_killed, {str(tmp_path)!r}, {round}), {method}, seed=4, "
        f"folder={str(tmp_path / 'killed-search')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    other = net(9)  # whatever the model holds, the folder's is taken
    if round == 0:  # killed between steps 0..k and the end of the dense training: w_k is there
        other = net()
    job = partial(train_until_killed, str(tmp_path), round)
    again = lottery_ticket(
        other, job, LotteryTicket(sparsity=0.7, rounds=3, rewind_to=2), seed=4, folder=tmp_path / "killed-search"
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert [t.result for t in again.rounds] == [t.result for t in found.rounds]
    assert all(torch.equal(m, again.rounds[-1].masks[n]) for n, m in found.rounds[-1].masks.items())

    def never(*_: Any) -> dict[str, Any]:
        raise AssertionError("a finished search trains no more")

    finished = net(5)
    lottery_ticket(
        finished, never, LotteryTicket(sparsity=0.7, rounds=3, rewind_to=2), seed=4, folder=tmp_path / "whole"
    )
    assert all(torch.equal(v, finished.state_dict()[n]) for n, v in whole.state_dict().items())
    with pytest.raises(StateError, match=r"of another search: seed was 4 and is 5 now"):
        lottery_ticket(
            net(), train, LotteryTicket(sparsity=0.7, rounds=3, rewind_to=2), seed=5, folder=tmp_path / "whole"
        )


def test_controls_keep_the_counts_and_change_one_thing() -> None:
    model = net()
    found = lottery_ticket(model, train, LotteryTicket(sparsity=0.8, rounds=4, rewind_to=2))
    masks = found.rounds[-1].masks
    for within in ("layers", "all"):
        mixed = shuffled(masks, 1, within)
        kept = {n: int(m.sum()) for n, m in masks.items()}
        assert sum(int(m.sum()) for m in mixed.values()) == sum(kept.values())
        assert ({n: int(m.sum()) for n, m in mixed.items()} == kept) == (within == "layers")
        assert not any(torch.equal(mixed[n], m) for n, m in masks.items())
        assert all(torch.equal(m, shuffled(masks, 1, within)[n]) for n, m in mixed.items())
    starts: list[dict[str, Tensor]] = []

    def watched(model: nn.Module, sparse: Sparsifier, training: Training) -> dict[str, Any]:
        starts.append({n: v.clone() for n, v in model.state_dict().items()})
        return train(model, sparse, training)

    other = net(3)
    assert retrain(other, watched, masks, weights=found.rewound, start=2)["steps"] == STEPS - 2
    assert found.rewound is not None
    for name, value in starts[0].items():
        expected = found.rewound[name]
        assert torch.equal(value, expected * masks[name] if name in masks else expected)
    retrain(net(8), watched, masks)
    assert torch.equal(starts[1]["0.weight"], net(8)[0].weight.detach() * masks["0.weight"])


def test_masks_that_do_not_fit_are_refused() -> None:
    model = net()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    good = torch.ones(16, 12, dtype=torch.bool)
    with pytest.raises(SelectionError, match=r"'0.wieght' is no weight .*did you mean '0.weight'"):
        hold(model, {"0.wieght": good})
    with pytest.raises(StateError, match=r"0\.weight \[16, 12\]: its mask is \[12, 16\]"):
        hold(model, {"0.weight": good.T})
    with pytest.raises(OptionError, match="call retrain"):
        lottery_ticket(model, train, LotteryTicket(ticket="shuffled"))
    with pytest.raises(OptionError, match="give steps here"):
        lottery_ticket(model, train, LotteryTicket(rewind_to=0.5))
    with pytest.raises(OptionError, match="within='rows'"):
        shuffled({"0.weight": good}, within="rows")
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())
