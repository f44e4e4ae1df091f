"""Soups of models that share a mask, and the cycles that make them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rarefy.engine.batch_norm import recalibrate
from rarefy.errors import OptionError, StateError
from rarefy.search import Phase, Workers, branch, sparse_model_soups
from rarefy.search.soups import average, barrier, between, check_same_masks, greedy, spread
from tests.search.trainings import data, equal, net, retrain, retrain_until_killed, same, score

ROOT = Path(__file__).parents[2]
CALIBRATION = [data(1000 + i)[0] for i in range(4)]


def states(count: int) -> list[dict[str, torch.Tensor]]:
    return [net(seed).state_dict() for seed in range(count)]


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=6), st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_uniform_soup_is_the_mean_in_any_order(values: list[float], shuffle: Any) -> None:
    members = [{"w": torch.tensor([v, v / 3])} for v in values]
    soup = average(members)["w"]
    mean, largest = torch.stack([m["w"] for m in members]).double().mean(0), max(map(abs, values))
    torch.testing.assert_close(soup.double(), mean, rtol=1e-7, atol=1e-14 * largest)
    mixed = list(members)
    shuffle.shuffle(mixed)
    assert torch.equal(soup, average(mixed)["w"])
    assert torch.equal(average([members[0]] * len(values))["w"], members[0]["w"])


@pytest.mark.parametrize("count", [3, 7, 49])
def test_equal_members_are_their_soup_in_float64_too(count: int) -> None:
    member = {"w": torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(average([member] * count)["w"], member["w"])


def test_counts_of_batches_stay_whole_numbers_and_other_networks_are_refused() -> None:
    members = states(3)
    members[1]["1.num_batches_tracked"] += 7
    soup = average(members)
    assert soup["1.num_batches_tracked"].dtype == torch.int64 and int(soup["1.num_batches_tracked"]) == 0
    with pytest.raises(StateError, match=r"member 1 is of another network.*9\.bias"):
        average([members[0], {**members[1], "9.bias": torch.zeros(1)}])
    with pytest.raises(OptionError, match="at least one member"):
        average([])
    masks = {"w": torch.tensor([True, False])}
    with pytest.raises(StateError, match="member 1 has another mask"):
        check_same_masks([masks, {"w": torch.tensor([True, True])}])


@pytest.mark.parametrize("seed", range(5))
def test_a_greedy_soup_is_never_worse_than_its_best_member(seed: int) -> None:
    torch.manual_seed(seed)
    members = [{"w": torch.randn(6)} for _ in range(5)]
    target = torch.randn(6)

    def fit(state: dict[str, torch.Tensor]) -> float:
        return -float((state["w"] - target).norm())

    scores = [fit(member) for member in members]
    chosen = greedy(members, scores, fit)
    best = scores[chosen[0]]
    assert best == max(scores) and len(set(chosen)) == len(chosen)
    for stop in range(1, len(chosen) + 1):
        now = fit(average([members[i] for i in chosen[:stop]]))
        assert now >= best - 1e-7
        best = now
    assert greedy([members[0]] * 3, [1.0, 1.0, 1.0], lambda state: 1.0) == [0, 1, 2]
    assert greedy(members, scores, lambda state: -math.inf) == chosen[:1]


def test_spread_in_closed_form() -> None:
    found = spread([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}], ["w"])
    assert found == pytest.approx({"distance": math.sqrt(2), "angle": 90.0, "radius": math.sqrt(0.5)})
    equal = spread([{"w": torch.tensor([1.0, 2.0])}] * 2, ["w"])
    assert equal == pytest.approx({"distance": 0.0, "angle": 0.0, "radius": 0.0}, abs=1e-5)


def test_the_barrier_of_a_parabola_and_of_a_hill() -> None:
    a, b = {"w": torch.tensor([-1.0]), "n": torch.tensor(3)}, {"w": torch.tensor([3.0]), "n": torch.tensor(4)}
    assert barrier(a, b, lambda state: float(state["w"] ** 2)) == pytest.approx(9 - 5)  # at its own end
    assert barrier(a, b, lambda state: -float((state["w"] - 1) ** 2)) == pytest.approx(4)
    assert barrier(a, b, lambda state: 2.0) == 0 and barrier(a, a, lambda state: float(state["w"])) == 0
    assert between(a, b, 0.25)["w"].item() == 0.0 and int(between(a, b, 0.25)["n"]) == 3
    for bad in (lambda: between(a, b, 1.5), lambda: barrier(a, b, lambda state: 0.0, points=2)):
        with pytest.raises(OptionError):
            bad()


def test_recalibrated_statistics_are_the_batches_own_moments() -> None:
    model, x = net(), torch.randn(50, 12)
    model.train()
    model[3].eval()
    hidden = model[0](x).detach()
    recalibrate(model, [x])
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(model[1].running_var, hidden.var(0))
    recalibrate(model, [(x[:25], None), (x[25:], None)])
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(model[1].running_var, (hidden[:25].var(0) + hidden[25:].var(0)) / 2)
    assert model[1].momentum == 0.1 and model[1].training and not model[3].training and model[0].weight.grad is None
    before = model[1].running_mean.clone()
    with pytest.raises(OptionError, match="at least one batch"):
        recalibrate(model, [])
    assert torch.equal(before, model[1].running_mean)
    plain = nn.Linear(3, 3)
    assert recalibrate(plain, []) is plain


def cycle(folder: Path | None = None, workers: Workers | None = None, **options: Any) -> tuple[nn.Module, list[Phase]]:
    model = net()
    job = options.pop("job", retrain)
    phases = sparse_model_soups(
        model, job, **{"sparsity": 0.9, "phases": 3, "members": 2, "seed": 7, **options},
        evaluate=score, calibration=CALIBRATION, workers=workers or Workers("here"), folder=folder,
    )  # fmt: skip
    return model, phases


def comparable(phases: list[Phase]) -> list[Any]:
    return [
        [p.sparsity, p.scores, p.soup_score, p.chosen, p.spread, [{**r, "process": 0} for r in p.results]]
        for p in phases
    ]


def test_phases_follow_the_closed_form_with_nested_masks_and_sparse_soups() -> None:
    model, phases = cycle(members=[{"weight_decay": 0.0}, {"weight_decay": 0.1}, {}])
    p = 1 - 0.1 ** (1 / 3)
    assert p == pytest.approx(0.5358411, abs=1e-7)
    numel = sum(mask.numel() for mask in phases[0].masks.values())
    for k, phase in enumerate(phases, 1):
        assert sum(int(m.sum()) for m in phase.masks.values()) == math.floor((1 - p) ** k * numel + 0.5)
        assert phase.sparsity == pytest.approx([0.5358, 0.7846, 0.9][k - 1], abs=2e-3)
        assert len(phase.results) == len(phase.scores or ()) == 3 and phase.spread["distance"] > 0
        assert phase.chosen == [0, 1, 2]
        if k > 1:
            assert all((phases[k - 2].masks[n] | ~m).all() for n, m in phase.masks.items())
    for name, mask in phases[-1].masks.items():
        assert not model.get_parameter(name)[~mask].any()
    assert score(model) == phases[-1].soup_score
    assert not model[0].weight._post_accumulate_grad_hooks


def test_a_soup_of_equal_members_is_the_member() -> None:
    one, _ = cycle(job=same, members=1, phases=1)
    three, phases = cycle(job=same, members=3, phases=1)
    assert all(torch.equal(v, three.state_dict()[n]) for n, v in one.state_dict().items())
    assert phases[0].spread == pytest.approx({"distance": 0.0, "angle": 0.0, "radius": 0.0}, abs=1e-6)


def test_greedy_phases_are_no_worse_than_their_best_member() -> None:
    _, phases = cycle(soup="greedy", members=3)
    for phase in phases:
        assert phase.scores is not None and phase.soup_score is not None
        assert phase.soup_score >= max(phase.scores)


def test_a_whole_search_gives_the_same_bits_elsewhere(elsewhere: Workers) -> None:
    here, here_phases = cycle()
    there, phases = cycle(workers=elsewhere)
    assert equal(dict(here.state_dict()), dict(there.state_dict()))
    assert comparable(here_phases) == comparable(phases)
    assert equal([p.masks for p in here_phases], [p.masks for p in phases])
    processes = {r["process"] for p in phases for r in p.results}
    assert os.getpid() not in processes


@pytest.mark.parametrize("backend", ["here", "processes"])
def test_a_killed_search_goes_on_where_it_was(backend: str, tmp_path: Path) -> None:
    whole, phases = cycle(tmp_path / "whole")
    code = (
        "from functools import partial; from pathlib import Path\n"
        "import torch; torch.set_num_threads(1)\n"
        "from rarefy.search import Workers\n"
        "from tests.search.test_soups import cycle\n"
        "from tests.search.trainings import retrain_until_killed\n"
        f"job = partial(retrain_until_killed, {str(tmp_path)!r})\n"
        f"cycle(Path({str(tmp_path / 'cut')!r}), Workers({backend!r}, 1), job=job)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    worker = int((tmp_path / "killed").read_text())
    for _ in range(200):
        if not Path(f"/proc/{worker}").exists():
            break
        time.sleep(0.05)
    else:
        pytest.fail("a worker outlived the search that it worked for")
    again, more = cycle(tmp_path / "cut", job=partial(retrain_until_killed, str(tmp_path)))
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in whole.state_dict().items())
    assert comparable(more) == comparable(phases)
    calls = [path.name.rsplit("-", 1)[0] for path in tmp_path.glob("?-?-*")]
    assert sorted(calls) == ["1-0", "1-1", "2-0", "2-1", "2-1", "3-0", "3-1"], "finished members were trained again"
    with pytest.raises(StateError, match="phases was 3 and is 2 now"):
        cycle(tmp_path / "cut", phases=2)


def test_branch_averages_what_was_pruned_elsewhere() -> None:
    model = net()
    masks = {"0.weight": torch.rand(16, 12) < 0.3}
    with torch.no_grad():
        model[0].weight.mul_(masks["0.weight"])
    phase = branch(model, masks, retrain, members=2, calibration=CALIBRATION, workers=Workers("here"))
    assert phase.scores is None and phase.soup_score is None
    assert not model[0].weight[~masks["0.weight"]].any() and bool(model[4].weight.all())


def test_what_cannot_be_done_is_refused_before_anything_trains() -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    for options, said in [
        ({"phases": 0}, "phases=0"),
        ({"members": []}, "at least one"),
        ({"soup": "miso"}, "soup='miso'"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
    ]:
        with pytest.raises(OptionError, match=said):
            cycle(job=never, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="pass evaluate"):
        sparse_model_soups(net(), never, soup="greedy", calibration=CALIBRATION)
    with pytest.raises(OptionError, match="batch norms, whose statistics"):
        sparse_model_soups(net(), never)
