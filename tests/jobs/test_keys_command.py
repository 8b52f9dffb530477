"""tunesmith keys: made, listed and revoked while a server holds the store."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tunesmith.cli.app import app
from tunesmith.jobs import access
from tunesmith.jobs.access import ProjectKeys
from tunesmith.jobs.store import Store


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["keys", *map(str, words)])
    return done.exit_code, done.stdout


def test_a_key_lives_from_create_to_revoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "KEPT_S", 0.0)
    place = tmp_path / "jobs"
    server = Store(place)  # which runs meanwhile
    code, out = run(
        "create", "--project", "red", "--scope", "files.read", "--days", 9, "--label", "ci", "--store", place
    )
    key = out.split()[0]
    assert (code, key[:3]) == (0, "ts-")
    admission = ProjectKeys(server, None, may_be_open=True)
    sent = {b"authorization": f"Bearer {key}".encode()}
    assert asyncio.run(admission.admit("GET", "/v1/files", sent)) == "red"
    code, out = run("list", "--store", place, "--json")
    [row] = json.loads(out)
    assert (row["project"], row["state"], row["scopes"], row["label"]) == ("red", "active", ["files.read"], "ci")
    assert row["used_at"] is not None
    assert key not in out
    assert "red\tactive\tfiles.read" in run("list", "--store", place)[1]
    assert run("revoke", row["id"], "--store", place, "--json")[1] == f'{{"id":"{row["id"]}","state":"revoked"}}\n'
    with pytest.raises(Exception, match="is revoked"):
        asyncio.run(admission.admit("GET", "/v1/files", sent))
    server.close()


def test_faults_are_said_with_exit_code_2(tmp_path: Path) -> None:
    for words in (
        ("create", "--project", "Red"),
        ("create", "--scope", "everything"),
        ("revoke", "key-none"),
        ("list", "--store", "postgresql://x:y@localhost/z"),
    ):
        where = [] if "--store" in words else ["--store", tmp_path]
        assert run(*words, *where)[0] == 2, words


@pytest.mark.parametrize("words", [("list",), ("revoke", "key-abc")])
def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, words: tuple[str, ...]) -> None:
    place = tmp_path / "jbos"
    assert run(*words, "--store", place)[0] == 2
    assert not place.exists()
