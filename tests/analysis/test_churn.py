"""Churn from events and from masks tell the same story, and that of plain sets."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rarefy
from rarefy.analysis import MaskHistory, churn, run_events, run_masks
from rarefy.engine import Event
from rarefy.errors import DataError, OptionError, SelectionError, StateError
from rarefy.metrics import overlap
from tests.engine.common import backward, mlp

fake = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "report" / "fake_runs.py")))


@pytest.mark.parametrize("method", ["set", "rigl", "gradual"])
def test_events_masks_and_sets_agree(method: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, method, sparsity=0.7, optimizer=optimizer, total_steps=20, every=2, seed=3)
    history = MaskHistory()
    history.record(0, sparse.masks())
    kept = [set(torch.cat([m.flatten() for m in sparse.masks().values()]).nonzero().flatten().tolist())]
    for step in range(20):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        history.record(step + 1, sparse.masks())
        kept.append(set(torch.cat([m.flatten() for m in sparse.masks().values()]).nonzero().flatten().tolist()))
    turns = {turn.step: turn for turn in churn(sparse.events)}
    assert turns
    for step in range(1, 21):
        lost, won = kept[step - 1] - kept[step], kept[step] - kept[step - 1]
        turn = turns.get(step)
        assert (turn.dropped, turn.grown) == (len(lost), len(won)) if turn else not lost | won
        if turn:
            assert (turn.before, turn.kept) == (len(kept[step - 1]), len(kept[step]))
            assert turn.churn == len(lost) / len(kept[step - 1]) and turn.flips == len(lost | won)
    ever: set[int] = set()
    for move, now, before in zip(history.moves(), kept[1:], kept, strict=False):
        ever |= before
        grown = now - before
        assert move.flip_rate == len(now ^ before) / sparse.numel
        assert move.sad_previous == len(now ^ before) and move.sad_first == len(now ^ kept[0])
        assert move.sad_last == len(now ^ kept[-1])
        assert move.jaccard_previous == len(now & before) / len(now | before)
        assert move.jaccard_first == len(now & kept[0]) / len(now | kept[0])
        assert move.survivors == len(now & kept[0]) / len(kept[0])
        assert move.returned == (len(grown & ever) / len(grown) if grown else 0.0)
        assert move.explored == len(ever | now) / sparse.numel
    assert history.moves()[-1].explored == sparse.explored()
    assert all(torch.equal(history.masks(20)[name], mask) for name, mask in sparse.masks().items())


def test_one_layer_and_names() -> None:
    log = [Event(0, "a", 5, 0, 5), Event(4, "b", 2, 1, 8), Event(2, "a", 1, 2, 6), Event(4, "a", 3, 0, 3)]
    assert [(t.step, t.before, t.kept) for t in churn(log)] == [(2, 14, 15), (4, 15, 11)]
    assert [(t.step, t.before, t.dropped, t.kept) for t in churn(log, "b")] == [(4, 9, 2, 8)]
    with pytest.raises(SelectionError, match="did you mean"):
        churn([Event(0, "fc1.weight", 1, 0, 2)], "fc2.weight")
    assert churn([]) == []


def test_histories_refuse_what_does_not_fit() -> None:
    history = MaskHistory()
    assert history.moves() == []
    history.record(1, {"w": torch.ones(3).bool()})
    with pytest.raises(OptionError, match="does not come after"):
        history.record(1, {"w": torch.ones(3).bool()})
    with pytest.raises(OptionError, match="other names or shapes"):
        history.record(2, {"w": torch.ones(4).bool()})
    with pytest.raises(OptionError, match="bool"):
        history.record(2, {"w": torch.ones(3)})
    assert len(history) == 1


def test_a_runs_folder_gives_its_events_and_masks(tmp_path: Path) -> None:
    a, b = (fake.run(tmp_path / f"rigl-0.9-s{seed}", "rigl", 0.9, seed) for seed in (0, 1))
    with (a / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "topology", "step": ')
    events = run_events(a)
    lines = [json.loads(line) for line in (a / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert len(events) == sum(line["kind"] == "topology" for line in lines)
    assert churn(events)[-1].kept == sum(mask.sum() for mask in run_masks(a).values())
    report = overlap(run_masks(a), run_masks(b))
    assert report.total.expected_jaccard < report.total.jaccard < 1
    with pytest.raises(DataError, match="cannot be read"):
        run_events(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        run_masks(tmp_path)
    rarefy.save(mlp(), tmp_path / "masks.safetensors")
    with pytest.raises(StateError, match="holds no masks"):
        run_masks(tmp_path)
