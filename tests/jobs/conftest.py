"""Both stores for the same tests, and a server of the routes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs.postgres import cluster, open_store
from tunesmith.jobs.store import Store


@pytest.fixture(params=["sqlite", "postgresql"], scope="module")
def opened(request: pytest.FixtureRequest) -> Callable[..., Store]:
    """Opens the store of a folder: on SQLite, then on PostgreSQL."""
    if request.param == "postgresql":
        cluster()  # or a reason to skip
    return partial(open_store, kind=request.param)


@pytest.fixture
def store(opened: Callable[..., Store], tmp_path: Path) -> Iterator[Store]:
    made = opened(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A `Served`, of all tests of a module."""
    from jobs.served import serving

    with serving(tmp_path_factory.mktemp("served")) as it:
        yield it
