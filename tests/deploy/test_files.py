"""Sparse checkpoints: lossless, small, and safe against every file that is not what it says."""

from __future__ import annotations

import json
import os
import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import rarefy
from rarefy import models
from rarefy.deploy import files
from rarefy.errors import OptionError, RarefyError, StateError


def positive(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with -0.0 as 0.0."""
    return torch.where(tensor == 0, torch.zeros_like(tensor), tensor)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3), sparsity=st.sampled_from([0, 0.3, 0.9, 0.99, 1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.bool]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_every_bit_comes_back(tmp_path_factory, shape, sparsity, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(shape, generator=g) * 10 * (torch.rand(shape, generator=g) >= sparsity)).to(dtype)
    if dtype.is_floating_point:
        special = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), 1e-45]).to(dtype)
        tensor.view(-1)[: min(5, tensor.numel())] = special[: tensor.numel()]
    path = tmp_path_factory.mktemp("f") / "t.safetensors"
    rarefy.save({"a.b": tensor}, path)
    back = rarefy.load(path)["a.b"]
    assert back.dtype == dtype and back.shape == tensor.shape and bits(positive(back)) == bits(positive(tensor))


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_size_is_values_and_indices(tmp_path, sparsity):
    weight = torch.randn(512, 2048) * (torch.rand(512, 2048) >= sparsity)
    path = tmp_path / "w.safetensors"
    rarefy.save({"w": weight}, path)
    nnz = int(weight.count_nonzero())
    index = min(weight.numel() / 8, nnz * 1.12 if sparsity < 0.999 else nnz * 4.5)
    assert os.path.getsize(path) <= 1.05 * (4 * nnz + index) + 400
    assert os.path.getsize(path) < 4 * weight.numel()


def test_models_and_tied_weights(tmp_path):
    torch.manual_seed(0)
    model = models.build("resnet-20")
    for p in model.parameters():
        p.data.mul_(torch.rand_like(p) < 0.2)
    path = tmp_path / "net.safetensors"
    rarefy.save(model, path)
    other = models.build("resnet-20")
    assert rarefy.load(path, other) is other
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    tied[1].weight = tied[0].weight
    rarefy.save(tied, path)
    assert os.path.getsize(path) < 1.3 * 64 * 64 * 4
    back = rarefy.load(path)
    assert torch.equal(back["1.weight"], tied[0].weight)
    fast = rarefy.accelerate(nn.Linear(8, 4), torch.randn(1, 8))
    rarefy.save(fast, path)
    assert set(rarefy.load(path)) == {"weight", "bias"}


def test_plain_safetensors_are_read(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "p.safetensors")
    assert torch.equal(rarefy.load(tmp_path / "p.safetensors")["w"], torch.ones(3))


def test_what_does_not_fit_leaves_the_model(tmp_path):
    path = tmp_path / "a.safetensors"
    rarefy.save(nn.Linear(8, 4), path)
    for other in (nn.Linear(8, 5), nn.Linear(8, 4, bias=False), nn.Linear(8, 4).double()):
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(StateError):
            rarefy.load(path, other)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(FileNotFoundError):
        rarefy.load(tmp_path / "none.safetensors")
    with pytest.raises(OptionError):
        rarefy.save({"a": 3}, path)


def test_a_small_file_that_claims_a_huge_tensor(tmp_path):
    path = tmp_path / "bomb.safetensors"
    rarefy.save({"w": torch.zeros(1 << 20)}, path)
    assert os.path.getsize(path) < 200_000
    with pytest.raises(StateError, match="limit"):
        rarefy.load(path, limit=1 << 20)


def _parts(content: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _joined(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _resigned(tmp_path, header: dict, data: bytes) -> bytes:
    """Sign an edited file as its writer would."""
    from safetensors.torch import load

    try:
        stored = load(_joined(header, data))
        header["__metadata__"]["checksum"] = files._checksum(stored, header["__metadata__"]["rarefy"])
    except Exception:  # not a file that anyone could sign
        pass
    return _joined(header, data)


def test_ten_thousand_hostile_files(tmp_path):
    """Flipped bits, cuts, splices and edited headers, half of them signed anew: refused, or exactly right."""
    g = torch.Generator().manual_seed(0)
    state = {
        "a": torch.randn(10, 30, generator=g) * (torch.rand(10, 30, generator=g) < 0.1),
        "b": torch.randn(10, 30, generator=g) * (torch.rand(10, 30, generator=g) < 0.5),
        "c": torch.randn(7, generator=g),
        "d": torch.zeros(40, 40),
    }
    path = tmp_path / "t.safetensors"
    rarefy.save(state, path)
    content, rng = path.read_bytes(), random.Random(0)
    header, data = _parts(content)
    shapes = {name: t.shape for name, t in state.items()}
    accepted = 0
    for i in range(10_000):
        kind = i % 5
        if kind == 0:  # bits
            mutated = bytearray(content)
            for _ in range(rng.randint(1, 4)):
                mutated[rng.randrange(len(mutated))] ^= 1 << rng.randrange(8)
            mutated = bytes(mutated)
        elif kind == 1:  # cuts and growth
            cut = rng.randrange(len(content))
            mutated = content[:cut] if rng.random() < 0.7 else content + bytes(rng.randrange(1, 50))
        elif kind == 2:  # splices
            a, b = sorted(rng.randrange(len(content)) for _ in range(2))
            mutated = content[:a] + content[b:] if rng.random() < 0.5 else content[:b] + content[a:]
        else:  # an edited header or data, signed by whoever edited it
            edited, body = json.loads(json.dumps(header)), bytearray(data)
            if kind == 3:
                body[rng.randrange(len(body))] = rng.choice([0, 1, 254, 255, rng.randrange(256)])
            else:
                _edit(edited, rng)
            mutated = _resigned(tmp_path, edited, bytes(body))
        path.write_bytes(mutated)
        try:
            found = rarefy.load(path, limit=1 << 24)
        except (RarefyError, OSError):
            continue
        accepted += 1
        if kind in (0, 1, 2):  # not signed anew: nothing may differ
            assert {n: bits(positive(t)) for n, t in found.items()} == {n: bits(positive(t)) for n, t in state.items()}
        elif kind == 3:  # other values or positions are what the file now says, but never another form
            assert {name: t.shape for name, t in found.items()} == shapes
    assert accepted < 4_000


def _edit(header: dict, rng: random.Random) -> None:
    about = json.loads(header["__metadata__"]["rarefy"])
    name = rng.choice(list(about["tensors"]))
    item = about["tensors"][name]
    choice = rng.randrange(8)
    if choice == 0:
        item["kept"] = rng.choice([0, -1, 5, 10**12, 1.5, None])
    elif choice == 1:
        item["shape"] = rng.choice([[], [0], [-3, 7], [10**9, 10**9], [10, "30"], [30, 11], None])
    elif choice == 2:
        item["kind"] = rng.choice(["gaps", "bits", "plain", "other", 3])
    elif choice == 3:
        about["tensors"][name] = {"as": rng.choice(["a", "z", name])}
    elif choice == 4:
        about["format"] = rng.choice([0, 2, "1"])
    elif choice == 5:
        del about["tensors"][name]
    elif choice == 6:
        key = rng.choice([k for k in header if k != "__metadata__"])
        header[key]["data_offsets"] = [rng.randrange(-5, 5000), rng.randrange(-5, 5000)]
    else:
        key = rng.choice([k for k in header if k != "__metadata__"])
        header[key]["dtype"] = rng.choice(["F32", "I64", "U8", "BOOL", "F16", "XX"])
    header["__metadata__"]["rarefy"] = json.dumps(about)
