"""Both stores for the same tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from jobs.postgres import cluster, open_store
from tunesmith.jobs.store import Store


@pytest.fixture(params=["sqlite", "postgresql"], scope="module")
def opened(request: pytest.FixtureRequest) -> Callable[..., Store]:
    """Opens the store of a folder: on SQLite, then on PostgreSQL."""
    if request.param == "postgresql":
        cluster()  # or a reason to skip
    return partial(open_store, kind=request.param)
