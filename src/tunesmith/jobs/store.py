"""The store of files, jobs, events and tuned models: a folder with an SQLite database, written by one process.

jobs/
  jobs.sqlite     the tables below            lock     held by the server that uses the folder
  files/          contents of uploads         runs/    a run folder for each job, named by its id
  recipes/        the recipe of each job      parts/   a folder of parts for each pending upload
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import sqlalchemy as sa

from tunesmith.errors import InputError
from tunesmith.jobs.names import derived_id, new_id
from tunesmith.jobs.states import ENDED, WAITING, Action, state_after
from tunesmith.runs.atomic import fsync_dir, remove

VERSION = 1
"""Version of the tables; a store of a newer one is refused."""
BUSY_MS = 10_000

Record = Mapping[str, Any]
"""A row of a table, by the names of its columns."""

_tables = sa.MetaData()


def _table(name: str, *columns: sa.Column[Any]) -> sa.Table:
    # Never an id again, so that pages keep their order.
    seq = sa.Column("seq", sa.Integer, primary_key=True)
    created = sa.Column("created_at", sa.Integer, nullable=False)
    return sa.Table(name, _tables, seq, created, *columns, sqlite_autoincrement=True)


files = _table(
    "files",
    sa.Column("id", sa.String, unique=True, nullable=False),
    sa.Column("purpose", sa.String, nullable=False),
    sa.Column("filename", sa.String, nullable=False),
    sa.Column("bytes", sa.Integer, nullable=False),
    sa.Column("sha256", sa.String, nullable=False),
    sa.Column("deleted_at", sa.Integer),
)
uploads = _table(
    "uploads",
    sa.Column("id", sa.String, unique=True, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("bytes", sa.Integer, nullable=False),
    sa.Column("filename", sa.String, nullable=False),
    sa.Column("purpose", sa.String, nullable=False),
    sa.Column("expires_at", sa.Integer, nullable=False),
    sa.Column("part_ids", sa.JSON(none_as_null=True)),
    sa.Column("file", sa.String),
)
jobs = _table(
    "jobs",
    sa.Column("id", sa.String, unique=True, nullable=False),
    sa.Column("status", sa.String, nullable=False, index=True),
    sa.Column("finished_at", sa.Integer),
    sa.Column("base", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),  # as shown: of an alias the dated name
    sa.Column("tuned_name", sa.String, nullable=False),
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("numbers", sa.JSON, nullable=False),  # hyperparameters, "auto" until they are chosen
    sa.Column("is_checked", sa.Boolean, nullable=False, default=False),
    sa.Column("trained_tokens", sa.Integer),
    sa.Column("result_file", sa.String),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),  # starts without a new checkpoint between
    sa.Column("last_checkpoint", sa.Integer, nullable=False, default=-1),
)
events = _table(
    "events",
    sa.Column("id", sa.String, unique=True, nullable=False),
    sa.Column("job", sa.String, nullable=False, index=True),
    sa.Column("level", sa.String, nullable=False),
    sa.Column("message", sa.String, nullable=False),
    sa.Column("type", sa.String, nullable=False),
    sa.Column("data", sa.JSON(none_as_null=True)),
)
models = _table(
    "models",
    sa.Column("name", sa.String, unique=True, nullable=False),
    sa.Column("job", sa.String, nullable=False, index=True),
    sa.Column("base", sa.String, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("deleted_at", sa.Integer),
)


def event(
    job: str, message: str, *, level: str = "info", data: Record | None = None, once: object = None
) -> dict[str, Any]:
    """A row of `events`. The same `once` for a job is the same event: it is kept once, however often it is added."""
    name = new_id("ftevent-") if once is None else derived_id("ftevent-", job, once)
    kind = "metrics" if data else "message"
    return {
        "id": name, "job": job, "created_at": int(time.time()), "level": level, "message": message, "type": kind,
        "data": dict(data or {}),
    }  # fmt: skip


class Store:
    """The folder and its tables. All methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError if another server uses the folder, or if it is of a newer version."""
        self.folder = folder.resolve()
        for path in (self.folder, self.files_path, self.parts_path, self.runs_path, self.recipes_path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.folder / "lock", timeout=0)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise InputError(f"{folder}: another server uses it. Stop that, or choose another: --store.") from None
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        path = self.folder / "jobs.sqlite"
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self._engine = sa.create_engine(f"sqlite:///{path}")
        sa.event.listen(self._engine, "connect", _set_up)
        self._write_lock = threading.Lock()
        with self.writing() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if version > VERSION:
                raise InputError(
                    f"{path}: version {version}, this version of tunesmith knows {VERSION}. Use a newer version."
                )
            _tables.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")

    @property
    def files_path(self) -> Path:
        return self.folder / "files"

    @property
    def parts_path(self) -> Path:
        return self.folder / "parts"

    @property
    def runs_path(self) -> Path:
        return self.folder / "runs"

    @property
    def recipes_path(self) -> Path:
        return self.folder / "recipes"

    def content_path(self, file: str) -> Path:
        """The content of a file, by an id of ours."""
        return self.files_path / file

    def close(self) -> None:
        self._engine.dispose()
        self._lock.release()

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction; all of it is on the disk after the block, or nothing of it."""
        with self._write_lock, self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.exec_driver_sql("ROLLBACK")
                raise
            connection.exec_driver_sql("COMMIT")

    def _read(self, statement: sa.Select[Any]) -> list[Record]:
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(statement).mappings()]

    def one(self, table: sa.Table, **is_: Any) -> Record | None:
        """The row whose columns have these values."""
        found = self._read(sa.select(table).where(*(table.c[name] == value for name, value in is_.items())))
        return found[0] if found else None

    def page(
        self,
        table: sa.Table,
        *conditions: sa.ColumnElement[bool],
        after: int | None = None,
        limit: int = 20,
        newest_first: bool = True,
        keeps: Callable[[Record], bool] = lambda row: True,
    ) -> tuple[list[Record], bool]:
        """At most `limit` rows beyond the one numbered `after`, and whether there are more."""
        order = table.c.seq.desc() if newest_first else table.c.seq
        beyond = () if after is None else (table.c.seq < after if newest_first else table.c.seq > after,)
        statement = sa.select(table).where(*conditions, *beyond).order_by(order)
        found: list[Record] = []
        with self._engine.connect() as connection:
            for row in connection.execute(statement.execution_options(yield_per=500)).mappings():
                if keeps(one := dict(row)):
                    found.append(one)
                if len(found) > limit:
                    break
        return found[:limit], len(found) > limit

    # Files

    def add_file(self, row: Record) -> Record:
        with self.writing() as connection:
            connection.execute(insert(files).values(created_at=int(time.time())).values(**row))
        return self.one(files, id=row["id"]) or {}

    def file(self, name: str) -> Record | None:
        """A file that was not deleted."""
        return self.one(files, id=name, deleted_at=None)

    def delete_file(self, name: str) -> bool:
        """Whether there was one. Its content goes at once, or when no job that has not ended needs it."""
        with self.writing() as connection:
            gone = sa.update(files).where(files.c.id == name, files.c.deleted_at.is_(None))
            done = connection.execute(gone.values(deleted_at=int(time.time()))).rowcount
        self.sweep()
        return bool(done)

    def sweep(self, *, with_uploads: bool = False) -> None:
        """Remove contents that no row names any more. `with_uploads`: those of uploads too; none may be under way."""
        open_jobs = self._read(sa.select(jobs.c.request).where(jobs.c.status.not_in(ENDED)))
        needed = {row["request"].get(key) for row in open_jobs for key in ("training_file", "validation_file")}
        needed |= {row["id"] for row in self._read(sa.select(files.c.id).where(files.c.deleted_at.is_(None)))}
        for path in self.files_path.iterdir():
            if path.name not in needed and (with_uploads or not path.name.startswith(".")):
                path.unlink(missing_ok=True)
        fsync_dir(self.files_path)
        is_pending = (uploads.c.status == "pending", uploads.c.expires_at > int(time.time()))
        pending = {row["id"] for row in self._read(sa.select(uploads.c.id).where(*is_pending))}
        for path in self.parts_path.iterdir():
            if path.name not in pending:
                remove(path)
            for temporary in path.glob(".*") if with_uploads else ():
                temporary.unlink(missing_ok=True)

    # Jobs

    def create_job(self, row: Record, messages: Sequence[Record]) -> Record:
        with self.writing() as connection:
            now = int(time.time())
            connection.execute(sa.insert(jobs).values(created_at=now, status="validating_files", **row))
            _add_events(connection, messages)
        return self.job(row["id"]) or {}

    def job(self, name: str) -> Record | None:
        return self.one(jobs, id=name)

    def with_status(self, *states: str) -> list[Record]:
        """Jobs in some states, oldest first."""
        return self._read(sa.select(jobs).where(jobs.c.status.in_(states)).order_by(jobs.c.seq))

    def waiting(self) -> list[Record]:
        """Jobs that wait for their turn, oldest first."""
        return self.with_status(*WAITING)

    def act(self, name: str, action: Action, message: str) -> Record | None:
        """A client's action on a job; None: there is no such job. Raises RequestError if its state forbids it."""
        with self.writing() as connection:
            row = connection.execute(sa.select(jobs.c.status).where(jobs.c.id == name)).first()
            if row is None:
                return None
            after = state_after(row.status, action, name)
            if after != row.status:
                ended = {"finished_at": int(time.time())} if after in ENDED else {}
                connection.execute(sa.update(jobs).where(jobs.c.id == name).values(status=after, **ended))
                _add_events(connection, [event(name, message)])
        return self.job(name)

    def change_job(
        self, name: str, messages: Sequence[Record] = (), *, if_status: Sequence[str], **values: Any
    ) -> bool:
        """Set columns of a job if it is in one of some states still, with its events. Whether it was."""
        with self.writing() as connection:
            if values.get("status") in ENDED:
                values["finished_at"] = int(time.time())
            matches = sa.update(jobs).where(jobs.c.id == name, jobs.c.status.in_(if_status))
            done = connection.execute(matches.values(**values)).rowcount
            if done:
                _add_events(connection, messages)
        return bool(done)

    def succeed(
        self, name: str, messages: Sequence[Record], *, model: Record, result: Record, trained_tokens: int
    ) -> bool:
        """Model, results, state and events of a job in one transaction; False: it was cancelled or paused before."""
        with self.writing() as connection:
            now = int(time.time())
            matches = sa.update(jobs).where(jobs.c.id == name, jobs.c.status == "running")
            values = {"result_file": result["id"], "trained_tokens": trained_tokens, "finished_at": now}
            if not connection.execute(matches.values(status="succeeded", **values)).rowcount:
                return False
            connection.execute(insert(files).values(created_at=now).values(**result))
            connection.execute(insert(models).values(created_at=now).values(**model))
            _add_events(connection, messages)
        return True

    # Events and models

    def add_events(self, messages: Sequence[Record]) -> None:
        if messages:
            with self.writing() as connection:
                _add_events(connection, messages)

    def seq(self, table: sa.Table, name: str) -> int | None:
        """The number of a row, for pages after it."""
        row = self.one(table, id=name)
        return None if row is None else int(row["seq"])

    def tuned(self, **is_: Any) -> list[Record]:
        """Tuned models that were not deleted, oldest first."""
        conditions = [models.c[name] == value for name, value in is_.items()]
        statement = sa.select(models).where(models.c.deleted_at.is_(None), *conditions)
        return self._read(statement.order_by(models.c.seq))

    def delete_model(self, name: str) -> None:
        with self.writing() as connection:
            gone = sa.update(models).where(models.c.name == name)
            connection.execute(gone.values(deleted_at=int(time.time())))


def insert(table: sa.Table) -> Any:
    """An insert that does nothing if the row is there already."""
    return sa.insert(table).prefix_with("OR IGNORE")


def _add_events(connection: sa.Connection, messages: Sequence[Record]) -> None:
    if messages:
        connection.execute(insert(events), [dict(one) for one in messages])


def _set_up(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions are opened by `writing` alone
    for pragma in ("journal_mode = WAL", "synchronous = FULL", f"busy_timeout = {BUSY_MS}"):
        connection.execute(f"PRAGMA {pragma}")
