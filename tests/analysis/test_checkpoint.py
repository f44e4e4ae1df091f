"""`inspect_checkpoint`: every kind of file, and files made to do harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

import rarefy
from rarefy.analysis import inspect_checkpoint
from rarefy.analysis.checkpoint import read_masks
from rarefy.errors import DataError, RarefyError, StateError
from rarefy.kernels import pack_mask
from rarefy.training.account import save_masks
from tests.engine.common import mlp


def sparse_net() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(24, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 24)
    )
    rarefy.sparsify(model, "magnitude", sparsity=0.75, allocation="uniform", pattern="fan-in")
    return model


@pytest.mark.parametrize("form", ["safetensors", "rarefy", "torch", "legacy", "lightning"])
def test_every_form_tells_the_same(tmp_path: Path, form: str) -> None:
    model = sparse_net()
    path = tmp_path / "net"
    if form == "safetensors":
        save_file(model.state_dict(), path)
    elif form == "rarefy":
        rarefy.save(model, path)
    elif form == "lightning":
        state = {"net." + name: tensor for name, tensor in model.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state, "optimizer_states": [{"m": torch.ones(9, 9)}]}, path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=form == "torch")
    found = inspect_checkpoint(path)
    assert found.kind == {"legacy": "torch", "lightning": "torch"}.get(form, form)
    prefix = "net." if form == "lightning" else ""
    assert [w.name for w in found.weights] == [f"{prefix}{i}.weight" for i in (0, 3, 5)]
    for weight, name in zip(found.weights, ("0.weight", "3.weight", "5.weight"), strict=True):
        tensor = model.get_parameter(name)
        assert weight.shape == tuple(tensor.shape)
        assert weight.zeros == tensor.numel() - int(tensor.count_nonzero())
        assert weight.pattern == "fan-in" and weight.dtype == "float32"
    assert found.sparsity == pytest.approx(0.75)
    assert found.others == len(model.state_dict()) - 3
    assert "all of these" in str(found) and json.loads(json.dumps(found.to_dict()))["sparsity"] == found.sparsity


def test_other_tools_and_other_tensors(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(40, 20))
    prune.ln_structured(layer[0], "weight", 0.5, n=2, dim=0)
    torch.save({"model": layer.state_dict(), "step": 4}, tmp_path / "pruned.pt")
    (weight,) = inspect_checkpoint(tmp_path / "pruned.pt").weights
    assert (weight.name, weight.pattern, weight.zero_rows) == ("0.weight", "row", 10)

    content = [
        torch.eye(8).to_sparse(),
        {"deep": (torch.zeros(2, 2, dtype=torch.long), torch.ones(4, 4).bfloat16())},
        "text",
    ]
    torch.save(content, tmp_path / "list.pt")
    found = inspect_checkpoint(tmp_path / "list.pt")
    assert [(w.name, w.zeros) for w in found.weights] == [("0", 56), ("1.deep.1", 0)]
    assert found.others == 1

    eight = torch.rand(64, 64).masked_fill_(torch.rand(64, 64) < 0.5, 0).to(torch.float8_e4m3fn)
    save_file({"w": eight}, tmp_path / "eight")
    assert inspect_checkpoint(tmp_path / "eight").zeros == int((eight.float() == 0).sum())

    masks = {"a": torch.rand(6, 5) < 0.3, "b": torch.rand(3, 4, 2) < 0.5}
    shapes = {n: json.dumps(list(m.shape)) for n, m in masks.items()}
    save_file({n: pack_mask(m) for n, m in masks.items()}, tmp_path / "masks", shapes)
    found = inspect_checkpoint(tmp_path / "masks")
    assert found.kind == "masks"
    assert {w.name: w.zeros for w in found.weights} == {n: int((~m).sum()) for n, m in masks.items()}

    model = nn.Sequential(nn.Linear(30, 10))
    sparse = rarefy.sparsify(model, "static", sparsity=0.8, storage="compressed")
    torch.save(model.state_dict(), tmp_path / "compressed.pt")
    found = inspect_checkpoint(tmp_path / "compressed.pt")
    assert found.weights == () and f"{sparse.nnz} kept weights in 10 rows" in found.notes[0]


class Evil:
    def __init__(self, action: Any) -> None:
        self.action = action

    def __reduce__(self) -> Any:
        return self.action


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for number, action in enumerate(
        [(os.system, (f"touch {mark}",)), (eval, (f"open({str(mark)!r}, 'w')",)), (print, ("x",))]
    ):
        for zipped in (True, False):
            path = tmp_path / f"evil-{number}-{zipped}"
            torch.save({"w": torch.ones(2, 2), "x": Evil(action)}, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(StateError, match=r"Python objects beside tensors"):
                inspect_checkpoint(path)
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Evil((os.system, (f"touch {mark}",)))))
    with pytest.raises(StateError):
        inspect_checkpoint(tmp_path / "raw.pkl")
    torch.save(mlp(), tmp_path / "whole.pt")
    with pytest.raises(StateError, match=r"state_dict\(\)"):
        inspect_checkpoint(tmp_path / "whole.pt")
    assert not mark.exists()


def test_small_files_that_claim_much_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(1 << 30, 1 << 12)}, tmp_path / "expanded.pt")
    assert (tmp_path / "expanded.pt").stat().st_size < 5000
    with pytest.raises(StateError, match="limit"):
        inspect_checkpoint(tmp_path / "expanded.pt")
    at, one = torch.zeros(2, 1, dtype=torch.long), torch.ones(1)
    huge = torch.sparse_coo_tensor(at, one, (1 << 20, 1 << 20), check_invariants=True)
    torch.save({"w": huge}, tmp_path / "coo.pt")
    with pytest.raises(StateError, match="limit"):
        inspect_checkpoint(tmp_path / "coo.pt")
    outside = torch.sparse_coo_tensor(at + (1 << 40), one, (8, 8), check_invariants=False)
    torch.save({"w": outside}, tmp_path / "outside.pt")
    with pytest.raises(StateError, match="no sound file"):
        inspect_checkpoint(tmp_path / "outside.pt")
    nested: Any = [torch.ones(2, 2)]
    for _ in range(60):  # 2^60 ways to the one tensor
        nested = [nested, nested]
    torch.save(nested, tmp_path / "laughs.pt")
    assert len(inspect_checkpoint(tmp_path / "laughs.pt").weights) == 1
    loop: dict[str, Any] = {"w": torch.ones(2, 2)}
    loop["self"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    assert [w.name for w in inspect_checkpoint(tmp_path / "loop.pt").weights] == ["w"]
    torch.save({"w": torch.zeros(1 << 20, 2)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for entry in source.infolist():
            out.writestr(entry.filename, source.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 20_000
    with pytest.raises(StateError, match="compressed entries"):
        inspect_checkpoint(tmp_path / "bomb.pt")
    with pytest.raises(StateError, match="limit of 1,000 bytes"):
        inspect_checkpoint(tmp_path / "plain.pt", limit=1000)
    save_file({"w": torch.zeros(100, 100)}, tmp_path / "plain.safetensors")
    with pytest.raises(StateError, match="limit of 1,000 bytes"):
        inspect_checkpoint(tmp_path / "plain.safetensors", limit=1000)


@pytest.mark.parametrize("form", ["torch", "legacy", "safetensors", "rarefy"])
def test_damaged_files_give_one_clear_error_or_read(tmp_path: Path, form: str) -> None:
    model, path = sparse_net(), tmp_path / "net"
    if form == "safetensors":
        save_file(model.state_dict(), path)
    elif form == "rarefy":
        rarefy.save(model, path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=form == "torch")
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    said: list[str] = []
    for i in range(80):
        damaged = bytearray(whole)
        if i % 2:
            del damaged[int(torch.randint(len(whole), (), generator=generator)) :]
        else:
            for at in torch.randint(len(whole), (4,), generator=generator).tolist():
                damaged[at] ^= 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(bytes(damaged))
        try:
            inspect_checkpoint(path)
        except RarefyError as error:
            said.append(str(error))
    assert len(said) >= 30 and all(said)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        inspect_checkpoint(tmp_path / "none")
    with pytest.raises(DataError, match="is a folder"):
        inspect_checkpoint(tmp_path)
    for content in (b"", b"hello", b"{}", bytes(8) + b"x"):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(DataError, match="neither"):
            inspect_checkpoint(tmp_path / "x")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "hello")
    (tmp_path / "x").write_bytes(buffer.getvalue())
    with pytest.raises(StateError, match=r"no sound file of torch\.save"):
        inspect_checkpoint(tmp_path / "x")


def test_a_header_length_that_looks_like_a_zip_or_a_pickle(tmp_path: Path) -> None:
    for first in (b"PK", b"\x80\x02"):
        length = int.from_bytes(first + bytes(6), "little")
        header = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
        (tmp_path / "x").write_bytes(first + bytes(6) + header.ljust(length) + bytes(16))
        assert inspect_checkpoint(tmp_path / "x").zeros == 4


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    save_file({"\x1b[31mred\n": torch.ones(2, 2)}, tmp_path / "x")
    assert "\x1b" not in str(inspect_checkpoint(tmp_path / "x"))


def test_the_masks_of_a_run_without_masks_are_read(tmp_path: Path) -> None:
    """safetensors writes a broken header for no tensors with empty metadata: the runs of `stable-rps` had such a file."""
    file = tmp_path / "masks.safetensors"
    save_masks(file, {})
    found = inspect_checkpoint(file)
    assert found.kind == "masks" and found.weights == () and "masks" in str(found)
    assert read_masks(file) == {}
    save_file({}, tmp_path / "empty.safetensors")
    assert inspect_checkpoint(tmp_path / "empty.safetensors").kind == "safetensors"
