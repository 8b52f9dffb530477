from __future__ import annotations

from collections.abc import Iterator

import pytest

from serve.running import Running, running


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """One server for the tests of a file that only ask."""
    with running() as it:
        yield it


@pytest.fixture
def server(shared: Running) -> Running:
    shared.wait_until_idle()
    shared.answered.clear()
    shared.engine.asks.clear()
    return shared
