"""Weights that others trained and published, loaded into our networks so that their accuracy can be reproduced."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rarefy._files import fetch, sha256
from rarefy.errors import DataError, ModelError, nearest
from rarefy.models._build import build

_AKAMASTER = (
    "https://raw.githubusercontent.com/akamaster/pytorch_resnet_cifar10/"
    "d5489e8995e81e91ce6b1d69dcc98ad579b0b153/pretrained_models/"
)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@dataclass(frozen=True)
class Published:
    """One published weight file: our `model` (with `options`) that it fits, its place below the data folder, what it reaches.

    `accuracy` is the fraction of `dataset`'s test images that is right with inputs prepared as `inputs` says: where they are
    pixel / 255 normalised per channel, by `mean` and `std`, in the place of the data set's own.
    `url` is None where the source offers another container only (the npz files hold the arrays of caffemodels).
    `rename` turns the file's parameter names into ours.
    """

    model: str
    file: str
    sha256: str
    dataset: str
    accuracy: float
    inputs: str
    source: str
    url: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    rename: Callable[[str], str] = str


def _cifar(depth: int, tag: str, digest: str, accuracy: float) -> Published:
    name = f"resnet{depth}-{tag}.th"
    return Published(
        model=f"resnet-{depth}",
        file=f"weights/cifar10-resnet/{name}",
        sha256=digest,
        dataset="cifar10",
        accuracy=accuracy,
        inputs=f"pixel / 255, then ImageNet's mean {_MEAN} and standard deviation {_STD}",
        mean=_MEAN,
        std=_STD,
        source="akamaster/pytorch_resnet_cifar10 (BSD-2)",
        url=_AKAMASTER + name,
        rename=lambda key: key.removeprefix("module.").replace("linear.", "fc."),
    )


def _surgery(model: str, name: str, digest: str, accuracy: float) -> Published:
    return Published(
        model=model,
        file=f"weights/dns-lenet/{name}.npz",
        sha256=digest,
        dataset="mnist",
        accuracy=accuracy,
        inputs="pixel / 256",
        mean=(0.0,),
        std=(256 / 255,),
        source="yiwenguo/Dynamic-Network-Surgery (BSD-2; Guo et al. 2016, arXiv:1608.04493)",
        rename=lambda key: key.replace("ip", "fc"),
    )


_FIRES = dict(zip(range(2, 10), (3, 4, 5, 7, 8, 9, 10, 12), strict=True))  # Caffe's number -> place in `features`
_PARTS = {"conv1x1_1": "squeeze", "conv1x1_2": "expand1x1", "conv3x3_2": "expand3x3"}


def _squeezenet_name(key: str) -> str:
    """Return our name of a parameter of Caffe's SqueezeNet."""
    layer, _, last = key.rpartition(".")
    if not layer.startswith("fire"):
        return {"conv1": "features.0", "conv_final": "classifier.1"}[layer] + f".{last}"
    fire, _, part = layer.partition("/")
    return f"features.{_FIRES[int(fire.removeprefix('fire'))]}.{_PARTS[part]}.{last}"


PUBLISHED: dict[str, Published] = {
    "resnet-20-cifar10": _cifar(
        20, "12fca82f", "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8", 0.9173
    ),
    "resnet-56-cifar10": _cifar(
        56, "4bfd9763", "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367", 0.9339
    ),
    "lenet-300-100-mnist": _surgery(
        "lenet-300-100",
        "lenet300100_original",
        "46f45b54e6da719b117d0ade0261c733e7435b6a60f2ba2c0df85f42e2ce424f",
        0.9772,
    ),
    "lenet-300-100-mnist-pruned": _surgery(
        "lenet-300-100",
        "lenet300100_sparse",
        "4fa7d6c9d553a09cebbabdc5585a4d8ddff60609e2e72bc5b4cf7529652f06f1",
        0.9801,
    ),
    "lenet-5-mnist": _surgery(
        "lenet-5", "lenet5_original", "55a2706da1c2403b7ebedc47cb363a8dc9f99046879f7ab5f61a10f32a34ed4d", 0.9909
    ),
    "lenet-5-mnist-pruned": _surgery(
        "lenet-5", "lenet5_sparse", "722f95222b8d3edaecadf2ae46d40dd4a25cb73f477d4e97248b6e118d074194", 0.9909
    ),
    "squeezenet-imagenet-pruned": Published(
        model="squeezenet",
        file="weights/squeezenet-deep-compression/decoded.npz",
        sha256="daa6da2dd9beb71bd431e790f956f47af3ad1a5c58a5365d834421d07f1dee09",
        dataset="imagenet-sample-images (1,000 training images, one a class)",
        accuracy=0.624,
        inputs="blue, green, red pixels minus (104, 117, 123), 227 x 227",
        source="songhan/SqueezeNet-Deep-Compression (BSD; Han et al. 2016, arXiv:1510.00149)",
        options={"pad_classifier": True},
        rename=_squeezenet_name,
    ),
}


def _find(name: str, entry: Published, path: str | os.PathLike[str] | None) -> Path:
    """Return the verified weight file: the one given, one in a data folder, or a fresh download."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rarefy"
    folders = [Path(folder).expanduser() for folder in (os.environ.get("RAREFY_DATA"),) if folder] + [cache]
    places = [Path(path)] if path is not None else [folder / entry.file for folder in folders]
    for place in places:
        if place.is_file():
            if (found := sha256(place)) != entry.sha256:
                raise DataError(
                    f"{place} is not the published {name}: its SHA-256 is {found}, expected {entry.sha256}; "
                    f"replace it with the file from {entry.source}"
                )
            return place
    if path is not None or entry.url is None:
        looked = ", ".join(str(place) for place in places)
        raise DataError(
            f"the weights {name} are not there (looked for {looked}); set RAREFY_DATA to a folder that holds "
            f"{entry.file}, or give path=; source: {entry.source}"
        )
    return fetch(entry.url, places[-1], entry.sha256)


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    return state


def published_entry(name: str) -> Published:
    """Return what is known about published weights. Raises ModelError for an unknown name."""
    if name not in PUBLISHED:
        raise ModelError(
            f"no published weights are called {name!r}{nearest(str(name), PUBLISHED)}; known: {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]


def published_normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel, in the place of the data set's own, that published weights expect.

    Raises ModelError for an unknown name, and for weights whose inputs are not images prepared like that.
    """
    entry = published_entry(name)
    if entry.mean is None or entry.std is None:
        raise ModelError(f"{name} expects {entry.inputs}: a data set's images cannot be prepared like this here")
    return entry.mean, entry.std


def load_published(name: str, path: str | os.PathLike[str] | None = None) -> nn.Module:
    """Return the network with the published weights called `name`, in evaluation mode on the CPU.

    The names are the keys of `rarefy.models.PUBLISHED`, whose entries say the accuracy and how inputs are prepared. The
    file is `path`, or lies at its place in the folder named by RAREFY_DATA, or in rarefy's cache; the CIFAR-10 nets are
    downloaded there when missing. It is used only when its SHA-256 is right. Raises ModelError for an unknown name and
    DataError for a file that is missing, cannot be downloaded, or is not the published one.
    """
    entry = published_entry(name)
    state = _read(_find(name, entry, path))
    with torch.random.fork_rng(devices=[]):  # the initial weights are replaced: leave the caller's random numbers alone
        model = build(entry.model, **entry.options)
    model.load_state_dict({entry.rename(key): t for key, t in state.items()})
    return model.eval()
