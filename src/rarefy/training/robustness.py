"""What else a trained network is worth: does it know what it does not know, and does it stand an attack."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from rarefy.data import Batches
from rarefy.errors import ConfigError
from rarefy.metrics import adversarial_accuracy, fgsm, ood_auroc, pgd, pixel_box
from rarefy.metrics.untouched import evaluating
from rarefy.training.config import RunConfig
from rarefy.training.inputs import EVAL_BATCH, Inputs, bundle_of
from rarefy.training.seeds import derive


class Robustness:
    """The evaluations that a configuration's `evaluate` asks for; made before training, so that what cannot be is said at once.

    Foreign images are normalised as the run's own are, once. Raises ConfigError for text, and for a foreign data set whose
    images have another shape.
    """

    def __init__(self, config: RunConfig, inputs: Inputs, device: torch.device | str = "cpu") -> None:
        self.asked, self.device = config.evaluate, device
        self.own = inputs.bundle
        if (self.asked.ood or self.asked.attacks) and self.own.task != "image":
            raise ConfigError(f"evaluate works on images, and {self.own.name} is {self.own.task}")
        self.foreign = {name: self._unlabelled(self._images(name, config.data_root)) for name in self.asked.ood}
        self.seed = derive(config.seed, "attack")

    def __call__(self, net: nn.Module) -> dict[str, float]:
        """Measure the network, and leave it as it was: ood_auroc_NAME, fgsm_accuracy, pgd_accuracy, in 0..1."""
        if not self.foreign and not self.asked.attacks:
            return {}
        own = self._batches(self.own.test_x, self.own.test_y)
        box = pixel_box(self.asked.eps, self.own.mean, self.own.std, self.device)
        draw = torch.Generator().manual_seed(self.seed)
        attacks = {"fgsm": partial(fgsm, box=box), "pgd": partial(pgd, box=box, steps=self.asked.steps, generator=draw)}
        inside = _logits(net, own)
        if not bool(inside.isfinite().all()):  # as the calibration error of such a network
            names = [f"ood_auroc_{name}" for name in self.foreign] + [f"{name}_accuracy" for name in self.asked.attacks]
            return dict.fromkeys(names, math.nan)
        foreign = {
            f"ood_auroc_{name}": ood_auroc(inside, _logits(net, batches)) for name, batches in self.foreign.items()
        }
        return foreign | {
            f"{name}_accuracy": adversarial_accuracy(net, own, attacks[name]) for name in self.asked.attacks
        }

    def _images(self, name: str, root: str | None) -> Tensor:
        if name == "noise":
            draw = torch.Generator().manual_seed(0)  # the same for every run
            return torch.randint(0, 256, self.own.test_x.shape, generator=draw, dtype=torch.uint8)
        images = bundle_of(name, root).test_x
        if images.shape[1:] != self.own.test_x.shape[1:]:
            raise ConfigError(
                f"evaluate.ood: images of {name} are {list(images.shape[1:])}, those of {self.own.name} "
                f"{list(self.own.test_x.shape[1:])}; use a set of the same shape, or noise"
            )
        return images

    def _unlabelled(self, images: Tensor) -> Batches:
        return self._batches(images, torch.zeros(len(images), dtype=torch.int64))

    def _batches(self, x: Tensor, y: Tensor) -> Batches:
        mean, std = self.own.mean, self.own.std
        return Batches(x, y, EVAL_BATCH, shuffle=False, device=self.device, mean=mean, std=std)


@torch.no_grad()
def _logits(net: nn.Module, batches: Batches) -> Tensor:
    with evaluating(net):
        return torch.cat([net(x).float().cpu() for x, _ in batches])
