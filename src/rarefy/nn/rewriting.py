"""Which layers of a model may be replaced by others: exactly PyTorch's own, with a dense weight that nobody else reads."""

from __future__ import annotations

from collections.abc import Collection

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
