"""Lottery tickets in one run: what is pruned, what is put back, and that nothing else is."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.errors import OptionError, StateError
from rarefy.methods import LotteryTicket
from tests.engine.common import assert_sparse, backward, batch, mlp

TOTAL, ROUNDS, K = 60, 3, 4  # T = (60 + 3 * 4) / 4 = 18


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Run:
    """A plain loop whose learning rate follows the method's place on the schedule."""

    def __init__(self, *, total: int = TOTAL, storage: str = "masked", follow: bool = True, **options: Any) -> None:
        self.total = total
        self.model = mlp()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        self.sparse = rarefy.sparsify(
            self.model,
            "lottery-ticket",
            optimizer=self.optimizer,
            total_steps=total,
            storage=storage,
            **{"sparsity": 0.6, "rounds": ROUNDS, "rewind_to": K, **options},
        )
        self.rates: list[float] = []
        self.follow = follow

    def step(self) -> None:
        done = self.sparse.step_count
        at, steps = self.sparse.method.lr_step(done, self.total) if self.follow else (done, self.total)
        self.optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * at / steps))
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        backward(self.model, done)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def go(self, steps: int) -> Run:
        for _ in range(steps):
            self.step()
        return self

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def momenta(run: Run) -> list[Tensor]:
    return [value for state in run.optimizer.state.values() for value in state.values() if value is not None]


def test_each_round_prunes_the_smallest_survivors_and_puts_the_rest_back_bit_for_bit() -> None:
    run = Run()
    run.go(K)
    early = run.state()
    run.go(18 - K - 1)
    masks = run.sparse.masks()
    assert all(mask.all() for mask in masks.values())
    for round in range(1, ROUNDS + 1):
        twin = copy.deepcopy(run.model)  # what training ends with, before the pruning that follows the step
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        optimizer.load_state_dict(run.optimizer.state_dict())
        assert len(momenta(run)) > 0
        run.step()
        optimizer.param_groups[0]["lr"] = run.rates[-1]
        backward(twin, run.sparse.step_count - 1)
        for name, mask in masks.items():
            twin.get_parameter(name).grad.mul_(mask)  # type: ignore[union-attr]
        optimizer.step()
        after = run.sparse.masks()
        ends = {name: twin.get_parameter(name).detach().abs() for name in masks}
        kept = torch.cat([ends[n][after[n]] for n in masks])
        dropped = torch.cat([ends[n][masks[n] & ~after[n]] for n in masks])
        assert kept.min() > dropped.max(), "a pruned weight was larger than a kept one"
        assert all((masks[n] | ~after[n]).all() for n in masks), "a pruned weight came back"
        level = 1 - 0.4 ** (round / ROUNDS)
        assert run.sparse.nnz == math.floor((1 - level) * run.sparse.numel + 0.5)
        for name, value in run.model.state_dict().items():  # biases, norms, running statistics and counters too
            assert torch.equal(value, early[name] * after[name] if name in after else early[name]), name
        assert not momenta(run), "the optimizer remembers the training before"
        masks = after
        if round < ROUNDS:
            run.go(18 - K - 1)
            assert_sparse(run.sparse)
    assert run.sparse.sparsity == pytest.approx(0.6, abs=2e-3)
    run.go(18 - K)
    assert run.sparse.step_count == TOTAL
    assert all(torch.equal(mask, masks[name]) for name, mask in run.sparse.masks().items())
    assert_sparse(run.sparse)


def test_the_learning_rate_is_rewound_with_the_weights() -> None:
    rates = Run().go(TOTAL).rates
    for round in range(1, ROUNDS + 1):
        first = 18 + (round - 1) * (18 - K)
        assert rates[first : first + 18 - K] == rates[K:18]
    tuned = Run(rewind="none").go(TOTAL).rates
    assert tuned[:18] == rates[:18] and set(tuned[18:]) == {rates[17]}
    assert Run(rewind="learning-rate").go(TOTAL).rates == rates


def test_a_learning_rate_that_was_not_rewound_is_warned_of() -> None:
    run = Run(follow=False).go(18)
    with pytest.warns(UserWarning, match=r"make the schedule a function of sparse.method.lr_step"):
        run.step()


def test_learning_rate_rewinding_and_fine_tuning_keep_the_weights() -> None:
    for rewind in ("learning-rate", "none"):
        run = Run(rewind=rewind).go(17)
        twin = copy.deepcopy(run.model)
        run.step()
        assert run.sparse.sparsity == pytest.approx(1 - 0.4 ** (1 / 3), abs=2e-3)
        assert not momenta(run) and "rewound" not in run.sparse.memory
        assert (run.model[0].weight - twin[0].weight).abs().max() < 0.5  # one step away, where it is kept
        assert not torch.equal(run.model[1].running_mean, mlp()[1].running_mean)


@pytest.mark.parametrize("ticket", ["reinit", "shuffled"])
def test_controls_differ_from_the_ticket_in_one_thing_only(ticket: str) -> None:
    winner, control = Run(), Run(ticket=ticket)
    initial = {n: p.detach().clone() for n, p in control.model.named_parameters()}
    last = 18 + 2 * (18 - K)
    winner.go(last - 1)
    control.go(last - 1)
    assert all(torch.equal(a, b) for a, b in zip(winner.state().values(), control.state().values(), strict=True))
    winner.step()
    control.step()
    early = winner.sparse.memory["rewound"]
    for name, layer in control.sparse.layers.items():
        mask, weight, won = layer.mask(), layer.weight(), winner.sparse.layers[name].mask()
        assert int(mask.sum()) == int(won.sum())
        if ticket == "shuffled":
            assert not torch.equal(mask, won)
            assert torch.equal(weight, early[name] * mask)
        else:
            assert torch.equal(mask, won)
            assert not torch.equal(weight, winner.sparse.layers[name].weight())
            assert set(weight[mask].tolist()) <= set(initial[name].flatten().tolist())
    assert torch.equal(control.model[0].bias, winner.model[0].bias)


@pytest.mark.parametrize("at", [2, K, 17, 18, 19, 40, 59])
def test_a_stopped_run_ends_bit_for_bit_the_same(at: int) -> None:
    whole, first = Run().go(TOTAL), Run().go(at)
    saved = copy.deepcopy([first.model.state_dict(), first.optimizer.state_dict(), first.sparse.state_dict()])
    rest = Run()
    rest.model.load_state_dict(saved[0])
    rest.optimizer.load_state_dict(saved[1])
    rest.sparse.load_state_dict(saved[2])
    rest.go(TOTAL - at)
    for name, value in whole.state().items():
        assert torch.equal(value, rest.state()[name]), name
    assert rest.sparse.events == whole.sparse.events


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.Rprop, torch.optim.NAdam])
def test_every_training_starts_with_a_fresh_optimizer(optimizer: type[torch.optim.Optimizer]) -> None:
    """From one mask and w_0 on, a second optimizer that was just made takes the same steps."""
    model = mlp()
    mine = optimizer(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    sparse = rarefy.sparsify(model, "lottery-ticket", optimizer=mine, total_steps=20, rounds=1, sparsity=0.5)
    for step in range(10):
        backward(model, step)
        mine.step()
        mine.zero_grad()
    assert sparse.sparsity == pytest.approx(0.5, abs=2e-3)
    twin = copy.deepcopy(model)
    masks, fresh = sparse.masks(), optimizer(twin.parameters(), lr=0.01)  # type: ignore[call-arg]
    for step in range(10, 20):
        backward(model, step)
        mine.step()
        mine.zero_grad()
        backward(twin, step)
        for name, mask in masks.items():
            twin.get_parameter(name).grad.mul_(mask)  # type: ignore[union-attr]
        fresh.step()
        fresh.zero_grad()
        for name, mask in masks.items():  # Rprop moves by its sign only where there is a gradient
            twin.get_parameter(name).data.mul_(mask)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_compressed_storage_gives_the_masked_run() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        runs = [Run(storage=storage, allocation="uniform") for storage in ("masked", "compressed")]
        for name in runs[0].sparse.layers:
            assert torch.equal(runs[0].sparse.layers[name].weight(), runs[1].sparse.layers[name].weight())
        x, y = batch(0)
        for run in runs:
            for step in range(TOTAL):
                at, steps = run.sparse.method.lr_step(step, TOTAL)
                run.optimizer.param_groups[0]["lr"] = 0.1 * (1 - at / steps)
                nn.functional.cross_entropy(run.model(x.double()), y).backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
        for name, mask in runs[0].sparse.masks().items():
            assert torch.equal(mask, runs[1].sparse.masks()[name])
            torch.testing.assert_close(
                runs[0].sparse.layers[name].weight(), runs[1].sparse.layers[name].weight(), rtol=1e-9, atol=1e-12
            )
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("total", [7, 20, 61, 100, 1234])
@pytest.mark.parametrize("start", [0, 3, 0.0, 0.1, 0.5])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_run_is_divided_into_equal_trainings(total: int, start: int | float, rounds: int) -> None:
    method = LotteryTicket(rounds=rounds, rewind_to=start)
    if total == 7 and start == 3 and rounds == 3:  # 7 + 9 = 4 * 4: three trainings of one step
        assert method.division(total) == (3, 4, 3)
    plan = method.division(total)
    used = plan.length + rounds * (plan.length - plan.start)
    assert used <= total
    longer = plan.length + 1
    begin = start if isinstance(start, int) else math.floor(start * longer + 0.5)
    assert longer + rounds * (longer - begin) > total, "a longer training would have fitted"
    seen = [plan.where(step) for step in range(total)]
    for round in range(rounds + 1):
        assert [done for r, done in seen if r == round] == [*range(0 if round == 0 else plan.start, plan.length)]
    places = [method.lr_step(step, total) for step in range(total + 1)]
    assert all(0 <= at < steps == plan.length for at, steps in places)
    assert places[used:] == [(plan.length - 1, plan.length)] * (total + 1 - used)


def test_the_default_rounds_prune_no_more_than_a_fifth_at_a_time() -> None:
    for sparsity in (0.1, 0.2, 0.36, 0.5, 0.9, 0.99):
        method = LotteryTicket(sparsity=sparsity)
        kept = [1 - method.level(r) for r in range(method.prunings + 1)]
        assert kept[0] == 1 and kept[-1] == pytest.approx(1 - sparsity)
        ratios = [b / a for a, b in pairwise(kept)]
        assert min(ratios) >= 0.8 - 1e-9 and max(ratios) - min(ratios) < 1e-9
        assert method.prunings == 1 or (1 - sparsity) ** (1 / (method.prunings - 1)) < 0.8
    assert LotteryTicket(sparsity=0.36).prunings == 2


def test_nothing_to_prune_is_training_again_from_the_same_weights() -> None:
    run = Run(sparsity=0.0, rounds=1, rewind_to=0, total=10).go(5)
    assert all(mask.all() for mask in run.sparse.masks().values())
    assert all(torch.equal(value, mlp().state_dict()[name]) for name, value in run.state().items())
    assert LotteryTicket(sparsity=0.0).prunings == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rewind": "weight"}, "rewind='weight' must be one of"),
        ({"ticket": "loser"}, "ticket='loser' must be one of"),
        ({"ticket": "reinit", "rewind": "none"}, "needs rewind='weights'"),
        ({"rounds": 0}, "rounds=0"),
        ({"rewind_to": 1.0}, "rewind_to"),
        ({"rewind_to": 60}, "too few for 4 trainings"),
        ({"total": None}, "pass total_steps"),
    ],
)
def test_what_cannot_be_done_is_refused_and_the_model_left_alone(options: dict[str, Any], said: str) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    total = options.pop("total", TOTAL)
    with pytest.raises(OptionError, match=said):
        rarefy.sparsify(model, "lottery-ticket", total_steps=total, **{"rounds": ROUNDS, **options})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_snapshot_of_another_network_is_refused_before_anything_changes() -> None:
    from rarefy.engine.rewinding import rewind, snapshot

    run = Run()
    taken, before = snapshot(run.sparse), run.state()
    for wrong in ({**taken, "odd": torch.zeros(1)}, {**taken, "0.bias": torch.zeros(3)}):
        with pytest.raises(StateError, match=r"odd|0\.bias \[16\]"):
            rewind(run.sparse, wrong)
    assert all(torch.equal(before[k], v) for k, v in run.state().items())


def test_rarefy_train_replays_the_schedule_and_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json
    import os
    import signal

    from rarefy.training import task
    from rarefy.training.config import RunConfig
    from rarefy.training.loop import train
    from rarefy.training.signals import Interrupted

    keys: dict[str, Any] = {
        "data": "digits", "limit_train": 300, "limit_test": 100, "method": "lottery-ticket", "sparsity": 0.8, "steps": 24,
        "method_options": {"rounds": 2, "rewind_to": 3}, "threads": 1, "device": "cpu", "lr_schedule": {"name": "cosine"},
    }  # fmt: skip
    config = RunConfig.model_validate(keys)
    result = train(config, tmp_path / "whole")
    assert result["sparsity"] == pytest.approx(0.8, abs=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates[10:17] == rates[3:10] == rates[17:24]  # T = (24 + 2 * 3) / 3 = 10

    original = task.Watch.on_train_batch_end

    def hook(self: task.Watch, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 13 and self._step < 13:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, trainer, *rest)

    monkeypatch.setattr(task.Watch, "on_train_batch_end", hook)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "stopped")
    again = train(config, tmp_path / "stopped", resume=True)
    assert again["accuracy"] == result["accuracy"] and again["loss"] == result["loss"]
    ends = [
        torch.load(tmp_path / name / "checkpoint.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "stopped")
    ]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
