"""A configuration as the trainings of a search."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch

from rarefy import models
from rarefy.errors import ConfigError, ModelError
from rarefy.search import Member, Training, hold
from rarefy.search.recipe import Recipe
from rarefy.training.config import RunConfig

SMALL: dict[str, Any] = {
    "data": "digits", "limit_train": 250, "limit_test": 50, "epochs": 2, "batch_size": 60, "device": "cpu",
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.0}, "lr_schedule": "cosine",
}  # fmt: skip


def recipe(**keys: Any) -> Recipe:
    return pickle.loads(pickle.dumps(Recipe(RunConfig.model_validate({**SMALL, **keys}))))


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[n]) for n, v in a.state_dict().items())


@pytest.mark.parametrize("at", [1, 4, 5, 7, 9])
def test_a_training_in_two_parts_is_the_training(at: int) -> None:
    """Without momentum the optimizer remembers nothing: data and learning rate alone must go on where they were."""
    job = recipe()
    assert job.steps == 10 and len(job.rates()) == 10 and job.rates()[0] == 0.05
    whole, parts = job.build(3), job.build(3)
    job.fit(whole, None, 7, job.rates())
    job.fit(parts, None, 7, job.rates(), 0, at)
    job.fit(parts, None, 7, job.rates(), at)
    assert equal(whole, parts)
    other = job.build(3)
    job.fit(other, None, 8, job.rates())
    assert not equal(whole, other)


def test_rounds_and_members_get_their_own_rates() -> None:
    job = recipe()
    used: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            used.append(self.param_groups[0]["lr"])

    def watch(call: Any) -> list[float]:
        used.clear()
        model = job.build(0)
        sparse = hold(model, {"fc1.weight": torch.rand(model.fc1.weight.shape) < 0.5})  # type: ignore[union-attr]
        before = torch.optim.SGD
        try:
            torch.optim.SGD = Watched  # type: ignore[misc]
            call(model, sparse)
        finally:
            torch.optim.SGD = before  # type: ignore[misc]
        return list(used)

    rates = job.rates()
    rewound = Training(1, 3, 0.5, 4, None, "weights", 0)
    assert watch(lambda m, s: job.train_round(m, s, rewound)) == rates[4:]
    tuned = Training(1, 3, 0.5, 0, None, "none", 0)
    assert watch(lambda m, s: job.train_round(m, s, tuned)) == [rates[-1]] * 10
    member = Member(1, 0, 0.5, 3, {"schedule": "lrw", "steps": 4, "weight_decay": 0.1})
    assert watch(lambda m, s: job.retrain(m, s, member)) == rates[-4:]
    with pytest.raises(ConfigError, match="cannot be built as asked"):
        watch(lambda m, s: job.retrain(m, s, Member(1, 0, 0.5, 3, {"decay": 1})))


def test_calibration_is_a_fifth_of_the_training_batches_in_order() -> None:
    job = recipe(validation=0.2)
    found, bundle = job.calibration(), job.inputs().bundle
    assert len(found) == 1 and len(found[0]) == 60 and len(bundle.train_x) == 200
    x, y = job.search_set(60)
    assert torch.equal(x, found[0]) and torch.equal(y, bundle.train_y[:60])
    assert 0 <= job.validate(job.build(0)) <= 1
    with pytest.raises(ConfigError, match="nothing is held out"):
        recipe().validate(job.build(0))


def test_batch_norms_are_measured_on_what_the_training_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    job, plain = recipe(augment=True), recipe(augment=False)
    for each in (job, plain):
        bundle = dataclasses.replace(each.inputs().bundle, augment="crop-flip")
        monkeypatch.setattr(each.inputs(), "bundle", bundle)
    (found,), (again,), (bare,) = job.calibration(), job.calibration(), plain.calibration()
    assert torch.equal(found, again) and torch.equal(bare, plain.search_set(60)[0])
    moved = (found != bare).flatten(1).any(dim=1)
    assert found.shape == bare.shape and moved.sum() > 50  # nearly all are flipped or shifted, in the same order
    black = bare.min()
    assert all(
        set(a.unique().tolist()) <= {*b.unique().tolist(), float(black)} for a, b in zip(found, bare, strict=True)
    )


def test_published_weights_get_the_inputs_that_they_were_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = dataclasses.replace(models.PUBLISHED["lenet-300-100-mnist"], mean=(0.5,), std=(0.25,))
    monkeypatch.setitem(models.PUBLISHED, "mine", entry)
    own = recipe(validation=0.2)
    job = pickle.loads(pickle.dumps(dataclasses.replace(own, published="mine")))
    bundle = own.inputs().bundle
    assert (bundle.mean, bundle.std) != ((0.5,), (0.25,)) and bundle.train_x.dtype == torch.uint8
    wanted = (bundle.train_x[:60].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(job.search_set(60)[0], wanted)
    torch.testing.assert_close(job.calibration()[0], wanted)
    inputs = job.inputs()
    assert inputs.val is not None
    own_mean, own_std = (torch.tensor(v).view(1, -1, 1, 1) for v in (bundle.mean, bundle.std))
    for mine, theirs in (
        (inputs.test, own.inputs().test),
        (inputs.val, own.inputs().val),
        (job.batches(3), own.batches(3)),
    ):
        (x, y), (other, labels) = next(iter(mine)), next(iter(theirs))
        assert torch.equal(y, labels)
        torch.testing.assert_close(x * 0.25 + 0.5, other * own_std + own_mean)
    monkeypatch.setitem(models.PUBLISHED, "other", dataclasses.replace(entry, mean=None, std=None))
    with pytest.raises(ModelError, match=r"other expects pixel / 256"):
        dataclasses.replace(own, published="other").inputs()
    with pytest.raises(ModelError, match="no published weights are called 'min'"):
        dataclasses.replace(own, published="min").inputs()
