"""A PostgreSQL cluster in a temporary folder, reached by a socket there; ended with the tests. And stores whose tables
are copies of those that were made first."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tunesmith.jobs import database
from tunesmith.jobs.store import Store
from tunesmith.jobs.store_folder import DATABASE_FILE

SYNCED = database._set_up_sqlite


def _unsynced(connection: Any, record: Any) -> None:
    SYNCED(connection, record)
    connection.execute("PRAGMA synchronous = OFF")


database._set_up_sqlite = _unsynced
"""As `os.fsync` does nothing in tests: SQLite waited for the disk for longer than it worked."""


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


class Cluster:
    """It loses what it was doing when its machine does: nothing is synced."""

    def __init__(self, *, sync: bool = False) -> None:
        binaries = _binaries()
        if binaries is None:
            pytest.skip("PostgreSQL is not installed: no initdb")
        try:
            import psycopg  # noqa: F401
        except ModuleNotFoundError:
            pytest.skip("psycopg is not installed")
        self._binaries = binaries
        self._user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        self.folder = Path(tempfile.mkdtemp(prefix="tunesmith-pg-"))
        if self._user:
            try:
                shutil.chown(self.folder, "postgres", "postgres")
            except LookupError:
                pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        self._run("initdb", "-D", self.folder / "data", "-U", "tunesmith", "-A", "trust", "--no-sync", "-E", "UTF8")
        self._options = f"-c listen_addresses= -k {self.folder}" + ("" if sync else " -c fsync=off")
        self.start()
        atexit.register(self.remove)

    def _run(self, name: str, *words: object) -> None:
        done = subprocess.run(
            [*self._user, self._binaries / name, *map(str, words)], capture_output=True, text=True, cwd="/", check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        self._run("pg_ctl", "-D", self.folder / "data", "-o", self._options, "-l", self.folder / "log", "-w", "start")

    def stop(self) -> None:
        """As the power does."""
        self._run("pg_ctl", "-D", self.folder / "data", "-m", "immediate", "-w", "stop")

    def remove(self) -> None:
        if self.folder.exists():
            self.stop()
            shutil.rmtree(self.folder)

    def url(self, place: Path, *, like: str = "template1") -> str:
        """The address of the database that belongs to a folder. A new one is a copy of the database `like`."""
        import psycopg

        name = _name(place)
        where = f"host={self.folder} user=tunesmith"
        with psycopg.connect(f"{where} dbname=postgres", autocommit=True) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone():
                connection.execute(f"CREATE DATABASE {name} TEMPLATE {like}")  # type: ignore[call-overload]
        return f"postgresql://tunesmith@/{name}?host={self.folder}"


def _name(place: Path) -> str:
    return "t" + hashlib.sha256(str(place).encode()).hexdigest()[:16]


@functools.cache
def cluster() -> Cluster:
    """The one of this test process."""
    return Cluster()


@functools.cache
def _made(kind: str) -> Path:
    """The place of empty tables."""
    place = Path(tempfile.mkdtemp(prefix="tunesmith-tables-")) / DATABASE_FILE
    atexit.register(shutil.rmtree, place.parent)
    made = database.Database(cluster().url(place) if kind == "postgresql" else place)
    made.prepare(may_upgrade=False, on_note=print)
    made.close()
    return place


BEFORE_RELEASE = pytest.param("postgresql", marks=pytest.mark.slow)


def opener(*kinds: Any) -> Any:
    """A fixture that opens the store of a folder, for each of `kinds`: sqlite, postgresql."""

    @pytest.fixture(params=kinds, scope="module")
    def opened(request: pytest.FixtureRequest) -> functools.partial[Store]:
        if request.param == "postgresql":
            cluster()  # or a reason to skip
        return functools.partial(open_store, kind=request.param)

    return opened


def open_store(place: Path, kind: str = "sqlite", **options: object) -> Store:
    """The store of a folder, as it was if it is there. `kind`: sqlite or postgresql."""
    url, tables = None, _made(kind)
    if kind == "postgresql":
        url = cluster().url(place, like=_name(tables))
    elif not (place / DATABASE_FILE).exists():
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copy(tables, place / DATABASE_FILE)
    return Store(place, url, **options)  # type: ignore[arg-type]
