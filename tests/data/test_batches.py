"""Loaders: exact order, exact resume, every sample once."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy import data
from rarefy.data import Batches, DataBundle, TextBatches, crop_flip, eval_batches, train_batches
from rarefy.errors import OptionError, StateError

X = torch.arange(50 * 3 * 4 * 4).view(50, 3, 4, 4).remainder(256).to(torch.uint8)
Y = torch.arange(50)


def labels(loader: Batches | TextBatches) -> list[int]:
    return [int(v) for _, y in loader for v in y]


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(p, q) for u, v in zip(a, b, strict=True) for p, q in zip(u, v, strict=True)
    )


@given(n=st.integers(1, 40), size=st.integers(1, 45), seed=st.integers(0, 2**40), drop=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_sample_once_per_epoch(n: int, size: int, seed: int, drop: bool) -> None:
    if drop and size > n:
        with pytest.raises(OptionError, match="make no batch"):
            Batches(X[:n], Y[:n], size, seed, drop_last=True)
        return
    loader = Batches(X[:n], Y[:n], size, seed, drop_last=drop)
    batches = list(loader)
    assert len(batches) == len(loader)
    seen = [int(v) for _, y in batches for v in y]
    assert len(set(seen)) == len(seen) == (n // size * size if drop else n)
    assert all(len(y) == size for _, y in batches[:-1])


def test_shapes_types_and_normalisation() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    x, y = next(iter(Batches(X, Y, 7, shuffle=False, mean=mean, std=std)))
    want = (X[:7].double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.shape == (7, 3, 4, 4)
    assert torch.allclose(x.double(), want, atol=1e-6)
    assert torch.allclose(next(iter(Batches(X, Y, 7, shuffle=False)))[0], X[:7] / 255)
    floats = X.float()
    for shuffle in (False, True):  # changing a batch in place must not change the data
        for x, y in Batches(floats, Y, 7, shuffle=shuffle):
            x.zero_()
            y.zero_()
    assert torch.equal(floats, X.float())
    assert Y.tolist() == list(range(50))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    a, b, other = Batches(X, Y, 7, 1), Batches(X, Y, 16, 1), Batches(X, Y, 7, 2)
    first = labels(a)
    assert first == labels(b)
    assert first != labels(other)
    assert first != list(range(50))
    second = labels(a)  # the next pass is the next epoch
    assert second != first
    assert a.epoch == 2
    fresh = Batches(X, Y, 7, 1)
    fresh.set_epoch(1)
    assert labels(fresh) == second
    fresh.set_epoch(0)
    assert labels(fresh) == first
    torch.manual_seed(5)
    one, zero = Batches(X, Y, 7, 1), Batches(X, Y, 7, 0)
    zero.set_epoch(1)
    assert labels(one) == first != labels(zero), "seed 1, epoch 0 is not seed 0, epoch 1"
    assert labels(Batches(X, Y, 7, 3, shuffle=False)) == list(range(50))


def test_peeking_does_not_move_the_position() -> None:
    loader = Batches(X, Y, 7)
    peek = next(iter(loader))
    assert torch.equal(peek[1], next(iter(loader))[1])
    assert len(labels(loader)) == 50


def text_loader(mode: Any = "random") -> TextBatches:
    stream = torch.arange(101).to(torch.uint8)
    return TextBatches(stream[:-1], stream[1:], 3, 8, seed=4, mode=mode)


@pytest.mark.parametrize("make", [lambda: Batches(X, Y, 7, 1, augment="crop-flip"), text_loader])
@pytest.mark.parametrize("stop", [1, 3, 4, 8, 11])
def test_resume_in_mid_epoch_equals_uninterrupted(make: Any, stop: int) -> None:
    def endless(loader: Any) -> Any:
        while True:
            yield from loader

    whole = list(itertools.islice(endless(make()), 20))
    first = make()
    head = list(itertools.islice(endless(first), stop))
    state = first.state_dict()
    second = make()
    second.load_state_dict(state)
    assert second.state_dict() == state
    second.set_epoch(state["epoch"])  # what a training loop does: keeps the position
    tail = list(itertools.islice(endless(second), 20 - stop))
    assert same(head + tail, whole)


def test_states_that_do_not_fit() -> None:
    loader = Batches(X, Y, 7, 1)
    state = loader.state_dict()
    bad: list[dict[str, Any]] = [
        {**state, k: v} for k, v in (("seed", 2), ("batch_size", 8), ("batch", 8), ("epoch", -1))
    ]
    bad += [{**state, "batch": True}, {}, {**state, "more": 1}, Batches(X[:9], Y[:9], 7, 1).state_dict()]
    for other in bad:
        with pytest.raises(StateError):
            loader.load_state_dict(other)
    assert loader.state_dict() == state


def test_options_that_do_not_fit() -> None:
    for make in (
        lambda: Batches(X, Y[:-1], 4),
        lambda: Batches(X, Y, 0),
        lambda: Batches(X[:0], Y[:0], 4),
        lambda: Batches(X, Y, 4, augment="crop"),
        lambda: Batches(X, Y, 4, mean=(0.1, 0.2)),
        lambda: Batches(X, Y, 4, std=(0.0,)),
        lambda: Batches(X, Y, 4).set_epoch(-1),
    ):
        with pytest.raises(OptionError):
            make()
    with pytest.raises(OptionError, match="did you mean 'crop-flip'"):
        Batches(X, Y, 4, augment="crop_flip")


def test_crop_flip_against_the_plain_truth() -> None:
    x = torch.randint(1, 256, (64, 3, 9, 7), dtype=torch.uint8)
    out = crop_flip(x, torch.Generator().manual_seed(0), pad=2)
    again = crop_flip(x, torch.Generator().manual_seed(0), pad=2)
    assert torch.equal(out, again)
    assert out.dtype == x.dtype
    assert out.shape == x.shape
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    seen = set()
    for i in range(64):
        found = [
            (dy, dx, flip)
            for dy, dx, flip in itertools.product(range(5), range(5), (False, True))
            if torch.equal(out[i].flip(-1) if flip else out[i], padded[i, :, dy : dy + 9, dx : dx + 7])
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 30
    assert {f for *_, f in seen} == {False, True}
    assert {d for d, *_ in seen} == set(range(5))


def test_augmentation_depends_on_seed_epoch_and_batch_alone() -> None:
    big = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    a, b = (Batches(big, Y[:20], 5, 1, augment="crop-flip") for _ in range(2))
    one, two = list(a), list(a)
    assert same(one, list(b))
    assert not same(one, two)
    assert not torch.equal(one[0][0], Batches(big, Y[:20], 5, 1).__iter__().__next__()[0])
    own = Batches(big, Y[:20], 5, 1, augment=lambda x, g: x.flip(-1), shuffle=False)
    assert torch.allclose(next(iter(own))[0], big[:5].flip(-1) / 255)


def test_crop_flip_is_fast() -> None:
    x = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8)
    g = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    took = []
    for _ in range(30):
        start = time.thread_time()  # of this thread only: other work on the machine does not count
        crop_flip(x, g)
        took.append(time.thread_time() - start)
    torch.set_num_threads(threads)
    assert min(took) < 3e-3, "about 1 ms on one core"


def test_text_windows() -> None:
    loader = text_loader()
    assert len(loader) == 4
    for x, y in loader:
        assert x.shape == y.shape == (3, 8)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(y, x + 1)
        assert torch.equal(x, x[:, :1] + torch.arange(8))
    begins = {int(v) for _ in range(100) for x, _ in loader for v in x[:, 0]}
    assert begins == set(range(93)), "every window may come, the last one too"
    sequential = text_loader("sequential")
    seen = [int(v) for x, _ in sequential for v in x.flatten()]
    assert seen == list(range(96))
    assert len(sequential) == 4
    assert seen == [int(v) for x, _ in sequential for v in x.flatten()]


def test_text_options_that_do_not_fit() -> None:
    s = torch.arange(20).to(torch.uint8)
    for size, length, extra in ((0, 4, {}), (1, 0, {}), (1, 21, {}), (1, 4, {"mode": "rand"}), (1, 4, {"steps": 0})):
        with pytest.raises(OptionError):
            TextBatches(s, s, size, length, **extra)
    with pytest.raises(OptionError, match="same length"):
        TextBatches(s, s[:-1], 1, 4)
    assert len(TextBatches(s, s, 1, 4, steps=9)) == 9


def test_loaders_of_a_bundle() -> None:
    bundle = DataBundle("tiny", "", X, Y, X[:11], Y[:11], ("a",), (0.5,) * 3, (0.5,) * 3, 4, 3, augment="crop-flip")
    assert labels(eval_batches(bundle, 4)) == list(range(11))
    plain = next(iter(train_batches(bundle, 50, augment=None)))
    moved = next(iter(train_batches(bundle, 50)))
    assert torch.equal(plain[1], moved[1])
    assert not torch.equal(plain[0], moved[0])
    assert float(plain[0].min()) >= -1.0
    assert float(plain[0].max()) <= 1.0
    stream = torch.arange(200).to(torch.uint8)
    text = DataBundle("t", "", stream[:-1], stream[1:], stream[:-1], stream[1:], ("x",) * 256, task="text")
    assert next(iter(train_batches(text, 2, length=16)))[0].shape == (2, 16)
    assert next(iter(eval_batches(text, 5, length=16)))[0].shape == (5, 16)


def test_the_public_names() -> None:
    assert data.available() == ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "tinyshakespeare")
    assert all(hasattr(data, name) for name in data.__all__)
