"""Both stores for the same tests, and a server of the routes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.postgres import BEFORE_RELEASE, opener
from tunesmith.jobs.store import Store

opened = opener("sqlite", BEFORE_RELEASE)
"""On PostgreSQL each time: the tests of the store, of its states and of rules. The others ask it nothing more."""


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
