"""Pushing to a hub of our own on this machine: one commit of what was exported, private unless said otherwise."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from export.exports import finished
from tunesmith.cli.app import app
from tunesmith.errors import ExportError, InputError
from tunesmith.export import hub as push_module
from tunesmith.export.export_run import Exported, export_run


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as one commit of small files takes."""

    asked: ClassVar[list[tuple[str, Any]]] = []
    status = 200

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        if not length:  # a commit comes in chunks
            body = self._chunks()
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        Hub.asked.append((self.path, lines))
        if self.path.endswith("/repos/create"):
            name = f"{lines[0]['organization']}/{lines[0]['name']}"
            self._answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif "/preupload/" in self.path:
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]
            ]
            self._answer({"files": modes})
        else:
            self._answer(
                {"commitUrl": f"http://{self.headers['Host']}/me/tuned/commit/abc", "commitOid": "abc", "success": True}
            )

    def do_GET(self) -> None:
        self._answer({"id": "me/tuned", "sha": "abc", "siblings": []})

    def _chunks(self) -> str:
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body.decode()

    def _answer(self, value: Any) -> None:
        body = json.dumps(value if Hub.status == 200 else {"error": "You may not"}).encode()
        self.send_response(Hub.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "status", 200)
    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    out = tmp_path_factory.mktemp("push") / "out"
    return export_run(finished("chat"), "adapter", out=out, proof=False, offline=True)


def test_one_commit_has_every_file_of_the_export(adapter: Exported, hub: str) -> None:
    done = push_module.push(adapter.path, "me/tuned", endpoint=hub)
    paths = [path for path, _ in Hub.asked]
    assert [path for path in paths if "/commit/" in path] == ["/api/models/me/tuned/commit/main"]
    created = next(lines[0] for path, lines in Hub.asked if path.endswith("/repos/create"))
    assert is_private(created)
    commit = next(lines for path, lines in Hub.asked if "/commit/" in path)
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in commit[1:]}
    here = {path.name: path.read_bytes() for path in adapter.path.iterdir()}
    assert sent.keys() == here.keys()
    assert all(sent[name] == here[name] for name in here if name != "README.md")
    card = sent["README.md"].decode()
    assert 'PeftModel.from_pretrained(base, "me/tuned")' in card
    assert '"PATH"' not in card
    assert done.num_files == len(here)
    assert done.is_proven is False


def test_public_has_to_be_said(adapter: Exported, hub: str) -> None:
    push_module.push(adapter.path, "me/tuned", private=False, endpoint=hub)
    assert not is_private(next(lines[0] for path, lines in Hub.asked if path.endswith("/repos/create")))


def is_private(asked: Any) -> bool:
    """As huggingface_hub 2 says it, or 1."""
    return bool(asked["visibility"] == "private" if "visibility" in asked else asked["private"])


def test_a_hub_that_refuses_is_explained(adapter: Exported, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "status", 403)
    with pytest.raises(ExportError, match=r"me/tuned: the hub did not take it: .*a token that may write there"):
        push_module.push(adapter.path, "me/tuned", endpoint=hub)
    with pytest.raises(ExportError, match="the hub did not take it"):
        push_module.push(adapter.path, "me/tuned", endpoint="http://127.0.0.1:9")


def test_what_is_no_export_or_no_name_is_refused(adapter: Exported, tmp_path: Path, no_sockets: None) -> None:
    with pytest.raises(InputError, match=r"no export: it has no verify\.json"):
        push_module.push(tmp_path, "me/tuned")
    with pytest.raises(InputError, match="not a name of the hub"):
        push_module.push(adapter.path, "me/tuned/again")


def test_the_verb_pushes_a_folder_and_says_where(adapter: Exported, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = push_module.push
    monkeypatch.setattr(
        push_module, "push", lambda folder, name, *, private: real(folder, name, private=private, endpoint=hub)
    )
    run = finished("chat")
    words = ["push", str(run.path), "me/tuned", "--from", str(adapter.path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "me/tuned; only you can see it" in result.stdout
    assert "its card says so" in result.stdout
    as_json = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(as_json.stdout)["num_files"] == len(list(adapter.path.iterdir()))


def test_exporting_opens_no_socket(tmp_path: Path, no_sockets: None) -> None:
    export_run(finished("chat"), "merged", out=tmp_path / "out", proof=False, offline=True)
