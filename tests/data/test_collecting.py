"""Python's collector runs between chunks of rows only, and goes on afterwards as before."""

from __future__ import annotations

import gc
import weakref

import pytest

from tunesmith.data.collecting import collected_between


class _Cycle:
    def __init__(self) -> None:
        self.me = self


def test_cycles_are_collected_when_that_is_asked_for() -> None:
    with collected_between() as collect:
        assert not gc.isenabled()
        cycle = weakref.ref(_Cycle())
        assert cycle() is not None
        collect()
        assert cycle() is None
    assert gc.isenabled()


def test_the_collector_goes_on_whatever_happens() -> None:
    with pytest.raises(KeyboardInterrupt), collected_between():
        raise KeyboardInterrupt
    assert gc.isenabled()


def test_who_turned_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with collected_between():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
