"""Which weights of a model can be made sparse, and which of them the user wants."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from rarefy.errors import PatternError, SelectionError, nearest
from rarefy.nn import NMLinear, Reparametrisation, SemiStructuredLinear, SharedArray, SparseModule
from rarefy.patterns import Pattern

Selector = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A name glob ("layer1.*", "fc?.weight"), a compiled regular expression, a module type, or a predicate(name, module)."""

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
_LAZY = "the shape of this lazy parameter is not known yet"
_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?")


@dataclass(frozen=True)
class Target:
    """One weight tensor that can be made sparse: where it lives and every name it is known by."""

    name: str  # parameter name, e.g. "fc1.weight"
    module_name: str
    module: nn.Module
    attribute: str
    aliases: tuple[str, ...] = ()  # other names of the same (tied) parameter

    @property
    def parameter(self) -> nn.Parameter:
        """The tensor that is trained: the dense weight (also where another is computed from it), or the kept values alone."""
        if isinstance(self.module, SparseModule):
            parameter = self.module.values
        elif parametrize.is_parametrized(self.module, self.attribute):
            parameter = self.module.parametrizations[self.attribute].original  # type: ignore[index,union-attr]
        else:
            parameter = getattr(self.module, self.attribute)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def inside(self) -> str:
        """What the names of parameters begin with from which another weight is computed in this one's place."""
        return f"{self.module_name}.parametrizations.{self.attribute}.".removeprefix(".")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense weight, whether it exists or not."""
        return self.module.weight_shape if isinstance(self.module, SparseModule) else tuple(self.parameter.shape)


@dataclass(frozen=True)
class LeftOut:
    """A parameter that stays dense, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module under every name it has, without what torch.compile and data parallelism put before names."""
    clean = {"": ""}
    modules = dict(model.named_modules(remove_duplicate=False))
    for raw, module in modules.items():
        if raw:
            parent, _, last = raw.rpartition(".")
            wrapped = _WRAPPERS.get(type(modules[parent]).__name__) == last
            clean[raw] = clean[parent] if wrapped else f"{clean[parent]}.{last}".removeprefix(".")
        yield clean[raw], module


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside what torch.compile and data parallelism put around it."""
    while (attribute := _WRAPPERS.get(type(model).__name__)) is not None:
        model = getattr(model, attribute)
    return model


def weight_attributes(module: nn.Module) -> list[str]:
    """Return the names of a module's own weight matrices that can be made sparse (never biases or norms)."""
    if isinstance(
        module, SparseModule | nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding | nn.EmbeddingBag
    ):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [name for name in names if getattr(module, name) is not None]
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return [name for name, _ in module.named_parameters(recurse=False) if _RECURRENT.fullmatch(name)]
    return []


def list_weights(model: nn.Module) -> tuple[list[Target], list[LeftOut]]:
    """List the weights that could be made sparse, in the model's order, and every other parameter with the reason."""
    found: dict[int, Target] = {}
    left: list[LeftOut] = []
    for module_name, module in named_modules(model):
        # A parametrized weight is computed, not stored: its original is a parameter of another module.
        supported = [a for a in weight_attributes(module) if not parametrize.is_parametrized(module, a)]
        for attribute, parameter in module.named_parameters(recurse=False):
            if isinstance(module, SparseModule) and attribute == "values":
                attribute = "weight"  # one name for a layer in every storage
            name = f"{module_name}.{attribute}" if module_name else attribute
            if id(parameter) in found:
                first = found[id(parameter)]
                found[id(parameter)] = replace(first, aliases=(*first.aliases, name))
                left.append(LeftOut(name, tuple(parameter.shape), f"tied to {first.name}, which stands for both"))
            elif isinstance(parameter, UninitializedParameter):
                left.append(LeftOut(name, (), _LAZY))
            elif attribute in supported:
                found[id(parameter)] = Target(name, module_name, module, attribute)
            else:
                left.append(LeftOut(name, tuple(parameter.shape), _why_not(module, attribute, parameter)))
    return list(found.values()), left


def find_targets(
    model: nn.Module,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
) -> tuple[list[Target], list[LeftOut]]:
    """Find the weights to make sparse, in the model's order, and list every other parameter with the reason.

    Raises SelectionError when a selector matches nothing, when nothing is left, or when a chosen layer cannot be sparse.
    """
    targets, left = list_weights(model)
    lazy = [item.name for item in left if item.reason == _LAZY]
    if lazy:
        raise SelectionError(f"{', '.join(lazy)}: {_LAZY}. Run one batch through the model first.")
    if not targets and (computed := [item.name for item in left if "parametrizations" in item.name]):
        raise SelectionError(
            f"All weights of this model are computed from others ({_shorten(computed, 3)}): call finalize() of the sparsifier "
            "that manages them, or rarefy.nn.bake_(model), first."
        )
    if not targets:
        raise SelectionError(
            "This model holds no weight that can be made sparse: none of its modules is a Linear, Conv1d/2d/3d, Embedding, "
            "MultiheadAttention or RNN."
        )
    targets, not_chosen = _choose(targets, _as_list(include), _as_list(exclude))
    for target in targets:
        if isinstance(target.module, nn.Embedding | nn.EmbeddingBag) and target.module.sparse:
            raise SelectionError(
                f"{target.name} {list(target.shape)}: an embedding with sparse=True has row-sparse gradients, which cannot "
                f"follow a mask. Build it with sparse=False, or exclude={target.module_name!r}."
            )
    return targets, left + not_chosen


def set_aside(targets: Sequence[Target], why: Callable[[Target], str | None]) -> tuple[list[Target], list[LeftOut]]:
    """Part the weights that stay dense, for the reason that `why` gives, from the others.

    Raises SelectionError, with all the reasons, when no other is left.
    """
    left = [LeftOut(t.name, t.shape, reason) for t in targets if (reason := why(t)) is not None]
    if len(left) == len(targets):
        reasons = "; ".join(f"{item.name} {list(item.shape)}: {item.reason}" for item in left)
        raise SelectionError(f"No layer of this model can be made sparse so. {reasons}.")
    names = {item.name for item in left}
    return [t for t in targets if t.name not in names], left


def leave_all(model: nn.Module, method: str, include: object, exclude: object) -> list[LeftOut]:
    """List every parameter of a model that a method makes no zeros in; SelectionError where layers are chosen for it."""
    for which, selectors in (("include", include), ("exclude", exclude)):
        if selectors is not None:
            raise SelectionError(f"{which}={selectors!r}: {method} makes no layer sparse, so there are none to choose.")
    targets, left = list_weights(model)
    return [LeftOut(t.name, t.shape, f"{method} makes no zeros") for t in targets] + left


def check_fit(pattern: Pattern, targets: Sequence[Target]) -> None:
    """Raise one PatternError that names every weight that cannot follow the pattern, and the `exclude` that mends it."""
    problems: dict[str, str] = {}
    for target in targets:
        try:
            pattern.check(target.shape, target.name)
        except PatternError as error:
            problems[target.name] = str(error)
    if problems:
        mend = f" To leave all of these dense: exclude={[*problems]}." if len(problems) < len(targets) else ""
        raise PatternError("\n".join(problems.values()) + mend)


def check_unmasked(targets: Sequence[Target]) -> None:
    """Refuse weights of layers that compute under a mask of their own, which would not be the one that is held."""
    for target in targets:
        if isinstance(target.module, NMLinear | SemiStructuredLinear):
            raise SelectionError(
                f"{target.name} {list(target.shape)}: {type(target.module).__name__} computes with a mask of its own. Call "
                f"sparsify() first and give its masks to n_m_() or semi_structured_() then, or exclude={target.name!r}."
            )


def _choose(
    targets: list[Target], include: list[Selector], exclude: list[Selector]
) -> tuple[list[Target], list[LeftOut]]:
    names = [t.name for t in targets] + [t.module_name for t in targets]
    for which, selectors in (("include", include), ("exclude", exclude)):
        for selector in selectors:
            if not any(_matches(selector, t) for t in targets):
                hint = nearest(selector, names) if isinstance(selector, str) else ""
                raise SelectionError(
                    f"{which}={_spell(selector)} matches no layer that can be made sparse{hint}. "
                    f"They are: {_shorten([t.name for t in targets])}."
                )
    chosen: list[Target] = []
    left: list[LeftOut] = []
    for t in targets:
        hit = next((s for s in exclude if _matches(s, t)), None)
        if hit is not None:
            left.append(LeftOut(t.name, t.shape, f"excluded by {_spell(hit)}"))
        elif include and not any(_matches(s, t) for s in include):
            left.append(LeftOut(t.name, t.shape, "not named by include"))
        else:
            chosen.append(t)
    if not chosen:
        raise SelectionError(f"exclude={[_spell(s) for s in exclude]} leaves no layer to make sparse.")
    return chosen, left


def _matches(selector: Selector, target: Target) -> bool:
    if isinstance(selector, str):
        names = (target.name, target.module_name, *target.aliases, *(a.rpartition(".")[0] for a in target.aliases))
        return any(fnmatch.fnmatchcase(name, selector) for name in names)
    if isinstance(selector, re.Pattern):
        return any(selector.search(name) for name in (target.name, *target.aliases))
    if isinstance(selector, type):
        return isinstance(target.module, selector)
    return bool(selector(target.name, target.module))


def _as_list(selectors: Selector | Sequence[Selector] | None) -> list[Selector]:
    if selectors is None:
        return []
    items: list[Selector] = (
        list(selectors) if isinstance(selectors, Sequence) and not isinstance(selectors, str) else [selectors]
    )
    for item in items:
        if not (isinstance(item, str | re.Pattern | type) or callable(item)):
            raise SelectionError(
                f"{item!r} cannot select layers: give a name glob, a compiled regular expression, a module type "
                "or a predicate(name, module)."
            )
    return items


def _why_not(module: nn.Module, attribute: str, parameter: nn.Parameter) -> str:
    if isinstance(module, _NORMS):
        return "normalisation"
    if isinstance(module, SharedArray):
        return "an array that layers share"
    if isinstance(module, parametrize.ParametrizationList):
        return "computed by a parametrization (torch.nn.utils.parametrize)"
    if isinstance(module, Reparametrisation):
        return "trained beside a computed weight"
    if attribute.startswith("bias") or attribute.endswith("bias") or parameter.ndim < 2:
        return "bias or vector"
    return f"no rule for {attribute!r} of {type(module).__name__}"


def _spell(selector: Selector) -> str:
    if isinstance(selector, re.Pattern):
        return f"re.compile({selector.pattern!r})"
    return selector.__name__ if isinstance(selector, type) else repr(selector)


def _shorten(names: list[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"
