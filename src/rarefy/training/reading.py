"""Read run configurations from YAML, flags and packaged recipes, with errors that name the key and the mend."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rarefy.errors import ConfigError, nearest

P = TypeVar("P", bound=BaseModel)


NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number, 2:8 as a text, and refuses a key that is given twice."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        return self.DEFAULT_SCALAR_TAG if tag in NUMBERS and ":" in value else tag  # YAML 1.1: 128, in base 60


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        try:
            twice = key in seen
        except TypeError:
            continue
        if twice:
            raise ConfigError(f"key {key!r} is given twice in {_where(node)}: keep one of them")
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _where(node: yaml.Node) -> str:
    mark = node.start_mark
    return f"{Path(mark.name).name}, line {mark.line + 1}"


def parse_yaml(text: str, name: str) -> Any:
    """Return the plain data of a YAML text; `name` is how errors call it."""
    try:
        loader = _Loader(text)
        loader.name = name
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{name} is not valid YAML{place}: {problem}") from error


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error}") from error
    data = parse_yaml(text, path.name)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path.name} holds a {type(data).__name__}: expected keys with values, such as 'method: rigl'"
        )
    return {str(key): value for key, value in data.items()}


def recipes() -> dict[str, str]:
    """Return the names of the packaged recipes and their YAML text."""
    folder = resources.files("rarefy.training") / "recipes"
    found = (entry for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {e.name.removesuffix(".yaml"): e.read_text(encoding="utf-8") for e in sorted(found, key=lambda e: e.name)}


def read_recipe(name: str) -> dict[str, Any]:
    """Return the mapping of a packaged recipe."""
    known = recipes()
    if name not in known:
        raise ConfigError(f"there is no recipe {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return dict(parse_yaml(known[name], f"recipe {name}"))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid on top; mappings are merged key by key, everything else replaced.

    An optimizer of another name replaces the one of `base` whole: options belong to the class that they were written for.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and not (key == "optimizer" and _renamed(old, value))
        ):
            value = merge(old, value)
        merged[key] = value
    return merged


def _renamed(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    names = [str(options["name"]).lower() for options in (old, new) if "name" in options]
    return len(set(names)) == 2


def assignments(given: Iterable[str]) -> dict[str, Any]:
    """Turn ["optimizer.lr=0.1", "seed=3"] into nested mappings; values are read as YAML."""
    result: dict[str, Any] = {}
    for item in given:
        path, equals, text = item.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(
                f"cannot read --set {item!r}: write key=value or key.sub=value, such as optimizer.lr=0.05"
            )
        nested: Any = parse_yaml(text, f"--set {path.strip()}")
        for key in reversed(keys):
            nested = {key: nested}
        result = merge(result, nested)
    return result


def validate(model: type[P], data: Mapping[str, Any], source: str) -> P:
    """Return `data` as a validated `model`, or raise one ConfigError that lists every fault.

    `source` is the file or the flags that the values came from; it is named in each message.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(model, fault, source) for fault in error.errors())) from error


def _explain(model: type[BaseModel], fault: Any, source: str) -> str:
    where = [str(part) for part in fault["loc"]]
    key = ".".join(where)
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key!r} in {source}{_suggest(model, where)}"
    said = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{source}: {key + ': ' if key else ''}{said}"
    if fault["type"] == "missing":
        return f"{source} lacks the key {key!r}"
    given = fault.get("input")
    hint = ""
    if fault["type"] == "literal_error" and isinstance(given, str):
        hint = nearest(given, re.findall(r"'([^']+)'", str(fault["ctx"].get("expected", ""))))
    return f"bad value for {key!r} in {source}: {given!r} ({said[:1].lower() + said[1:]}){hint}"


def _suggest(model: type[BaseModel], where: list[str]) -> str:
    """Return the nearest right key on the same level, or the same key where it exists on another one."""
    level: type[BaseModel] | None = model
    for part in where[:-1]:
        level = _part(level.model_fields[part].annotation) if level and part in level.model_fields else level
    known = list(level.model_fields) if level else []
    word = where[-1]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    for name, info in model.model_fields.items():
        sub = _part(info.annotation)
        if sub is not None and word in sub.model_fields:
            return f" (did you mean '{name}.{word}'?)"
    if word in model.model_fields:
        return f" ({word!r} belongs to the top level)"
    return nearest(word, known) or f"; known keys: {', '.join(known)}"


def _part(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, dict, typing.Annotated):
        for arg in typing.get_args(annotation):
            if found := _part(arg):
                return found
    return None
