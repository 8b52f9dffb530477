"""What every test may rely on: one thread, no network, no chatter of transformers."""

import gc
import os
import shutil
import socket
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers.utils import logging
from typer import testing

from tunesmith.evaluation import report
from tunesmith.planning import devices

os.fsync = lambda descriptor: None
"""A run of a second would wait for the disk a third of it. What a power cut loses is seen by tests that count calls."""
WRITE_PAGES, report._write_pages = report._write_pages, lambda *args, **kwargs: None
"""Runs inside tests leave report.json alone: drawing the pages takes longer than training such models."""

for cards in (torch.cuda, torch.xpu):
    if not cards.is_available():  # it would keep its caller's stack, printed, for a card that never comes: at each step
        cards.manual_seed_all = lambda seed: None
devices.BUSY_S = 0.0
"""A run waits a fifth of a second to see what other programs take of the processor: in a thousand runs, minutes."""

testing._get_command = cache(testing._get_command)
"""The commands are made once, not for each that a test calls: typer reads the types of all their options."""

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """Objects of libraries are looked at once, not in each run that frees memory: that would take half of its time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # so that libraries find nothing left over at the end


def draws_pages(request: pytest.FixtureRequest) -> Iterator[None]:
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
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
