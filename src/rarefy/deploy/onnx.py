"""ONNX files for other runtimes; zeros stay exactly zero."""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rarefy import _files
from rarefy.deploy.accelerated import AcceleratedModel, plain_
from rarefy.errors import ModelError, OptionError
from rarefy.nn import unshare_

OPSET = 17


def export_onnx(
    model: nn.Module, example_input: Tensor | Sequence[Tensor], path: str | os.PathLike[str], *, opset: int = OPSET
) -> None:
    """Write a model, in eval mode and with a free batch size, as ONNX; every weight keeps its zeros.

    Weights that are read from a shared array, or that hold kept values only, stand in the file as dense ones.

    The file is written whole or not at all. Needs the extra `rarefy[onnx]`.
    Raises OptionError without it, ModelError where PyTorch cannot export the model.
    """
    if importlib.util.find_spec("onnx") is None:
        raise OptionError("exporting to ONNX needs the onnx package: pip install 'rarefy[onnx]'")
    if isinstance(model, AcceleratedModel):
        model = model.model
    example = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    copied = unshare_(copy.deepcopy(model).cpu().eval())
    plain_(copied)
    names = [f"input_{i}" if len(example) > 1 else "input" for i in range(len(example))]
    free = {name: {0: "batch"} for name in [*names, "output"]}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model.onnx"
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    copied, example, str(made), opset_version=opset, dynamo=False, input_names=names,
                    output_names=["output"], dynamic_axes=free, do_constant_folding=True,
                )  # fmt: skip
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise ModelError(
                f"{type(model).__name__} cannot be exported to ONNX: {type(error).__name__}: {first}"
            ) from error
        with _files.atomic_write(path) as file:
            file.write(made.read_bytes())
