"""Optional packages, asked for only where they are used."""

from __future__ import annotations

from rarefy.errors import ConfigError


class MissingPackage(ConfigError, ImportError):
    """An optional package is not installed."""


def missing(package: str, extra: str) -> MissingPackage:
    """Return the error that says how to install an optional package."""
    return MissingPackage(f'this needs the package {package}: pip install "rarefy[{extra}]"')
