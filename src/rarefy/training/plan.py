"""A comparison: methods x sparsities x seeds over one base configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from rarefy.errors import ConfigError, OptionError, RarefyError, nearest
from rarefy.training.config import Part, Positive, RunConfig, Sparsity, Whole
from rarefy.training.folder import RunFolder
from rarefy.training.reading import merge, validate

LISTED = ("method", "sparsity", "seed", "label", "name", "out")


class Entry(Part):
    """One row of a comparison: a method, under a name of its own where a method comes twice, at patterns of its own."""

    method: str
    label: str | None = None
    patterns: list[str] | None = None

    def shown(self) -> str:
        """Return the name in tables and folders."""
        return self.label or self.method


class CompareConfig(Part):
    """What `rarefy compare` runs: every method at every sparsity with every seed; methods without one once per seed.

    With `patterns`, methods run at every pattern instead, each under a label of its own ("sr-ste 2:4"): at the sparsity that
    the pattern prescribes, or where it prescribes none at every one of `sparsities`. A method in the list may have its own
    patterns; one that has no option `pattern` runs at the sparsities that the common patterns prescribe.

    `base` holds the keys of a run that all share. `base.method_options` go to those methods that have them.
    `overrides` lays keys of a run over the base for one method (or label).
    """

    name: str | None = None
    out: str | None = None
    methods: Annotated[list[Entry], Field(min_length=1)]
    sparsities: list[Sparsity] = Field(default_factory=lambda: [0.9])
    patterns: list[str] | None = None
    seeds: list[Whole] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    base: dict[str, Any] = Field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    jobs: Positive = 1

    @field_validator("methods", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        given = [given] if isinstance(given, str) else given
        return [{"method": e} if isinstance(e, str) else e for e in given] if isinstance(given, list) else given

    @field_validator("seeds", mode="before")
    @classmethod
    def _count_of_seeds(cls, given: Any) -> Any:
        return list(range(given)) if isinstance(given, int) and not isinstance(given, bool) else given

    @field_validator("patterns", mode="before")
    @classmethod
    def _one_pattern(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("sparsities", mode="before")
    @classmethod
    def _one_sparsity(cls, given: Any) -> Any:
        return [given] if isinstance(given, int | float) else given


@dataclass(frozen=True)
class Planned:
    """One run of a comparison and the folder that it belongs in."""

    name: str
    config: RunConfig
    folder: Path
    action: str = "run"  # "run", "resume", "skip"


def expand(config: CompareConfig, folder: str | Path, source: str = "the comparison") -> list[Planned]:
    """Return every run of a comparison, seed by seed, so that early results are already paired.

    Raises ConfigError for unknown methods, keys and options, before anything is run.
    """
    from rarefy import methods

    known = methods.available()
    labels = [entry.shown() for entry in config.methods]
    for entry in config.methods:
        try:
            methods.find(entry.method)
        except OptionError as error:
            raise ConfigError(f"{source}: {error}") from error
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ConfigError(f"{source}: {', '.join(sorted(twice))} is listed twice: give each its own label")
    for label, over in {"base": config.base, **config.overrides}.items():
        if label != "base" and label not in labels:
            raise ConfigError(
                f"{source}: overrides for {label!r}, which is not among the methods{nearest(label, labels)}"
            )
        if wrong := [key for key in over if key in LISTED]:
            raise ConfigError(
                f"{source}: {label} may not hold {', '.join(wrong)}: the comparison's own lists give them"
            )
    shared = dict(config.base.get("method_options") or {})
    for option in shared:
        fields = {field for cls in known.values() for field in _options(cls)}
        if option not in fields:
            raise ConfigError(f"{source}: base.method_options.{option}: no method has it{nearest(option, fields)}")
    runs = []
    for seed in config.seeds:
        for entry in config.methods:
            options = _options(methods.find(entry.method))
            for level in _levels(config, entry, options, source):
                runs.append(_planned(config, entry, options, level, seed, Path(folder), source))
    return runs


@dataclass(frozen=True)
class _Level:
    """Where on a comparison's axis a run stands."""

    sparsity: float | None
    pattern: str | None = None


def _levels(config: CompareConfig, entry: Entry, options: set[str], source: str) -> list[_Level]:
    from rarefy.patterns import parse_pattern

    def prescribed(pattern: str) -> list[float]:
        try:
            fixed = parse_pattern(pattern).fixed_sparsity
        except RarefyError as error:
            raise ConfigError(f"{source} ({entry.shown()}): {error}") from error
        return config.sparsities if fixed is None else [fixed]

    mine = config.patterns if entry.patterns is None else entry.patterns
    if "sparsity" not in options:
        return [_Level(None)]
    if mine is None:
        return [_Level(sparsity) for sparsity in config.sparsities]
    if "pattern" not in options:
        return [_Level(sparsity) for sparsity in dict.fromkeys(s for pattern in mine for s in prescribed(pattern))]
    return [_Level(sparsity, pattern) for pattern in mine for sparsity in prescribed(pattern)]


def _planned(
    config: CompareConfig,
    entry: Entry,
    options: set[str],
    level: _Level,
    seed: int,
    folder: Path,
    source: str,
) -> Planned:
    label, shown = entry.shown(), entry.label
    parts = [label]
    shared = {k: v for k, v in (config.base.get("method_options") or {}).items() if k in options}
    data = merge({**config.base, "method_options": shared}, config.overrides.get(label, {}))
    if level.pattern is not None:
        data = merge(data, {"method_options": {"pattern": level.pattern}})
        shown = f"{label} {level.pattern}"
        parts.append(level.pattern.replace(":", "of"))
    if level.sparsity is not None and (level.pattern is None or len(config.sparsities) > 1):
        parts.append(f"{level.sparsity:g}")
    name = "-".join([*parts, f"s{seed}"])
    data.update(method=entry.method, label=shown, sparsity=level.sparsity, seed=seed, name=name)
    run = validate(RunConfig, data, f"{source} ({label})")
    run.build_method()  # refuse bad options now, not after an hour
    return Planned(name, run, folder / name)


def _options(cls: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def decide(runs: list[Planned], force: bool = False) -> list[Planned]:
    """Return the runs with what to do about each: run, resume or skip.

    A finished run of the same configuration is skipped, an interrupted or killed one resumed, a failed one repeated.
    Raises ConfigError when a folder holds a run of another configuration, unless `force` repeats those.
    """
    decided, changed = [], []
    for run in runs:
        home = RunFolder(run.folder)
        action = "run"
        if home.exists():
            differences = _differences(home, run.config)
            if differences and not force:
                changed.append(f"{run.folder} ({', '.join(differences)})")
            elif not differences:
                status = home.status()
                resumable = status != "failed" and home.checkpoint_file.exists()
                action = "skip" if status == "finished" else "resume" if resumable else "run"
        decided.append(dataclasses.replace(run, action=action))
    if changed:
        shown = "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise ConfigError(
            f"these folders hold runs of another configuration (what changed): {shown}. "
            "Choose another --out, or --force to run them again"
        )
    return decided


def _differences(home: RunFolder, config: RunConfig) -> list[str]:
    try:
        old = home.read_config()
    except ConfigError:
        return ["its config.yaml cannot be read"]
    if old.identity() == config.identity():
        return []
    return [key for key in config.identity_fields() if old.dump().get(key) != config.dump()[key]]


def plain(config: CompareConfig) -> Mapping[str, Any]:
    """Return a comparison as plain data for compare.yaml, methods without a label as bare names."""
    data = config.model_dump(mode="json", exclude={"name", "out", "jobs"}, exclude_none=True)
    data["methods"] = [e["method"] if [*e] == ["method"] else e for e in data["methods"]]
    return data
