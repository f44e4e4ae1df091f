"""HFSparsityCallback in the Hugging Face Trainer: offline, a random tiny BERT, a handful of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.errors import StateError

transformers = pytest.importorskip("transformers")
from rarefy.training import HFSparsityCallback  # noqa: E402


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 50, (32, 8), generator=g)
        self.labels = (self.ids[:, 0] > 25).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def trainer(folder: Path, callback: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, max_position_embeddings=16))
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=8,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=4,
        save_steps=4,
        seed=1,
        dataloader_pin_memory=False,
        **options,
    )
    return transformers.Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[callback])


def make() -> Any:
    return HFSparsityCallback("rigl", sparsity=0.8, exclude=["*embeddings*", "classifier*"], every=2)


def masked_weights_are_zero(model: torch.nn.Module, sparse: Any) -> bool:
    weights = dict(model.named_parameters())
    return all(not bool(weights[name][~mask].any()) for name, mask in sparse.masks().items())


def test_trains_sparse_saves_and_resumes(tmp_path: Path) -> None:
    whole = make()
    first = trainer(tmp_path / "a", whole)
    first.train()
    assert whole.sparse.step_count == 8 == whole.sparse.total_steps
    assert whole.sparse.sparsity == pytest.approx(0.8, abs=0.01) and masked_weights_are_zero(first.model, whole.sparse)
    assert any(event.grown for event in whole.sparse.events if event.step)
    assert any("sparsity" in entry for entry in first.state.log_history)
    saved = torch.load(tmp_path / "a/checkpoint-4/sparsifier.pt", weights_only=True)
    assert saved["step"] == 4
    again = make()
    second = trainer(tmp_path / "a", again)
    second.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))
    assert again.sparse.step_count == 8 and masked_weights_are_zero(second.model, again.sparse)
    assert all(torch.equal(mask, again.sparse.masks()[name]) for name, mask in whole.sparse.masks().items())
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    (tmp_path / "a/checkpoint-4/sparsifier.pt").unlink()
    with pytest.raises(StateError, match="no sparsifier"):
        trainer(tmp_path / "a", make()).train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))


def test_gradient_accumulation(tmp_path: Path) -> None:
    callback = make()
    run = trainer(tmp_path, callback, gradient_accumulation_steps=2)
    run.train()
    assert callback.sparse.step_count == 8 and masked_weights_are_zero(run.model, callback.sparse)


@pytest.mark.parametrize(
    ("method", "options", "optim"),
    [
        ("movement", {"sparsity": 0.8}, "adamw_torch"),
        ("movement", {"sparsity": 0.8}, "sgd"),
        ("sr-ste", {"pattern": "1:4", "refine": 0.1}, "adamw_torch"),
        ("pgf", {"pattern": "1:4", "recipe": "sdgf-stepwise"}, "adamw_torch"),
    ],
)
def test_what_is_trained_beside_the_weights_is_resumed_bit_for_bit(
    method: str, options: dict[str, Any], optim: str, tmp_path: Path
) -> None:
    def made() -> Any:
        return HFSparsityCallback(method, exclude=["*embeddings*", "classifier*"], **options)

    callback = made()
    run = trainer(tmp_path, callback, optim=optim)
    names = [name for name, _ in run.model.named_parameters()]
    run.train()
    assert callback.sparse.sparsity == pytest.approx(options.get("sparsity", 0.75), abs=0.01)
    assert masked_weights_are_zero(run.model, callback.sparse)
    assert [name for name, _ in run.model.named_parameters()] == names
    saved = torch.load(tmp_path / "checkpoint-4/optimizer.pt", weights_only=True)
    assert sum(len(group["params"]) for group in saved["param_groups"]) == len(names)
    again = made()
    second = trainer(tmp_path, again, optim=optim)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.sparse.step_count == 8 and again.sparse.events == callback.sparse.events
    assert again.sparse.explored() == callback.sparse.explored()
    for (name, a), b in zip(run.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name
