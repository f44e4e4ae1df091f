"""SparsityCallback alone, in Lightning code that knows nothing of rarefy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rarefy.errors import OptionError, StateError
from rarefy.training import SparsityCallback


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))
        self.zeros: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.zeros.append(sum(int((p == 0).sum()) for n, p in self.body.named_parameters() if n.endswith("weight")))
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader() -> DataLoader[Any]:
    g = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.randn(48, 20, generator=g), torch.randint(4, (48,), generator=g)), batch_size=8
    )


def fit(callback: SparsityCallback, folder: Path, ckpt: Path | None = None, **options: Any) -> tuple[pl.Trainer, Plain]:
    torch.manual_seed(0)
    module = Plain()
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1)
    options = {"enable_checkpointing": False, "max_epochs": 4, **options}
    trainer = pl.Trainer(callbacks=[callback, *options.pop("more", [])], default_root_dir=folder, **quiet, **options)
    trainer.fit(module, loader(), ckpt_path=ckpt, weights_only=True)
    return trainer, module


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}],
    ids=["closure", "accumulate", "bf16", "clip"],
)
def test_sparse_after_every_step(options: dict[str, Any], tmp_path: Path) -> None:
    callback = SparsityCallback("rigl", sparsity=0.75, every=2)
    trainer, module = fit(callback, tmp_path, **options)
    assert callback.sparse is not None
    dropped = callback.sparse.numel - callback.sparse.nnz
    assert min(module.zeros) >= dropped == round(0.75 * (20 * 32 + 32 * 4))
    assert callback.sparse.step_count == trainer.global_step == callback.sparse.total_steps
    assert sum(event.grown for event in callback.sparse.events) > 0
    kept = callback.sparse.masks()["body.0.weight"]
    assert not module.body[0].weight[~kept].any()
    module.body[0].weight.data.fill_(1.0)  # plain again: nothing puts the zeros back
    torch.optim.SGD(module.parameters(), lr=0.0).step()
    assert bool((module.body[0].weight == 1).all())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rigl", dict(sparsity=0.75, every=2)),
        ("ac-dc", dict(sparsity=0.75, every=2)),
        ("movement", dict(sparsity=0.75)),
        ("sr-ste", dict(pattern="1:4", refine=0.01)),
        ("pgf", dict(pattern="1:4", recipe="sdgf-stepwise")),
        ("bdwp", dict(pattern="1:4")),
        ("t-mask", dict(pattern="1:4t", every=5)),
        ("trainable-threshold", dict(alpha=0.1)),
        ("lottery-jackpots", dict(sparsity=0.75)),
    ],
)
def test_resume_with_lightnings_own_checkpoints(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    def saver(name: str, **when: Any) -> pl.Callback:
        return pl.callbacks.ModelCheckpoint(tmp_path / name, save_top_k=-1, filename="{step}", **when)

    make = lambda: SparsityCallback(method, **options)  # noqa: E731
    whole = make()
    # dropout draws from torch's own generator, which Lightning does not save: leave it out of this comparison
    torch.manual_seed(0)
    original = nn.Dropout.forward
    nn.Dropout.forward = lambda self, x: x  # type: ignore[method-assign]
    try:
        _, a = fit(whole, tmp_path, more=[saver("whole", every_n_epochs=1)], enable_checkpointing=True)
        first = sorted((tmp_path / "whole").glob("*.ckpt"))
        second_epoch = next(p for p in first if p.stem == "step=12")
        again = make()
        _, b = fit(again, tmp_path, ckpt=second_epoch)
    finally:
        nn.Dropout.forward = original  # type: ignore[method-assign]
    assert whole.sparse is not None and again.sparse is not None
    assert whole.sparse.step_count == again.sparse.step_count == 24
    assert all(torch.equal(m, again.sparse.masks()[n]) for n, m in whole.sparse.masks().items())
    assert list(b.state_dict()) == list(Plain().state_dict())
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_part_of_the_module_and_errors(tmp_path: Path) -> None:
    callback = SparsityCallback("static", sparsity=0.5, submodule="body", exclude=["3"], total_steps=6)
    fit(callback, tmp_path, max_epochs=1)
    assert callback.sparse is not None and list(callback.sparse.layers) == ["0.weight"]
    with pytest.raises(OptionError, match="its parts: body"):
        fit(SparsityCallback("static", sparsity=0.5, submodule="bdy"), tmp_path)
    with pytest.raises(OptionError, match="did you mean 'rigl'"):
        fit(SparsityCallback("rigel", sparsity=0.5), tmp_path)


def test_a_dense_checkpoint_is_not_taken_for_a_sparse_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(Plain(), loader())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(StateError, match="without SparsityCallback"):
        fit(SparsityCallback("static", sparsity=0.5), tmp_path, ckpt=tmp_path / "dense.ckpt")
