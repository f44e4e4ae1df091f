"""PSNR and luma by their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from rarefy.errors import OptionError
from rarefy.metrics import luma, psnr


def test_psnr_by_its_definition() -> None:
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert psnr(x, x) == math.inf
    for error in (0.5, 0.1, 0.003):
        assert psnr(x.double() + error, x.double()) == pytest.approx(-20 * math.log10(error))
    framed = x.clone()
    framed[:, :, 0], framed[:, :, -1], framed[..., 0], framed[..., -1] = 9, 9, 9, 9
    assert psnr(framed, x) < 20 and psnr(framed, x, border=1) == math.inf
    two = torch.cat([x[:1] + 0.1, x[1:2] + 0.01])
    assert psnr(two, x[:2]) == pytest.approx(30, abs=1e-4)  # the mean of the images' 20 and 40 dB


def test_luma_of_known_colours() -> None:
    white, black, green = torch.ones(3, 1, 1), torch.zeros(3, 1, 1), torch.tensor([0.0, 1, 0]).view(3, 1, 1)
    found = [float(luma(c.double())) * 255 for c in (white, black, green)]
    assert found == pytest.approx([235, 16, 144.553])


def test_refusals() -> None:
    x = torch.rand(1, 1, 8, 8)
    for wrong in (lambda: psnr(x, x[0]), lambda: psnr(x, x, border=4), lambda: luma(x)):
        with pytest.raises(OptionError):
            wrong()
