"""What goes into and comes out of single layers while a model runs on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.engine.batch_norm import feed
from rarefy.errors import ModelError, OptionError
from rarefy.metrics._run import left_as_it_was
from rarefy.reconstruction.moments import LinearLayer, Moments

_FLOATS = 1 << 27  # in the moments that are gathered in one pass over the data


def uses(model: nn.Module, modules: Iterable[nn.Module], batch: Any) -> dict[nn.Module, int]:
    """Return the modules that one batch calls, with their place in the order of first calls."""
    found: dict[nn.Module, int] = {}

    def called(module: nn.Module, args: Any) -> None:
        found.setdefault(module, len(found))

    with _hooks([module.register_forward_pre_hook(called) for module in dict.fromkeys(modules)]):
        _run(model, [batch])
    return found


def moments_of(
    model: nn.Module, layers: Mapping[str, LinearLayer], batches: Sequence[Any]
) -> Iterator[tuple[str, Moments]]:
    """Yield the moments of each layer: inputs and outputs of all its uses, in as few passes as a gigabyte allows.

    Raises OptionError where a layer meets no sample, or values that are not finite.
    """
    part: dict[str, Moments] = {}
    last = [*layers][-1]
    for name, layer in layers.items():
        part[name] = Moments(layer)
        if name == last or sum(moments.gram.numel() for moments in part.values()) > _FLOATS:
            _gather(model, part.values(), batches)
            for known, moments in part.items():
                shape = list(moments.layer.weight.shape)
                if not moments.count:
                    raise OptionError(f"{known} {shape}: the calibration data hold no sample for it")
                if not moments.finite():
                    raise OptionError(f"{known} {shape}: on the calibration data, its inputs or outputs are not finite")
                yield known, moments
            part = {}


def _gather(model: nn.Module, moments: Iterable[Moments], batches: Sequence[Any]) -> None:
    """Let each layer's moments see every use of it."""
    handles = []
    for mine in moments:

        def before(module: nn.Module, args: Any, kwargs: Any, mine: Moments = mine) -> None:
            mine.see((args[0] if args else kwargs["input"]).detach().clone())  # it may be changed in place meanwhile

        def after(module: nn.Module, args: Any, output: Tensor, mine: Moments = mine) -> None:
            mine.add(output.detach())

        handles += [
            mine.layer.register_forward_pre_hook(before, with_kwargs=True),
            mine.layer.register_forward_hook(after),
        ]
    with _hooks(handles):
        _run(model, batches)


def _run(model: nn.Module, batches: Sequence[Any]) -> None:
    device = next((p.device for p in model.parameters()), None)
    with left_as_it_was(model), torch.no_grad():
        for number, batch in enumerate(batches):
            try:
                feed(model, batch, device)
            except (OptionError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise ModelError(
                    f"{type(model).__name__} does not run on calibration batch {number}: {error}"
                ) from error


@contextmanager
def _hooks(handles: Sequence[Any]) -> Iterator[None]:
    """Remove the hooks after the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
