"""Work beside its caller."""

import threading

import pytest

from tunesmith.runs.background import in_background


def test_work_begins_at_once_and_gives_its_result() -> None:
    begun = threading.Event()

    def work() -> int:
        begun.set()
        return 7

    beside = in_background(work)
    assert begun.wait(10), "nobody has asked for the result yet"
    assert beside.result() == 7
    assert beside.result() == 7


def test_what_the_work_raises_reaches_whoever_asks_for_its_result() -> None:
    def work() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        in_background(work).result()
