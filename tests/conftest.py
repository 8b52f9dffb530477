"""What every test may rely on: one thread, no network, no chatter of transformers (quiet.py)."""

import gc
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """`pytest -n 2` starts two processes that run tests; itself it only hands them out, and needs no torch."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each new process compiles the package anew
    sys.dont_write_bytecode = False
    is_worker = hasattr(config, "workerinput")
    if is_worker or not getattr(config.option, "numprocesses", None):
        metadata.version = cache(metadata.version)  # before it is imported: a run asks for twenty, from files
        gc.disable()  # importing and collecting make hundreds of thousands of objects, and all of them stay
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if is_worker:  # others start it when a test needs it: a single file may need none
            import fresh

            fresh.fork_now()
        import quiet  # noqa: F401


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """Objects of libraries are looked at once, not in each run that frees memory: that would take half of its time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # pytest looks at all objects twice: seconds, in which nothing is tested
        gc.unfreeze()  # so that libraries find nothing left over at the end


def draws_pages(request: pytest.FixtureRequest) -> Iterator[None]:
    from quiet import WRITE_PAGES
    from tunesmith.evaluation import report

    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("pages") is not None:
            patch.setattr(report, "_write_pages", WRITE_PAGES)
        yield


pages_of_module = pytest.fixture(draws_pages, scope="module", autouse=True)
pages_of_test = pytest.fixture(draws_pages, autouse=True)


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to look up a host or to connect fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail(f"a socket was opened: {args}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        # Without a card, a browser would draw by a card made of software, on all cores.
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()
