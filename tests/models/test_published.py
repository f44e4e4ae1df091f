"""Published weights load into our networks and reach exactly the accuracy that they were published with."""

from __future__ import annotations

import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy import models
from rarefy.errors import DataError, ModelError
from rarefy.models import published


def test_set(name: str) -> tuple[Tensor, Tensor]:
    """Return all test images [10,000, channels, side, side] as bytes and their labels, or skip visibly."""
    from rarefy import data

    try:
        bundle = data.load(name, download=False)
    except DataError as error:
        pytest.skip(f"{name} is not here: {error}")
    return bundle.test_x, bundle.test_y


test_set.__test__ = False  # type: ignore[attr-defined]


def load(name: str) -> torch.nn.Module:
    folder = os.environ.get("RAREFY_DATA")
    if not folder or not (Path(folder) / models.PUBLISHED[name].file).is_file():
        pytest.skip(f"RAREFY_DATA does not hold {models.PUBLISHED[name].file}")
    return models.load_published(name)


def right(model: torch.nn.Module, x: Tensor, y: Tensor, batch: int = 100) -> int:
    """Count the right answers; the batches are shared out over the cores, which costs less than splitting each one."""

    def count(images: Tensor, labels: Tensor) -> int:
        with torch.inference_mode():
            return int((model(images).argmax(1) == labels).sum())

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return sum(pool.map(count, x.split(batch), y.split(batch)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "correct"), [("resnet-20-cifar10", 9173), ("resnet-56-cifar10", 9339)])
def test_cifar_resnets_reach_their_published_accuracy(name: str, correct: int) -> None:
    model = load(name)
    x, y = test_set("cifar10")
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert len(y) == 10_000
    assert right(model, (x.float() / 255 - mean) / std, y) == correct
    assert correct == round(models.PUBLISHED[name].accuracy * 10_000)


@pytest.mark.parametrize(
    ("name", "wrong", "kept"),
    [
        ("lenet-300-100-mnist", 228, 266_610),
        ("lenet-300-100-mnist-pruned", 199, 4_988),
        ("lenet-5-mnist", 91, 431_080),
        ("lenet-5-mnist-pruned", 91, 3_993),
    ],
)
def test_lenets_of_dynamic_network_surgery(name: str, wrong: int, kept: int) -> None:
    model = load(name)
    assert sum(int(p.count_nonzero()) for p in model.parameters()) == kept
    x, y = test_set("mnist")
    assert len(y) == 10_000
    assert 10_000 - right(model, x.float().reshape(-1, 1, 28, 28) / 256, y, 1000) == wrong
    assert 10_000 - wrong == round(models.PUBLISHED[name].accuracy * 10_000)


def test_squeezenet_of_deep_compression() -> None:
    model = load("squeezenet-imagenet-pruned")
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    assert sum(w.numel() for w in weights) == 1_244_448
    assert sum(int(w.count_nonzero()) for w in weights) == 415_921
    image = pytest.importorskip("PIL.Image")
    archive = Path(os.environ["RAREFY_DATA"]) / "imagenet-100" / "images.tar"
    if not archive.is_file():
        pytest.skip("the sample images are not here")
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        images = [image.open(tar.extractfile(name)).convert("RGB").crop((14, 14, 241, 241)) for name in names]
    x = torch.stack([torch.tensor(list(i.tobytes()), dtype=torch.uint8).view(227, 227, 3) for i in images])
    x = x.flip(3).permute(0, 3, 1, 2).float() - torch.tensor([104.0, 117, 123]).view(3, 1, 1)
    labels = torch.tensor([int(name[:3]) for name in names])
    with torch.inference_mode():
        best = torch.cat([model(part) for part in x.split(20)]).topk(5).indices
    assert int((best[:, 0] == labels).sum()) == 71 and int((best == labels[:, None]).sum()) == 89


def test_the_callers_random_numbers_stay() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert not load("lenet-300-100-mnist").training
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data folder and an empty cache."""
    monkeypatch.delenv("RAREFY_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_tampered_file_is_refused_by_name(nowhere: Path) -> None:
    file = nowhere / "resnet20.th"
    file.write_bytes(b"not the weights")
    with pytest.raises(DataError, match=r"resnet20\.th is not the published resnet-20-cifar10: its SHA-256 is"):
        models.load_published("resnet-20-cifar10", file)
    place = nowhere / "rarefy" / models.PUBLISHED["lenet-5-mnist"].file
    place.parent.mkdir(parents=True)
    place.write_bytes(b"")
    with pytest.raises(DataError, match=r"lenet5_original\.npz is not the published"):
        models.load_published("lenet-5-mnist")


def test_missing_files(nowhere: Path) -> None:
    with pytest.raises(DataError, match=r"looked for .*nothing.th.*give path="):
        models.load_published("resnet-20-cifar10", nowhere / "nothing.th")
    with pytest.raises(DataError, match=r"set RAREFY_DATA .*dns-lenet/lenet5_sparse.npz"):
        models.load_published("lenet-5-mnist-pruned")


def test_what_is_missing_is_downloaded_to_the_cache(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def offline(*request: Any) -> Path:
        asked.extend(request)
        raise DataError("cannot download resnet20-12fca82f.th: no connection")

    monkeypatch.setattr(published, "fetch", offline)
    with pytest.raises(DataError, match="no connection"):
        models.load_published("resnet-20-cifar10")
    entry = models.PUBLISHED["resnet-20-cifar10"]
    assert asked == [entry.url, nowhere / "rarefy" / entry.file, entry.sha256]
    assert entry.url is not None and entry.url.endswith("/pretrained_models/resnet20-12fca82f.th")


def test_unknown_names() -> None:
    with pytest.raises(ModelError, match=r"'resnet20-cifar10' \(did you mean 'resnet-20-cifar10'\?\)"):
        models.load_published("resnet20-cifar10")
