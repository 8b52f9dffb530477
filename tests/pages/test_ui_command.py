"""`tunesmith ui`: its link, its end, and runs that it started, which do not end with it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import fresh
from pages.sites import KEY
from serve.running import wait_for
from tiny_run import chats, model_folder
from tunesmith.runs.folder import Run

BEARER = {"Authorization": f"Bearer {KEY}"}
SETTINGS = {"train.epochs": "2", "threads": "1", "evaluation.general": "false", "evaluation.samples": "0"}


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[fresh.Process, dict[str, Any]]]:
    environment = {**os.environ, "TUNESMITH_API_KEY": KEY, "FRESH_PYTHON": str(fresh.python()), "OMP_NUM_THREADS": "1"}
    words = ("ui", "--port", "0", "--json", "--no-browser", "--offline")
    process = fresh.Process("-m", "tunesmith", *words, cwd=tmp_path, env=environment)
    assert process.stdout is not None
    yield process, json.loads(process.stdout.readline())
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)


def test_its_link_opens_pages_and_it_ends_on_a_signal(started: tuple[fresh.Process, dict[str, Any]]) -> None:
    process, begun = started
    assert begun["kind"] == "pages"
    assert begun["link"].startswith(begun["url"] + "/ui/open?code=")
    with httpx.Client(headers={"Accept": "text/html"}) as browser:
        assert browser.get(begun["url"] + "/ui/").status_code == 401
        assert browser.get(begun["link"]).status_code == 200
        assert "No runs yet" in browser.get(begun["url"] + "/ui/").text
        assert browser.get(begun["url"] + "/", follow_redirects=True).status_code == 200
        assert "Sign in" in httpx.get(begun["link"], headers={"Accept": "text/html"}).text
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_run_that_it_started_goes_on_when_it_is_killed(
    started: tuple[fresh.Process, dict[str, Any]], tmp_path: Path
) -> None:
    process, begun = started
    model = model_folder(tmp_path / "model")
    chats(tmp_path / "rows.jsonl", 60)
    body = {"model": str(model), "data": "rows.jsonl", "settings": SETTINGS}
    name = httpx.post(f"{begun['url']}/v1/runs", json=body, headers=BEARER).json()["name"]
    run = Run(tmp_path / "runs" / name)
    wait_for(lambda: (run.path / "run.json").exists() and run.is_locked(), timeout_s=60)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    wait_for(lambda: run.state() not in ("running", "new"), timeout_s=60)
    assert run.state() == "done", list(run.events())[-1]
