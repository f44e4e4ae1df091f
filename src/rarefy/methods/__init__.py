"""The methods: one file each (or one for a close family), found by themselves: a new file here is a new method."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from rarefy.engine.method import Method
from rarefy.engine.taxonomy import FAMILIES, Family
from rarefy.errors import OptionError, nearest
from rarefy.patterns import parse_pattern


def _find() -> dict[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Method) and cls.__module__ == module.__name__ and "name" in vars(cls):
                found[cls.name] = cls
    return dict(sorted(found.items(), key=lambda item: item[0]))


_METHODS = _find()
_ALIASES = {alias: name for name, cls in _METHODS.items() for alias in cls.aliases}
globals().update({cls.__name__: cls for cls in _METHODS.values()})

__all__ = ["Method", "available", "by_family", "find", "make", *(cls.__name__ for cls in _METHODS.values())]


def available() -> dict[str, type[Method]]:
    """Return every method's class by its name (and not by its other names: see `find`)."""
    return dict(_METHODS)


def by_family() -> dict[Family, dict[str, type[Method]]]:
    """Return the methods' classes by family and name, in the taxonomy's order; families without a method are left out."""
    groups = {family: {n: cls for n, cls in _METHODS.items() if cls.family == family} for family in FAMILIES}
    return {family: found for family, found in groups.items() if found}


def find(name: str) -> type[Method]:
    """Return the class of a method by its name or one of its other names.

    Raises OptionError for an unknown name, with the nearest right one.

    Example:
        >>> find("dst").name
        'trainable-threshold'
    """
    known = _ALIASES.get(name, name) if isinstance(name, str) else None
    if known not in _METHODS:
        hint = nearest(str(name), [*_METHODS, *_ALIASES])
        raise OptionError(f"There is no method {name!r}{hint}. Methods: {', '.join(_METHODS)}.")
    return _METHODS[known]


def make(name: str, **options: Any) -> Method:
    """Build a method from its name and options.

    Where a pattern prescribes a sparsity (2:4: one half) and none is given, that one is meant.

    Raises OptionError for an unknown name or option, with the nearest right one.
    """
    cls = find(name)
    if "pattern" in options and options.get("sparsity") is None:
        fixed = parse_pattern(options["pattern"]).fixed_sparsity
        options = {**options, "sparsity": fixed} if fixed is not None else options
    if options.get("sparsity", 0) is None:
        options = {key: value for key, value in options.items() if key != "sparsity"}
    return cls.make(**options)


def __getattr__(name: str) -> type[Method]:
    """Tell type checkers and readers that every method's class is an attribute of this module."""
    raise AttributeError(f"rarefy.methods has no {name!r}{nearest(name, [c.__name__ for c in _METHODS.values()])}")
