"""The tables on both databases: versions, upgrades, locks, and what is written when the database goes away."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from jobs.places import put_file, put_job, rows
from jobs.postgres import SYNCED, Cluster, cluster, opener
from tunesmith.errors import InputError
from tunesmith.jobs import migrations
from tunesmith.jobs.database import LOCK
from tunesmith.jobs.states import WAITING
from tunesmith.jobs.store import DATABASE_FILE, Store, event
from tunesmith.jobs.tables import TABLES, events, files, uploads
from tunesmith.runs.atomic import remove
from tunesmith.serve.protocol import RequestError

Opened = Callable[..., Store]
opened = opener("sqlite", "postgresql")

FIRST_STORE = Path(__file__).with_name("first_store.sql")
"""A store of the first version with a file, a job and its events, as `sqlite3 .dump` writes it."""


def old_store(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with sqlite3.connect(folder / DATABASE_FILE) as connection:
        connection.executescript(FIRST_STORE.read_text())
    connection.close()


def test_migrations_make_the_tables_that_are_declared(store: Store) -> None:
    with store.writing() as connection:
        assert compare_metadata(MigrationContext.configure(connection), TABLES) == []


def test_a_store_has_one_server(opened: Opened, tmp_path: Path) -> None:
    store = opened(tmp_path)
    with pytest.raises(InputError, match="another server uses it"):
        opened(tmp_path)
    store.close()
    opened(tmp_path).close()


def test_what_was_answered_is_on_the_disk(tmp_path: Path) -> None:
    """Other tests do not wait for it."""
    with sqlite3.connect(tmp_path / DATABASE_FILE) as connection:
        SYNCED(connection, None)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"


def test_a_database_has_one_server_from_whichever_folder(tmp_path: Path) -> None:
    url = cluster().url(tmp_path)
    store = Store(tmp_path / "a", url)
    with pytest.raises(InputError, match="another server uses it"):
        Store(tmp_path / "b", url)
    store.close()


def test_an_older_store_is_upgraded_after_a_copy(tmp_path: Path) -> None:
    old_store(tmp_path)
    said: list[str] = []
    store = Store(tmp_path, on_note=said.append)
    [job] = store.with_status("queued")
    assert (job["id"], store.file("file-old")["bytes"]) == ("ftjob-old", 7)
    assert len(store.page(events, events.c.job == "ftjob-old")[0]) == 2
    store.close()
    [copy] = tmp_path.glob(f"{DATABASE_FILE}.v1-*")
    assert str(copy) in said[0]
    assert copy.stat().st_mode & 0o077 == 0
    with sqlite3.connect(copy) as connection:
        assert connection.execute("SELECT id FROM jobs").fetchall() == [("ftjob-old",)]
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    said.clear()
    Store(tmp_path, on_note=said.append).close()
    assert said == []


def test_a_killed_upgrade_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    old_store(tmp_path)
    upgrade = migrations.upgrade

    def killed(connection: sa.Connection) -> None:
        upgrade(connection)
        raise Killed

    monkeypatch.setattr(migrations, "upgrade", killed)
    with pytest.raises(Killed):
        Store(tmp_path)
    with sqlite3.connect(tmp_path / DATABASE_FILE) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchall()
    monkeypatch.undo()
    store = Store(tmp_path)
    assert store.job("ftjob-old") is not None
    store.close()


def test_a_newer_store_is_refused(opened: Opened, tmp_path: Path) -> None:
    store = opened(tmp_path)
    with store.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '99'")
    store.close()
    with pytest.raises(InputError, match="version 99, this version of tunesmith knows"):
        opened(tmp_path)


def test_an_older_postgresql_store_waits_for_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = cluster().url(tmp_path)
    Store(tmp_path, url).close()
    monkeypatch.setattr(migrations, "newest", lambda: "next")
    with pytest.raises(InputError, match="pg_dump, then start once with --upgrade-store"):
        Store(tmp_path, url)
    Store(tmp_path, url, may_upgrade=True).close()


def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    import psycopg

    url = cluster().url(tmp_path)
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE files (name text)")
    with pytest.raises(InputError, match="tables of something else"):
        Store(tmp_path, url)
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM files").fetchone() == (0,)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://a:secret@localhost/x", "PGPASSWORD"),
        ("postgresql://@@:x:/", "it looks like"),
        ("postgresql:///x?host=/nowhere", "cannot be reached"),
    ],
)
def test_an_address_that_is_none_is_refused(tmp_path: Path, url: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Store(tmp_path, url)
    assert "secret" not in str(caught.value)


def tuned_or_status(store: Store, name: str) -> list[object] | int:
    try:
        return list(store.tuned(name=name))
    except RequestError as error:  # PostgreSQL refuses to look for a NUL
        return error.status


def test_names_are_data(store: Store) -> None:
    name = put_job(store, put_file(store, rows(1)), metadata={"a'; DROP TABLE jobs; --": "\0 %s"}, suffix="\0'\"")
    store.add_events([event(name, "a\0b % ' \\ \U0001f600")])
    assert store.job(name)["request"]["metadata"] == {"a'; DROP TABLE jobs; --": "\0 %s"}
    assert store.page(events)[0][0]["message"] == "a\\0b % ' \\ \U0001f600"
    for nothing in ("' OR '1'='1", "x\0y", "%"):
        assert store.job(nothing) is None
        assert store.file(nothing) is None
        assert tuned_or_status(store, nothing) in ([], 400)


def test_a_server_that_lost_its_database_writes_again_only_with_the_lock(tmp_path: Path) -> None:
    import psycopg

    own = Cluster()
    try:
        url = own.url(tmp_path)
        store = Store(tmp_path / "a", url)
        name = put_job(store, put_file(store, rows(1)))
        own.stop()
        with pytest.raises(RequestError) as caught:
            store.act(name, "pause", "paused")
        assert (caught.value.status, caught.value.code) == (503, "store_unavailable")
        with pytest.raises(RequestError):
            store.job(name)
        own.start()
        assert store.act(name, "pause", "paused")["status"] == "paused"
        own.stop()
        own.start()
        other = psycopg.connect(url)
        other.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
        for _ in range(2):  # not even at the second try
            with pytest.raises(RequestError) as caught:
                store.act(name, "cancel", "cancelled")
        assert "another server" in str(caught.value)
        other.close()
        assert store.job(name)["status"] == "paused"
        assert store.act(name, "cancel", "cancelled")["status"] == "cancelled"
        store.close()
    finally:
        own.remove()


def test_a_full_disk_is_said_and_nothing_is_half_written(store: Store) -> None:
    if store._database.is_sqlite:
        with store.writing() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        name = put_file(store, rows(1))

        def fill() -> None:
            for _ in range(500):
                put_job(store, name, metadata={"a": "x" * 500})

        with pytest.raises(RequestError) as caught:
            fill()
        before = len(store.with_status(*WAITING))
        assert (caught.value.status, caught.value.code) == (507, "storage_full")
        assert caught.value.headers == {"x-should-retry": "false"}
        assert before == len(store.page(events, events.c.message.like("Created%"), limit=1000)[0])
        with store.writing() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        put_job(store, name)


# A database that is lost, older or damaged


def used_store(folder: Path) -> tuple[Path, dict[str, bytes]]:
    """The database of a store that was used, and its contents."""
    store = Store(folder)
    for num in range(3):
        put_file(store, rows(12 + num), f"file-{num}")
    (store.parts_path / "upload_a").mkdir()
    (store.parts_path / "upload_a" / "part_a").write_bytes(b"part")
    store.insert(uploads, {**UPLOAD, "id": "upload_a"})
    store.close()
    return folder / DATABASE_FILE, contents(folder)


UPLOAD = {"status": "pending", "bytes": 9, "filename": "a", "purpose": "fine-tune", "expires_at": 2**40}


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(("jobs.sqlite", "."))]
    return {path.name: path.read_bytes() for path in paths if path.name != "lock"}


def test_a_lost_database_removes_no_upload_and_the_way_out_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    database, before = used_store(folder)
    whole = database.read_bytes()
    Store(tmp_path / "other").close()
    for lost in (None, b"", (tmp_path / "other" / DATABASE_FILE).read_bytes()):
        database.unlink(missing_ok=True)
        if lost is not None:
            database.write_bytes(lost)
        for _ in range(2):  # what a start leaves does not let the next one in
            with pytest.raises(InputError, match=r"but 3 files and 0 runs are here.* Put a copy of jobs.sqlite back"):
                Store(folder)
        assert contents(folder) == before
    Store(tmp_path / "jobs-new").close()  # as the message says
    assert contents(folder) == before
    database.write_bytes(whole)
    store = Store(folder)
    assert store.remove_unused(with_uploads=True) == []
    assert {row["id"] for row in store.page(files)[0]} <= before.keys()
    store.close()
    assert contents(folder) == before


def test_a_folder_that_holds_nothing_may_have_another_database(tmp_path: Path) -> None:
    Store(tmp_path).close()
    (tmp_path / DATABASE_FILE).unlink()
    Store(tmp_path).close()


def test_keys_are_not_made_in_a_database_that_is_lost(tmp_path: Path) -> None:
    """A server without its keys would let everybody in."""
    database, _ = used_store(tmp_path)
    database.unlink()
    with pytest.raises(InputError, match=r"jobs.sqlite is missing, but 3 files"):
        Store(tmp_path, is_server=False)
    assert not database.exists()


# trap: S22
def test_what_an_older_copy_of_the_database_does_not_name_is_set_aside(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_unknown_is_lost(opened, tmp_path / "jobs")
    monkeypatch.setattr("tunesmith.jobs.store.set_aside", lambda folder, unknown: list(map(remove, unknown))[:0])
    with pytest.raises(AssertionError):
        nothing_unknown_is_lost(opened, tmp_path / "other")


def nothing_unknown_is_lost(opened: Opened, folder: Path) -> None:
    store = opened(folder)
    put_file(store, rows(12), "file-old")
    late = {"file-new": rows(13), "part_new": b"part"}
    store.content_path("file-new").write_bytes(late["file-new"])  # named by the database that was lost
    store.content_path(".file-half").write_bytes(b"half")
    (store.parts_path / "upload_new").mkdir()
    (store.parts_path / "upload_new" / "part_new").write_bytes(late["part_new"])
    lines = store.remove_unused(with_uploads=True)
    store.close()
    assert [line.partition("moved")[0] for line in lines] == ["2 uploads that no row of the database names: "]
    assert lines[0].startswith(f"2 uploads that no row of the database names: moved to {folder / 'unknown'}. A kill ")
    assert contents(folder / "unknown") == late
    assert [path.name for path in store.files_path.iterdir()] == ["file-old"]
    store = opened(folder)
    assert store.remove_unused(with_uploads=True) == []
    store.close()


def flipped(content: bytes) -> bytes:
    """A bit of the first byte of each page but the first, which says what kind of page it is."""
    changed = bytearray(content)
    for start in range(4096, len(content), 4096):
        changed[start] ^= 0x40
    return bytes(changed)


@pytest.mark.parametrize(
    "damage",
    [lambda it: bytes(len(it)), lambda it: it[: len(it) // 2], flipped, lambda it: b"This is a text. " * 999],
    ids=["zeros", "half", "flipped bits", "text"],
)
def test_a_damaged_database_is_named_so_and_nothing_is_removed(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    database, before = used_store(tmp_path)
    database.write_bytes(damaged := damage(database.read_bytes()))
    with pytest.raises(InputError, match=r"jobs.sqlite is damaged \(.*Put a copy of it back, and do not delete it"):
        Store(tmp_path)
    assert database.read_bytes() == damaged
    assert contents(tmp_path) == before
