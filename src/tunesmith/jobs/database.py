"""The database of a store: SQLite in its folder or PostgreSQL, its version, and its one writer."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DatabaseError, DataError, InterfaceError, OperationalError

from tunesmith.environment.packages import install_command
from tunesmith.errors import InputError
from tunesmith.jobs import migrations
from tunesmith.serve.protocol import RequestError

BUSY_MS = 10_000
TIMEOUTS = {"connect_timeout": 5, "keepalives_idle": 30, "tcp_user_timeout": 30_000}
"""PostgreSQL's, in s, s and ms: a database that is gone holds no request for longer."""
LOCK = 0x7475_6E65
"""Number of the advisory lock that the server of a PostgreSQL store holds."""
_DAMAGED = ("is not a database", "malformed", "Could not decode to UTF-8")
DAMAGED = (
    "jobs.sqlite is damaged ({reason}). Put a copy of it back, and do not delete it before: it alone knows the files "
    "and jobs of this folder. `sqlite3 jobs.sqlite .recover` may save its rows."
)
_FULL = ("disk is full", "No space left", "could not extend file")


class Database:
    """Connections to the tables; one transaction writes at a time. Any thread may call the methods."""

    def __init__(self, place: Path | str, *, is_server: bool = True) -> None:
        """`place`: path of an SQLite file, or postgresql://…; `is_server`: hold the lock of a PostgreSQL store.

        Raises RequestError if it is not reached, or if another server holds the lock.
        """
        self.is_sqlite = isinstance(place, Path)
        self.place = place if isinstance(place, Path) else _postgres_url(place)
        self._is_server = is_server
        self._takes_lock = is_server and not self.is_sqlite
        self._write_lock = threading.Lock()
        self._writer: sa.Connection | None = None
        self.version = 0
        """Grows with each transaction of this server, but not with those that only add events."""
        if isinstance(self.place, Path):
            _make_private(self.place)
            self._engine = sa.create_engine(f"sqlite:///{self.place}")
            sa.event.listen(self._engine, "connect", _set_up_sqlite)
            self._insert: Any = sqlite.insert
        else:
            self._engine = sa.create_engine(self.place, pool_pre_ping=True, connect_args=TIMEOUTS)
            self._insert = postgresql.insert
        try:
            self._connected()
        except RequestError:
            self._engine.dispose()
            raise

    def __str__(self) -> str:
        return str(self.place)

    def prepare(self, *, may_upgrade: bool, on_note: Callable[[str], None]) -> None:
        """Make the tables, or upgrade them, in SQLite after a copy. Raises InputError for a newer version."""
        with self.reading() as connection:
            if self.is_sqlite and self._is_server:  # before things go that a damaged table does not name
                check = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
                if check != "ok":
                    raise RequestError(DAMAGED.format(reason=" ".join(check.split())[:200]), status=503)
            try:
                version = migrations.version_of(connection)
            except LookupError:
                raise InputError(
                    f"{self}: holds tables of something else. Give the store a database of its own."
                ) from None
        newest = migrations.newest()
        if version == newest:
            return
        if version is not None and version not in migrations.known():
            message = f"{self}: version {version}, this version of tunesmith knows {newest}. Use a newer version."
            raise InputError(message)
        if version is not None and not self._is_server:
            raise InputError(f"{self}: version {version}, not {newest}. Start the server once, which upgrades it.")
        if version is not None and not self.is_sqlite and not may_upgrade:
            raise InputError(
                f"{self}: version {version}, this version of tunesmith needs {newest}. Make a backup with "
                "pg_dump, then start once with --upgrade-store."
            )
        if version is not None and self.is_sqlite:
            copy = Path(f"{self.place}.v{version}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
            _make_private(copy)
            with self.reading() as connection:
                connection.exec_driver_sql("VACUUM INTO ?", (str(copy),))
            on_note(f"{self}: upgraded from version {version} to {newest}; as it was: {copy}")
        with self.writing() as connection:
            migrations.upgrade(connection)

    def close(self) -> None:
        with self._write_lock:
            self._drop_writer()
        self._engine.dispose()

    @contextmanager
    def writing(self, *, only_events: bool = False) -> Iterator[sa.Connection]:
        """A transaction; all of it is on the disk after the block, or nothing of it. Raises RequestError."""
        with self._write_lock, _translated():
            connection = self._connected()
            try:
                if self.is_sqlite:
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                yield connection
                connection.commit()
            except BaseException:
                with suppress(sa.exc.SQLAlchemyError):
                    connection.rollback()
                if connection.invalidated:
                    self._drop_writer()
                raise
            finally:  # a transaction that failed may be there still
                self.version += not only_events

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection to read with. Raises RequestError."""
        with _translated(), self._engine.connect() as connection:
            yield connection

    def insert_new(self, table: sa.Table) -> Any:
        """An insert that does nothing if the row is there already."""
        return self._insert(table).on_conflict_do_nothing()

    def _connected(self) -> sa.Connection:
        """The one connection that writes. It holds the lock: where it is lost, so is the right to write."""
        if self._writer is not None and not self.is_sqlite:
            try:
                self._writer.exec_driver_sql("SELECT 1")
            except sa.exc.DBAPIError:  # the database was started again meanwhile
                self._drop_writer()
        if self._writer is None:
            with _translated():
                connection = self._engine.connect()
                if self._takes_lock and not connection.scalar(sa.select(sa.func.pg_try_advisory_lock(LOCK))):
                    connection.close()
                    raise RequestError("another server uses it. Stop that, or choose another: --store.", status=503)
                connection.rollback()
            self._writer = connection
        return self._writer

    def _drop_writer(self) -> None:
        if self._writer is not None:
            with suppress(sa.exc.SQLAlchemyError):
                self._writer.invalidate()
                self._writer.close()
            self._writer = None


@contextmanager
def _translated() -> Iterator[None]:
    """Faults of the database as answers: 507 for a full disk, 503 for damage and for all that may pass, 400 for
    a value that no row can have, such as a text with NUL in PostgreSQL."""
    try:
        yield
    except DataError as error:
        reason = " ".join(str(error.orig).split())
        raise RequestError(f"No row can have such a value: {reason[:200]}", code="invalid_value") from error
    except (DatabaseError, InterfaceError) as error:
        reason = " ".join(str(error.orig).split())
        if any(word in reason for word in _DAMAGED):
            raise RequestError(DAMAGED.format(reason=reason[:200]), status=503, code="store_damaged") from error
        if not isinstance(error, (OperationalError, InterfaceError)):
            raise
        if any(word in reason for word in _FULL):
            headers = {"x-should-retry": "false"}
            message = "The disk of the store is full. Nothing was changed."
            raise RequestError(message, status=507, code="storage_full", headers=headers) from error
        message = f"The store cannot be reached: {reason[:200]}"
        raise RequestError(message, status=503, code="store_unavailable") from error


def _postgres_url(text: str) -> sa.URL:
    """Raises InputError for what is not an address, or holds a password."""
    try:
        import psycopg  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(f"--store postgresql: needs the package psycopg. Run {install_command('postgres')}") from None
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        raise InputError("--store: cannot be read; it looks like postgresql://USER@HOST:5432/DATABASE.") from None
    if url.password is not None:
        message = "--store: other users of this machine can read a password there. Put it into PGPASSWORD or ~/.pgpass."
        raise InputError(message)
    return url.set(drivername="postgresql+psycopg")


def _make_private(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


def _set_up_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions are opened by `writing` alone
    for pragma in ("journal_mode = WAL", "synchronous = FULL", f"busy_timeout = {BUSY_MS}"):
        connection.execute(f"PRAGMA {pragma}")
