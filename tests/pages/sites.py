"""A site over folders of a test, asked without a network or served in a thread, and run folders in every state."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import fresh
from evaluation.fake_runs import HOSTILE, fake_run
from serve.fake import FakeEngine
from tunesmith.pages.api import make_api
from tunesmith.pages.chat_engine import ChatEngine
from tunesmith.pages.local_files import LocalFiles
from tunesmith.pages.routes import make_pages, refused
from tunesmith.pages.site import Site
from tunesmith.runs.atomic import from_json, to_json
from tunesmith.runs.folder import Run
from tunesmith.serve.app import make_app
from tunesmith.serve.commands import CommandRunner
from tunesmith.serve.http import HttpServer, bind
from tunesmith.serve.middleware import AccessMiddleware, AccessPolicy, ApiKeys, RequestLog
from tunesmith.serve.protocol import EngineOptions
from tunesmith.serve.sessions import Access
from tunesmith.types import Event

KEY = "k-0123456789abcdef-0123456789abcdef"
PORT = 8000
ODD = "<img src=x onerror=alert(5)>&'\" odd"
"""The name of a folder that somebody else made."""
HTML = {"Accept": "text/html,application/xhtml+xml"}
AXE = """() => axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']})
    .then(result => result.violations.map(
        rule => rule.id + ': ' + rule.nodes.map(node => node.html.slice(0, 140)).join(' | ')))"""
"""The faults that axe-core finds on a page into which it was put."""
OWN = {"Origin": f"http://127.0.0.1:{PORT}", "Content-Type": "application/json"}


def site_in(folder: Path, *, port: int = PORT, keys: ApiKeys | None = None) -> Site:
    root = folder / "runs"
    engine = ChatEngine(root, EngineOptions(offline=True, threads=1), lambda note: None)
    access = Access(root / ".ui" / "sessions.json", port, keys)
    return Site(root, LocalFiles(folder, root), access, engine, CommandRunner(), offline=True)


def app_of(site: Site, faults: list[str] | None = None) -> AccessMiddleware:
    def heard(log: RequestLog) -> None:
        if log.fault and faults is not None:
            faults.append(log.fault)

    policy = AccessPolicy(admission=site.access.admit, refused=partial(refused, site))
    return make_app(site.engine, policy, [heard], [make_pages(site), make_api(site)])


def stranger(site: Site) -> TestClient:
    """A client without a session."""
    return TestClient(app_of(site), base_url=f"http://127.0.0.1:{PORT}", headers=HTML)


def entered(site: Site) -> TestClient:
    """A client that opened a link."""
    client = stranger(site)
    assert client.get(site.access.new_link()).status_code == 200
    return client


def answered(client: TestClient, address: str) -> str:
    """The page once what it waits for is there."""
    begun = time.monotonic()
    while True:
        answer = client.get(address)
        assert answer.status_code == 200, answer.text
        if 'class="waiting"' not in answer.text:
            return answer.text
        assert time.monotonic() - begun < 60, answer.text
        time.sleep(0.05)


def assert_no_foreign_element(page: str, path: str) -> None:
    """A page has no element, and no script, that its templates do not have."""
    assert page.isascii() or "\u202e" not in page
    names = Elements(page).names
    own = {"page.js", "curve.js", "chat.js", "drop.js", "uPlot.iife.min.js", "idiomorph.min.js"}
    sources = re.findall(r'<script src="[^"]*/([^/"]+)"', page)
    assert names.count("script") == len(sources)
    assert set(sources) <= own
    assert "img" not in names
    assert "b" not in names or "/result" in path


class Elements(HTMLParser):
    """Names of the elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.names: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def fork_children(patch: pytest.MonkeyPatch) -> None:
    """Children of pages are forked, see `fresh.python`; an engine is started as it is for a person."""
    python = str(fresh.python())
    for place in ("serve.commands", "jobs.launcher"):
        patch.setattr(f"tunesmith.{place}.python_words", lambda module: [python, "-m", module])


def put_states(root: Path) -> None:
    """Runs of which one is done, one failed, one was killed, one is new, and three are damaged in one way each; hostile
    texts wherever a run has text."""
    from tunesmith.evaluation.report import write_report  # which imports torch

    run, given, progress = fake_run(root / "done-0001", "chat", texts=HOSTILE, name=HOSTILE[0])
    report = write_report(run, given | {"notes": list(HOSTILE)}, progress)
    run.append(Event("end", 120, 0.0, {"report": report}))
    export = run.path / "exports" / "merged"
    for folder in (run.path / "adapter", export):
        folder.mkdir(parents=True)
    proof = {"verified": True, "rows": 32, "rows_are": HOSTILE[3], "loaded_by": HOSTILE[0], "notes": [HOSTILE[4]]}
    (export / "verify.json").write_bytes(to_json(proof | {"lines": [[HOSTILE[3], HOSTILE[0], "allowed 0.01"]]}))
    failed, _, _ = fake_run(root / "failed-0002", "classes", labels=[*HOSTILE], texts=HOSTILE)
    failed.append(Event("failed", 120, 0.0, {"code": "OutOfMemoryError", "message": HOSTILE[0] + HOSTILE[4]}))
    fake_run(root / "killed-0003", "chat")
    for name in ("new-0004", "recipe-0005", "log-0006", "lacking-0007", "made-0008", ODD):
        folder = root / name
        folder.mkdir()
        (folder / "run.json").write_text('{"format": 1, "created": 1764000001.0}')
        (folder / "recipe.yaml").write_text(f"model: {json.dumps(HOSTILE[0])}\ntask: chat\n")
    (root / "recipe-0005" / "recipe.yaml").write_text(f"{json.dumps(HOSTILE[3])}: 1\n")
    (root / "log-0006" / "events.jsonl").write_text('{"kind":"start","step":0,"time":0,"values":{}}\n{"kind":<b>\n')
    (root / "lacking-0007" / "events.jsonl").write_text('{"kind":"step","step":1,"time":0,"values":{"loss":1}}\n')
    (root / "made-0008" / "run.json").write_text("[<script>")
    (root / ".begun-0009.output").write_bytes(
        json.dumps({"kind": "error", "code": "DataError", "message": HOSTILE[0], "problems": []}).encode()
    )


def put_done(root: Path, name: str, kind: str, lr: float, moved: range = range(0), **how: Any) -> Run:
    """A run that is done; its answers to the rows `moved` differ from those that its like gives."""
    run, _, _ = fake_run(root / name, kind, **how)
    run.recipe_path.write_text(f"{run.recipe_path.read_text()}optim: {{lr: {lr}}}\n")
    path = run.path / "evaluation" / "after.jsonl"
    rows = [from_json(line) for line in path.read_bytes().splitlines()]
    for number in moved:
        row = rows[number]
        row |= {"predicted": row["label"]} if "label" in row else {"loss": row["loss"] / 2, "correct": 9}
    path.write_bytes(b"".join(to_json({**row, "source": f"{root.parent}/{row['source']}"}) + b"\n" for row in rows))
    answers = [
        {"source": "held.jsonl:1", "prompt": HOSTILE[0], "reference": "r", "answer": f"{HOSTILE[3]} {lr}", "rougeL": lr}
        | dict.fromkeys(("exact_match", "rouge1", "rouge2"), lr)
    ]
    if kind == "chat":
        (run.path / "evaluation" / "answers-after.jsonl").write_bytes(b"".join(to_json(row) + b"\n" for row in answers))
    (run.path / "adapter").mkdir()
    run.append(Event("end", 120, 0.0, {"report": {}}))
    return run


def plan_values(*, needed: int = 0, room: int = 0, **more: Any) -> dict[str, Any]:
    """The values of `tunesmith plan --json`, with a forecast of the bytes that it needs and of the room for them."""
    forecast = {
        "memory": {"total": needed, "parts": {"weights": needed}}, "room": room, "seconds": None,
        "pass": {"step": 1, "rows": 1, "tokens": 2, "targets": 1},
        "disk": {"total": 5, "checkpoints": 3, "rows": 1, "result": 1},
    }  # fmt: skip
    return {
        "model": "m", "task": "chat", "method": "lora", "trained_parameters": 1, "total_parameters": 2, "steps": 2,
        "rows": {"train": 3, "held_out": 1}, "tokens_per_epoch": 5, "steps_per_epoch": 2, "choices": [],
        "warnings": [], "forecast": forecast if needed else None, **more,
    }  # fmt: skip


def load_fake(site: Site, *names: str, state: str = "ready") -> Any:
    """The engine without a model that has loaded these for the run done-0001, or that could not."""
    engine: Any = FakeEngine()
    engine.served = tuple(card for card in engine.served if card.name in names)
    site.engine._engine, site.engine.target = (engine if state == "ready" else None), "done-0001"
    site.engine.error = "the engine ended: <b>no memory</b>" if state == "failed" else ""
    return engine


NAMES = (
    "done-0001", "failed-0002", "killed-0003", "new-0004", "recipe-0005", "log-0006", "lacking-0007", "made-0008", ODD,
)  # fmt: skip


@contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[tuple[Site, str]]:
    """A site and its address, served in a thread until the block ends; port 0: any free one."""
    from serve.running import wait_for

    bound = bind("127.0.0.1", port)
    loop, stop = asyncio.new_event_loop(), threading.Event()
    site = site_in(folder, port=bound.port)
    server = HttpServer(app_of(site), site.engine, grace_s=1, should_stop=stop.is_set)
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([bound.socket])))
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield site, bound.url
    finally:
        stop.set()
        thread.join(timeout=30)
        assert not thread.is_alive(), f"the server did not end: {[str(task) for task in asyncio.all_tasks(loop)]}"
        site.commands.close()
        loop.close()


def run_of(site: Site, name: str) -> Run:
    run = site.runs.find(name)
    assert run is not None
    return run
