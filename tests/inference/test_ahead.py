"""Asks made ready: what goes wrong with one is told of it, and of no other."""

from __future__ import annotations

import subprocess
import sys
import threading
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from tunesmith.errors import ModelError
from tunesmith.serve import ahead
from tunesmith.serve.ahead import Ahead
from tunesmith.serve.protocol import Refused

PLAIN = {"json_schema": None}


@pytest.mark.parametrize("error", [ModelError("slow"), RuntimeError("x"), MemoryError(), OverflowError("y")])
def test_a_slip_with_one_ask_ends_no_other(error: Exception) -> None:
    def make(message: Any, *is_wanted: Any) -> Any:
        if message["key"] == 0:
            raise error
        return "made"

    made: SimpleQueue[Any] = SimpleQueue()
    asks = Ahead(make, made.put)
    for key in (0, 1):
        asks.add({"key": key, "ask": PLAIN})
    key, refusal = made.get(timeout=10)
    assert key == 0
    assert isinstance(refusal, Refused)
    assert (refusal.status, refusal.code) == (500, "internal_error")
    try:
        assert made.get(timeout=10) == (1, "made")
    except Empty:
        pytest.fail("the thread has ended")


def test_an_ask_with_a_schema_holds_up_none_without() -> None:
    may_go_on, made = threading.Event(), SimpleQueue[Any]()

    def make(message: Any, *is_wanted: Any) -> Any:
        if message["ask"]["json_schema"] is not None:
            may_go_on.wait(20)
        return "made"

    asks = Ahead(make, made.put)
    asks.add({"key": 0, "ask": {"json_schema": {}}})
    asks.add({"key": 1, "ask": PLAIN})
    try:
        assert made.get(timeout=5) == (1, "made")
    except Empty:
        pytest.fail("it waits for the schema")
    finally:
        may_go_on.set()
    assert made.get(timeout=10) == (0, "made")


def test_what_is_made_is_not_wanted_once_it_is_cancelled() -> None:
    begun, ended = threading.Event(), SimpleQueue[bool]()

    def make(message: Any, is_wanted: Any) -> Any:
        begun.set()
        while is_wanted():
            threading.Event().wait(0.01)
        ended.put(True)
        raise Refused("gone", status=400, code="x")

    asks = Ahead(make, lambda made: ended.put(False))
    asks.add({"key": 0, "ask": {"json_schema": {}}})
    assert begun.wait(10)
    assert asks.cancel(0)
    assert ended.get(timeout=10)
    with pytest.raises(Empty):
        ended.get(timeout=0.1)


def test_the_end_of_a_thread_ends_the_process() -> None:
    code = """
import time
from tunesmith.serve.ahead import Ahead
def told(made):
    raise SystemExit
asks = Ahead(lambda *given: None, told)
asks.add({"key": 0, "ask": {"json_schema": None}})
time.sleep(30)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True)
    assert done.returncode == ahead.FAILED
