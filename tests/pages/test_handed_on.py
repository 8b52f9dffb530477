"""Exports of a run with their proof, and a run that is served to programs: as parts of its page."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from evaluation.fake_runs import HOSTILE, fake_run
from pages.sites import OWN, Elements, app_of, assert_no_foreign_element, entered, load_fake, run_of, site_in
from serve.running import wait_for
from tunesmith.errors import StorageError
from tunesmith.pages.exports import exports_of
from tunesmith.pages.site import Site
from tunesmith.runs.atomic import to_json
from tunesmith.types import Event

PROOF = {
    "verified": True, "rows": 32, "rows_are": "held-out rows", "loaded_by": f"transformers {HOSTILE[0]}",
    "lines": [["tokens of rows and prompts", "identical", "must be identical"], [HOSTILE[3], "0.0004", "allowed 0.01"]],
}  # fmt: skip
MAKES = """
import json, os, pathlib, sys, time
place = pathlib.Path(sys.argv[2]) / "exports" / "gguf-q8_0"
print("comparing in a new process: 40 %", file=sys.stderr, flush=True)
while not (place.parent / "go").exists():
    time.sleep(0.01)
place.mkdir()
(place / "model.gguf").write_bytes(b"0" * 2048)
(place / "verify.json").write_text({proof!r})
print(json.dumps({{"kind": "export", "words": sys.argv[1:]}}))
"""
REFUSES = "import json; print(json.dumps({'kind': 'error', 'code': 'InputError', 'message': '<b>onnx</b>: lacks'}))"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    run, _, _ = fake_run(tmp_path / "runs" / "done-0001")
    (run.path / "adapter").mkdir()
    run.append(Event("end", 120, 0.0, {"report": {}}))
    run.report_path.write_bytes(to_json({}))
    site = site_in(tmp_path)
    yield site
    site.commands.close()


def export_by(patch: pytest.MonkeyPatch, program: str) -> None:
    patch.setattr("tunesmith.jobs.launcher.python_words", lambda module: [sys.executable, "-IS", "-c", program])


def test_an_export_is_made_with_progress_and_proof(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    export_by(monkeypatch, MAKES.format(proof=json.dumps(PROOF)))
    client, run = entered(site), run_of(site, "done-0001")
    begun = client.post("/v1/runs/done-0001/exports", json={"to": "gguf:q8_0"}, headers=OWN)
    assert begun.json() == {"name": "gguf-q8_0", "state": "making"}
    wait_for(lambda: "40 %" in exports_of(run)[0]["progress"])
    page = client.get("/ui/runs/done-0001").text
    assert "comparing in a new process: 40 %" in page
    assert 'data-live="1"' in page, "it is asked for again until the export is there"
    again = client.post("/v1/runs/done-0001/exports", json={"to": "gguf:q8_0"}, headers=OWN)
    assert again.status_code == 409
    (run.path / "exports" / "go").touch()
    wait_for(lambda: exports_of(run)[0]["state"] == "done")
    [made] = client.get("/v1/runs/done-0001/exports").json()["exports"]
    assert (made["check"]["lines"], made["bytes"] > 2048) == (PROOF["lines"], True)
    page = client.get("/ui/runs/done-0001").text
    text = Elements(page).text
    for what, value, bound in PROOF["lines"]:
        assert what in text
        assert f"{value} ({bound})" in text
    assert f"agrees with the tuned model on 32 held-out rows, by {PROOF['loaded_by']}" in text
    assert_no_foreign_element(page, "/ui/runs/done-0001")
    words = json.loads((run.path / "exports" / ".gguf-q8_0.output").read_text())["words"]
    assert words == ["export", str(run.path), "--to", "gguf", "--quant", "q8_0", "--offline", "--json"]


def test_an_export_that_fails_says_why(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    client, run = entered(site), run_of(site, "done-0001")
    for to, program, words in (("onnx", REFUSES, "<b>onnx</b>: lacks"), ("merged", "1", "ended without a word")):
        export_by(monkeypatch, program)
        assert client.post("/v1/runs/done-0001/exports", json={"to": to}, headers=OWN).status_code == 200
        wait_for(lambda: all(row["state"] == "failed" for row in exports_of(run)))
        page = client.get("/ui/runs/done-0001").text
        assert words in Elements(page).text
        assert_no_foreign_element(page, "/ui/runs/done-0001")
    for to in ("", "--out", "a/b", "gguf:../x"):
        assert client.post("/v1/runs/done-0001/exports", json={"to": to}, headers=OWN).status_code == 400
    for number, text in enumerate(("[1]", "{}", '{"lines": [1, ["a"]], "verified": true}', "{<")):
        folder = run.path / "exports" / f"odd-{number}"
        folder.mkdir()
        (folder / "verify.json").write_text(text)
    for number, text in enumerate(("[1]", '{"kind": "error", "problems": [1]}', '"a"')):
        (run.path / "exports" / f".strange-{number}.output").write_text(text)
    assert client.get("/ui/runs/done-0001").status_code == 200
    fake_run(site.root / "half-0002")
    assert client.post("/v1/runs/half-0002/exports", json={"to": "merged"}, headers=OWN).status_code == 409
    assert 'id="export"' not in client.get("/ui/runs/half-0002").text


# trap: S13
@pytest.mark.parametrize("what", ["lock", "output", "said"])
def test_an_export_writes_through_no_link(site: Site, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    export_by(monkeypatch, "1")
    _assert_nothing_is_written_through(site, what)


def test_files_that_are_opened_through_links_are_noticed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    export_by(monkeypatch, "1")
    monkeypatch.setattr("tunesmith.jobs.launcher._no_link", os.open)
    with pytest.raises(AssertionError):
        _assert_nothing_is_written_through(site, "output")


def _assert_nothing_is_written_through(site: Site, what: str) -> None:
    """A link that whoever packed the run put where an export keeps its files leads to no write elsewhere."""
    precious, folder = site.root / "precious", run_of(site, "done-0001").path / "exports"
    precious.write_text("mine")
    folder.mkdir(exist_ok=True)
    (folder / f".merged.{what}").symlink_to(precious)
    refused = entered(site).post("/v1/runs/done-0001/exports", json={"to": "merged"}, headers=OWN)
    assert (refused.status_code, precious.read_text()) == (507, "mine")


@pytest.mark.parametrize(("name", "route", "body"), [
    ("support", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    ("mood", "/v1/classify", {"input": "Hello"}),
])  # fmt: skip
def test_a_served_run_shows_a_line_that_asks_it(site: Site, name: str, route: str, body: dict[str, Any]) -> None:
    load_fake(site, name)
    client = entered(site)
    page = Elements(client.get("/ui/runs/done-0001").text).text
    line = next(line for line in page.splitlines() if line.startswith("curl "))
    key = client.post("/v1/keys", json={}, headers=OWN).json()["key"]
    words = shlex.split(line.replace("YOUR-KEY", key))
    heads = dict(words[at + 1].split(": ", 1) for at, word in enumerate(words) if word == "-H")
    sent = json.loads(words[words.index("-d") + 1])
    assert (words[1].rpartition(route)[1:], sent) == ((route, ""), {"model": name, **body})
    program = TestClient(app_of(site), base_url="http://127.0.0.1:8000")
    for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {key}"}):
        assert program.post(route, json=sent, headers=wrong).status_code == 401
    if name == "support":
        assert program.post(route, json=sent, headers=heads).status_code == 200, "the key needs no page"
        assert program.get("/v1/models/support", headers=heads).status_code == 200
    for method, path in (("GET", "/v1/runs"), ("POST", "/v1/runs"), ("POST", "/v1/keys"), ("GET", "/ui/")):
        assert program.request(method, path, json={}, headers=heads).status_code == 403, "it asks, and does no more"
    program.cookies.set("tunesmith-8000", key)
    assert program.get("/v1/runs").status_code == 401, "a key is no session"
    (site.root / ".ui" / "sessions.json").unlink()
    assert program.post(route, json=sent, headers=heads).status_code == 401


def test_keys_of_programs_end_one_by_one(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    load_fake(site, "support")
    client, program = entered(site), TestClient(app_of(site), base_url="http://127.0.0.1:8000")
    first, second = (client.post("/v1/keys", json={}, headers=OWN).json()["key"] for _ in range(2))
    page = Elements(client.get("/ui/runs/done-0001").text).text
    names = [key["name"] for key in client.get("/v1/keys").json()["keys"]]
    assert sorted(names) == sorted(key.partition("-")[0] for key in (first, second))
    assert all(f"The key that begins with {name}, made" in page for name in names)
    assert first not in page, "it is shown once"
    acts = OWN | {"X-Tunesmith": "1"}
    assert client.delete(f"/v1/keys/{first.partition('-')[0]}", headers=acts).json()["ended"] is True
    for name in (first.partition("-")[0], "", " ", "%E9"):
        assert client.delete(f"/v1/keys/{name}", headers=acts).status_code in (404, 405)
    asked = [
        program.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode("latin-1")}).status_code
        for key in (first, second, second.partition("-")[0], "é-" + second)
    ]
    assert asked == [401, 200, 401, 401]
    assert client.get("/ui/").status_code == 200, "the session goes on"
    file = site.root / ".ui" / "sessions.json"
    file.write_text(json.dumps({"": 9e9, "key": 9e9, "key a": 9e9, **json.loads(file.read_text())}))
    assert [key["name"] for key in client.get("/v1/keys").json()["keys"]] == [second.partition("-")[0]]

    def full(*words: Any) -> None:
        raise StorageError("No space left on device")

    monkeypatch.setattr("tunesmith.serve.sessions.write_atomic", full)
    refused = client.delete(f"/v1/keys/{second.partition('-')[0]}", headers=acts)
    assert (refused.status_code, "No space left" in refused.text) == (507, True), "the next server would take the key"


def test_a_served_run_stays_until_it_is_unloaded(site: Site) -> None:
    load_fake(site, "support")
    client = entered(site)
    body = {"run": "done-0001", "stays": True}
    assert client.post("/v1/deployments", json=body, headers=OWN).json()["stays"] is True
    assert "until you unload it" in client.get("/ui/runs/done-0001").text
    assert "is kept loaded for programs" in client.get("/ui/chat?run=another").text
    assert "is kept loaded for programs" not in client.get("/ui/chat?run=done-0001").text
    closed: list[float] = []

    async def close(grace_s: float) -> None:
        closed.append(grace_s)

    engine: Any = site.engine._engine
    engine.close = close
    assert client.delete("/v1/deployments", headers=OWN | {"X-Tunesmith": "1"}).json()["state"] == "none"
    assert client.get("/v1/deployments").json()["stays"] is False
    assert closed == [0]
    assert "curl" not in Elements(client.get("/ui/runs/done-0001").text).text


def test_an_engine_that_starts_or_ended_is_said(site: Site) -> None:
    client = entered(site)
    load_fake(site, state="failed")
    for path in ("/ui/runs/done-0001", "/ui/chat?run=done-0001"):
        page = client.get(path).text
        assert "the engine ended: <b>no memory</b>" in Elements(page).text
        assert_no_foreign_element(page, path)

    async def loading() -> None:
        site.engine._task = asyncio.create_task(asyncio.sleep(60))
        for path in ("/ui/runs/done-0001", "/ui/chat?run=done-0001"):
            assert 'class="waiting"' in client.get(path).text
        site.engine._task.cancel()

    asyncio.run(loading())
    site.engine._task = None
    refused = client.post("/v1/classify", json={"model": "a", "input": ["b"]}, headers=OWN)
    assert refused.status_code in (404, 503)
