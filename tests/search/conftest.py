"""Where members run beside this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rarefy.search import Workers
from rarefy.search.members import has_ray

NEEDS_RAY = pytest.mark.skipif(not has_ray(), reason="Ray is not installed: pip install 'rarefy[ray]'")


@pytest.fixture(params=["processes", pytest.param("ray", marks=NEEDS_RAY)])
def elsewhere(request: pytest.FixtureRequest) -> Iterator[Workers]:
    """The pool, and Ray itself where it is installed, two members at a time."""
    yield Workers(request.param, 2)
    if request.param == "ray":
        import ray

        ray.shutdown()
