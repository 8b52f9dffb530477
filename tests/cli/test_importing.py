"""Imports without the collector."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from tunesmith.cli.importing import importing

FROZEN = """
import gc
from tunesmith.cli.importing import importing
with importing():
    assert not gc.isenabled()
    made = [[] for _ in range(1000)]
assert gc.isenabled() and gc.get_freeze_count() > 1000
assert not any(found is made for found in gc.get_objects())
"""


def test_the_collector_forgets_what_imports_made() -> None:
    """In a process of its own: what is frozen here would stay so for the tests after it."""
    done = subprocess.run([sys.executable, "-c", FROZEN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_runs_afterwards_if_it_ran_before(was_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "freeze", lambda: None)
    try:
        if not was_on:
            gc.disable()
        with pytest.raises(ImportError), importing():
            raise ImportError("no such module")
        assert gc.isenabled() is was_on
    finally:
        gc.enable()
