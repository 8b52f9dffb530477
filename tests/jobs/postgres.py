"""A PostgreSQL cluster in a temporary folder, reached by a socket there; ended with the tests."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tunesmith.jobs.store import Store


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

    def url(self, place: Path) -> str:
        """The address of the database that belongs to a folder."""
        import psycopg

        name = "t" + hashlib.sha256(str(place).encode()).hexdigest()[:16]
        where = f"host={self.folder} user=tunesmith"
        with psycopg.connect(f"{where} dbname=postgres", autocommit=True) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone():
                connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        return f"postgresql://tunesmith@/{name}?host={self.folder}"


@functools.cache
def cluster() -> Cluster:
    """The one of this test process."""
    return Cluster()


def open_store(place: Path, kind: str, **options: object) -> Store:
    """The store of a folder, as it was if it is there. `kind`: sqlite or postgresql."""
    return Store(place, cluster().url(place) if kind == "postgresql" else None, **options)  # type: ignore[arg-type]
