"""From a name to a reference network."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from rarefy.errors import ModelError, nearest
from rarefy.models.convnet import ConvNet
from rarefy.models.efficientnet import EfficientNetB0
from rarefy.models.lenet import LeNet5, LeNet300
from rarefy.models.mobilenet import MobileNetV1, MobileNetV2
from rarefy.models.resnet import cifar_resnet, imagenet_resnet
from rarefy.models.resnet9 import ResNet9
from rarefy.models.squeezenet import SqueezeNet
from rarefy.models.transformer import GPT, ViT
from rarefy.models.vgg import VGG19
from rarefy.models.wide_resnet import WideResNet

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet-300-100": LeNet300,
    "lenet-5": LeNet5,
    "resnet-9": ResNet9,
    "resnet-8": partial(cifar_resnet, 8),
    "convnet": ConvNet,
    "resnet-20": partial(cifar_resnet, 20),
    "resnet-32": partial(cifar_resnet, 32),
    "resnet-56": partial(cifar_resnet, 56),
    "wrn-22-2": partial(WideResNet, 22, 2),
    "wrn-28-2": partial(WideResNet, 28, 2),
    "vgg-19-bn": VGG19,
    "resnet-18": partial(imagenet_resnet, 18),
    "resnet-50": partial(imagenet_resnet, 50),
    "mobilenet-v1": MobileNetV1,
    "mobilenet-v2": MobileNetV2,
    "efficientnet-b0": EfficientNetB0,
    "squeezenet": SqueezeNet,
    "gpt": GPT,
    "vit": ViT,
}
# Nets that take images of any size down to this one; the others have an option `image_size`, or take no images.
_SMALLEST_IMAGE = {"resnet-9": 8, "vgg-19-bn": 16}


def available() -> tuple[str, ...]:
    """Return the names that `build` knows."""
    return tuple(_MODELS)


def find(name: str) -> str:
    """Return the name that `build` knows for one that is written without its dashes, or in capitals.

    Raises ModelError for an unknown name.

    >>> from rarefy import models
    >>> models.find("ResNet18")
    'resnet-18'
    """
    plain = {known.replace("-", ""): known for known in _MODELS}
    found = name if name in _MODELS else plain.get(name.lower().replace("-", "").replace("_", ""), name)
    options(found)
    return found


def options(name: str) -> dict[str, Any]:
    """Return what `build(name, ...)` accepts beside the width: each option with its default, in order.

    None stands for an image size that the net adapts to by itself. Raises ModelError for an unknown name.
    """
    if name not in _MODELS:
        raise ModelError(
            f"no model is called {name!r}{nearest(str(name), _MODELS)}; known models: {', '.join(_MODELS)}"
        )
    parameters = inspect.signature(_MODELS[name]).parameters.values()
    found = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "width"}
    return {**found, "image_size": None} if "in_channels" in found and "image_size" not in found else found


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _misfit(value: Any, default: object) -> str | None:
    """Return what is expected in place of `value`, told from the option's default, or None where it fits."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "True or False"
    if isinstance(default, float):
        return None if _number(value) and 0 <= value < 1 else "a number in [0, 1)"
    if isinstance(default, str):
        return None  # the model knows its words
    return None if _number(value) and isinstance(value, int) and value >= 1 else "a whole number of at least 1"


def build(
    name: str,
    width: float = 1.0,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    **other: Any,
) -> nn.Module:
    """Build the reference network called `name`, freshly initialised (seed it with torch.manual_seed).

    `width` multiplies every hidden width by max(1, round(units * width)), never inputs, outputs or kernel sizes.
    `num_classes` outputs (for "gpt" the size of the vocabulary), `in_channels` input channels and `image_size` pixels
    of side replace the model's own where given; `other` are options of that model alone (`rarefy.models.options(name)`
    lists them). Raises ModelError for an unknown name or option, and for numbers that the model cannot have.

    >>> from rarefy import models
    >>> models.build("resnet-20", width=0.5, num_classes=100, shortcut="conv").fc
    Linear(in_features=32, out_features=100, bias=True)
    """
    known = options(name)
    if not _number(width) or not math.isfinite(width) or width <= 0:
        raise ModelError(f"width is {width!r}; expected a number above 0 (1 is the full net)")
    common = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    given = {**{key: value for key, value in common.items() if value is not None}, **other}
    for key, value in given.items():
        if key not in known:
            raise ModelError(f"{name} has no option {key!r}{nearest(key, known)}; it has: {', '.join(known)}")
        if (expected := _misfit(value, known[key])) is not None:
            raise ModelError(f"{name}: {key} is {value!r}; expected {expected}")
    if known.get("image_size", 0) is None:
        size, smallest = given.pop("image_size", None), _SMALLEST_IMAGE.get(name, 1)
        if size is not None and size < smallest:
            raise ModelError(f"{name} needs images of at least {smallest}x{smallest}, not {size}x{size}")
    return _MODELS[name](width=float(width), **given)
