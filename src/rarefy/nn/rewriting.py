"""Which layers of a model may be replaced by others: exactly PyTorch's own, with a dense weight that nobody else reads."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize


def replaceable(
    model: nn.Module, types: Collection[type[nn.Module]], *, tied: bool = False
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers of exactly these types that can be replaced, and the reason for each that cannot, by name.

    Modules come once, under their first name. `tied`: whether layers whose weight is another module's too may be replaced.
    """
    found: dict[str, nn.Module] = {}
    why: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    read_outside = {
        id(part)
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        for part in (module.linear1, module.linear2)
    }
    for name, module in model.named_modules():
        if not any(isinstance(module, cls) for cls in types):
            continue
        weight = module._parameters.get("weight")
        if type(module) not in types:
            why[name] = f"{type(module).__name__} is not one of PyTorch's own layers"
        elif parametrize.is_parametrized(module) or weight is None:
            why[name] = "its weight is computed"
        elif isinstance(weight, UninitializedParameter):
            why[name] = "its shape is not known yet: run one batch through the model first"
        elif id(module) in read_outside:
            why[name] = "TransformerEncoderLayer reads its weight itself"
        elif len(owners[id(weight)]) > 1 and not tied:
            why[name] = f"its weight is tied ({', '.join(owners[id(weight)])})"
        else:
            found[name] = module
    return found, why


def layer_name(name: str) -> str:
    """Return the layer that a name means, its own ("fc1") or its weight's ("fc1.weight"; "weight": the model is the layer)."""
    return "" if name == "weight" else name.removesuffix(".weight")


def swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put one module in another's place, wherever the model holds it."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Give every module of the model its parameters, buffers, children and attributes back when the block fails."""
    tables = ("_parameters", "_buffers", "_modules")
    before = [
        (module, {key: value.copy() if key in tables else value for key, value in vars(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, state in before:
            vars(module).clear()
            vars(module).update(state)
        raise
