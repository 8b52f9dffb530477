"""The store of files, jobs, events and tuned models: a folder and a database, written by one server.

jobs/
  jobs.sqlite     the tables, if they are not in PostgreSQL    lock     held by the server that uses the folder
  files/          contents of uploads         runs/    a run folder for each job, named by its id
  recipes/        the recipe of each job      parts/   a folder of parts for each pending upload
  unknown/        contents that no row named when a server started
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import filelock
import sqlalchemy as sa

from tunesmith.errors import InputError
from tunesmith.jobs.database import Database
from tunesmith.jobs.names import DEFAULT_PROJECT, derived_id, new_id, snapshot_step
from tunesmith.jobs.rules import Rules
from tunesmith.jobs.states import ENDED, WAITING, Action, state_after
from tunesmith.jobs.store_folder import DATABASE_FILE, is_used, lost, refuse_lost, set_aside
from tunesmith.jobs.tables import (
    events,
    files,
    is_live,
    is_pending,
    jobs,
    keys,
    models,
    own,
    permissions,
    stores,
    uploads,
    webhooks,
)
from tunesmith.runs.atomic import fsync_dir, remove, write_atomic
from tunesmith.runs.folder import Run
from tunesmith.runs.prune import STORE_MARK
from tunesmith.serve.middleware import PROJECT
from tunesmith.serve.protocol import RequestError
from tunesmith.types import JsonObject, Record

RUN_STOPS = ": its run stops after the step under way"


def event(
    job: str, message: str, *, level: str = "info", data: Record | None = None, once: object = None
) -> JsonObject:
    """A row of `events`. The same `once` for a job is the same event: kept once, however often added."""
    name = new_id("ftevent-") if once is None else derived_id("ftevent-", job, once)
    kind = "metrics" if data else "message"
    return {
        "id": name, "job": job, "created_at": int(time.time()), "level": level,
        "message": message.replace("\0", "\\0"), "type": kind,
        "data": dict(data or {}),
    }  # fmt: skip


class Store:
    """The folder and its tables. All methods may be called from any thread."""

    def __init__(
        self,
        folder: Path,
        url: str | None = None,
        *,
        is_server: bool = True,
        may_upgrade: bool = False,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`url`: postgresql://…, where the tables are; None: in the folder. `is_server`: hold the lock.

        Raises InputError if another server uses the store, and for a version that cannot be used.
        """
        self.folder = folder.resolve()
        paths = [self.folder / name for name in ("files", "parts", "runs", "recipes")]
        self.files_path, self.parts_path, self.runs_path, self.recipes_path = paths
        self.rules = Rules()
        self.arriving: Counter[str] = Counter()
        """Bytes on their way, by project or upload."""
        self.joining: dict[str, threading.Lock] = {}
        """Held while the parts of an upload are joined."""
        self.answers: dict[Any, Any] = {}
        """See KeptAnswers."""
        self.on_job: Callable[[Record], None] = lambda job: None
        """Gets each job that is made or comes to another state."""
        if is_server or url is None:
            for path in (self.folder, *paths):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.folder / "lock", timeout=0)
        try:
            if is_server:
                self._lock.acquire()
        except filelock.Timeout:
            raise InputError(f"{folder}: another server uses it. Stop that, or choose another: --store.") from None
        with ExitStack() as opened:
            opened.callback(self._lock.release)
            try:
                if url is None:
                    refuse_lost(self.folder, self.folder / DATABASE_FILE)
                self._database = Database(url or self.folder / DATABASE_FILE, is_server=is_server)
                opened.callback(self._database.close)
                self._database.prepare(may_upgrade=may_upgrade, on_note=on_note)
                if is_server:
                    self._match_folder()
            except RequestError as error:
                raise InputError(f"--store {url or folder}: {error}") from error
            self._opened = opened.pop_all()

    def _match_folder(self) -> None:
        """Raises InputError for a folder of another database: what that does not know would be removed."""
        if (store := self.one(stores)) is None:
            self.insert(stores, {"id": new_id("store-")})
        store, mark = self.one(stores) or {}, self.folder / STORE_MARK
        marked_id = mark.read_text() if mark.exists() else ""
        has_rows = self.one(files) is not None or self.one(jobs) is not None
        if self._database.is_sqlite:  # a store of an early version has rows, and no mark yet
            fits = marked_id == store["id"] or not is_used(self.folder) or (not marked_id and has_rows)
            message = lost(self.folder, f"{DATABASE_FILE} belongs to another store, or was made anew")
        else:
            fits = marked_id == store["id"] or not (marked_id or has_rows or is_used(self.folder))
            message = f"{self.folder}: does not belong to the store in {self._database}. Give its own: --store-files."
        if not fits:
            raise InputError(message)
        if marked_id != store["id"]:
            write_atomic(mark, store["id"].encode())

    @contextmanager
    def receiving(self, key: str, num_bytes: int) -> Iterator[None]:
        """A block in which `num_bytes` are `arriving`. For the one thread of the event loop."""
        self.arriving[key] += num_bytes
        try:
            yield
        finally:
            self.arriving[key] -= num_bytes
            self.arriving = +self.arriving  # without zeros

    def content_path(self, file: str) -> Path:
        """The content of a file, by an id of ours."""
        return self.files_path / file

    def model_path(self, row: Record) -> Path:
        """The run folder of a tuned model."""
        step = snapshot_step(row["name"])
        run = Run(self.runs_path / row["job"])
        return run.path if step is None else run.snapshots_path / f"step-{step}"

    def close(self) -> None:
        self._opened.close()

    def writing(self, *, only_events: bool = False) -> AbstractContextManager[sa.Connection]:
        return self._database.writing(only_events=only_events)

    @property
    def version(self) -> int:
        """Changes whenever anything but events changes; caches read under it (see `Database`)."""
        return self._database.version

    def _read(self, statement: sa.Select[Any]) -> list[Record]:
        with self._database.reading() as connection:
            return [dict(row) for row in connection.execute(statement).mappings()]

    def one(self, table: sa.Table, **is_: Any) -> Record | None:
        """The row whose columns have these values."""
        if any(isinstance(value, str) and "\0" in value for value in is_.values()):
            return None  # no name of ours; PostgreSQL refuses to look
        rows = self._read(sa.select(table).where(*own(table), *_are(table, is_)).limit(1))
        return rows[0] if rows else None

    def insert_new(self, table: sa.Table) -> Any:
        return self._database.insert_new(table)

    def insert(self, table: sa.Table, row: Record) -> None:
        with self.writing() as connection:
            connection.execute(self.insert_new(table).values(created_at=int(time.time()), **row))

    def delete(self, table: sa.Table, **is_: Any) -> bool:
        """Whether there were rows whose columns have these values."""
        with self.writing() as connection:
            return bool(connection.execute(sa.delete(table).where(*own(table), *_are(table, is_))).rowcount)

    def update(self, table: sa.Table, values: Record, **is_: Any) -> bool:
        """Set columns of the rows whose columns have these values; whether there were any."""
        with self.writing() as connection:
            return bool(
                connection.execute(sa.update(table).where(*own(table), *_are(table, is_)).values(values)).rowcount
            )

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
        statement = sa.select(table).where(*own(table), *conditions, *beyond).order_by(order)
        rows: list[Record] = []
        with self._database.reading() as connection:
            for row in connection.execute(statement.execution_options(yield_per=500)).mappings():
                if keeps(record := dict(row)):
                    rows.append(record)
                if len(rows) > limit:
                    break
        return rows[:limit], 0 < limit < len(rows)

    # Files

    def add_file(self, row: Record) -> Record:
        """Raises RequestError if the project may not have as much."""
        with self.writing() as connection:
            self.check_room(connection, row["bytes"])
            connection.execute(self.insert_new(files).values(created_at=int(time.time()), **row))
        return self.one(files, id=row["id"]) or {}

    def check_room(self, connection: sa.Connection | None, num_bytes: int) -> int | None:
        """Bytes that the project of the request may have beyond files and pending uploads; None: any number.

        Raises RequestError if `num_bytes` are more.
        """
        most = self.rules.of(PROJECT.get() or DEFAULT_PROJECT).file_bytes
        if most is None:
            return None
        live = ((files, is_live()), (uploads, is_pending()))
        with nullcontext(connection) if connection is not None else self._database.reading() as reader:
            sums = (sa.select(sa.func.sum(table.c.bytes)).where(*own(table), which) for table, which in live)
            taken = sum(int(reader.scalar(total) or 0) for total in sums)
        if taken + num_bytes > most:
            message = f"Files and pending uploads of this project have {taken:,} bytes and may have {most:,}. "
            headers = {"x-should-retry": "false"}
            message += "Delete or cancel some."
            raise RequestError(message, status=429, code="insufficient_quota", param="file", headers=headers)
        return most - taken

    def file(self, name: str) -> Record | None:
        """A file that was not deleted, and has not expired."""
        rows, _ = ([], False) if "\0" in name else self.page(files, files.c.id == name, is_live(), limit=1)
        return rows[0] if rows else None

    def delete_file(self, name: str) -> bool:
        """Whether there was one. Its content goes at once, or when no job that has not ended needs it."""
        done = self.update(files, {"deleted_at": int(time.time())}, id=name, deleted_at=None)
        self.remove_unused()
        return done

    def remove_unused(self, *, with_uploads: bool = False) -> list[str]:
        """Remove contents of deleted files that no open job needs, and runs that are no longer kept.

        `with_uploads`: when a server starts. Unfinished uploads are removed then, and files that no row names
        are set aside, since the database may be an older copy; later they may belong to an upload that is being
        finished. Returns a line on what was set aside.
        """
        stored = self._read(sa.select(files.c.id, files.c.deleted_at))
        # Read after the files: a job that is made of one meanwhile is seen here.
        open_jobs = list(self.open_jobs())
        needed = {row["request"].get(key) for row in open_jobs for key in ("training_file", "validation_file")}
        needed |= {row["id"] for row in stored if row["deleted_at"] is None}
        needed |= {derived_id("file-", row["id"], "results") for row in open_jobs}  # written first
        deleted = {row["id"] for row in stored} - needed
        unknown = []
        for path in list(self.files_path.iterdir()):
            if path.name in deleted or (with_uploads and path.name.startswith(".")):
                path.unlink(missing_ok=True)
            elif with_uploads and path.name not in needed:
                unknown.append(path)
        for row in self._read(sa.select(jobs.c.id).where(jobs.c.run_removed_at.is_not(None))):
            if (run := self.runs_path / row["id"]).exists():  # last: what its launcher wrote goes too
                recipes = [self.recipes_path / f"{run.name}.{suffix}" for suffix in ("yaml", "grader.json")]
                for path in (*self.runs_path.glob(f".{run.name}.*"), *recipes, run):
                    remove(path)
        fsync_dir(self.files_path)
        folders = list(self.parts_path.iterdir())  # before the rows: it has no upload made meanwhile
        pending = {row["id"] for row in self._read(sa.select(uploads.c.id).where(is_pending()))}
        ended = {row["id"] for row in self._read(sa.select(uploads.c.id))} - pending
        for path in folders:
            if path.name in ended or path.name.startswith("."):
                remove(path)
            elif with_uploads and path.name not in pending:
                unknown.append(path)
            for temporary in path.glob(".*") if with_uploads else ():
                temporary.unlink(missing_ok=True)
        return set_aside(self.folder, unknown)

    def expire(self) -> list[str]:
        """Delete what is kept no longer by its own time or by the rules, rows first; a line for each."""
        now, lines = int(time.time()), []
        everything, needed = self._needed_models()
        kept_jobs = {everything[name]["job"] for name in needed}
        with self.writing() as connection:
            for table, done in ((files, "deleted_at"), (jobs, "run_removed_at")):
                for project in connection.scalars(sa.select(table.c.project).distinct()).all():
                    rules = self.rules.of(project)
                    days = rules.keep_files_days if table is files else rules.keep_runs_days
                    before = 0 if days is None else now - int(days * 86_400)
                    if table is files:
                        is_over = (files.c.expires_at <= now) | (files.c.created_at < before)
                    else:
                        is_over = (jobs.c.finished_at < before) & jobs.c.id.not_in(kept_jobs)
                    rows = sa.update(table).where(table.c.project == project, table.c[done].is_(None), is_over)
                    what = "its run is removed, no model of it is left"
                    if table is files:
                        what = "its time is over"
                    gone = connection.scalars(rows.values({done: now}).returning(table.c.id))
                    lines += [f"{name}: {what}" for name in gone]
        if lines:
            self.remove_unused()
        return lines

    # Jobs

    def create_job(self, row: Record, messages: Sequence[Record]) -> Record:
        """The row of a new job, or the one with its id. Raises RequestError if too many of the project wait."""
        with self.writing() as connection:
            now = int(time.time())
            most = self.rules.of(PROJECT.get() or DEFAULT_PROJECT).jobs_waiting
            waiting = sa.select(sa.func.count()).select_from(jobs).where(*own(jobs), jobs.c.status.in_(WAITING))
            if (connection.scalar(waiting) or 0) >= most:
                message = f"{most} jobs of this project wait, and no more are taken. Try again when some have ended."
                raise RequestError(message, status=429, code="rate_limit_exceeded", headers={"Retry-After": "60"})
            new = self.insert_new(jobs).values(created_at=now, status="validating_files", **row)
            if is_new := connection.execute(new).rowcount:
                self._add_events(connection, messages)
        if is_new:
            self._announce(row["id"], "validating_files")
        return self.job(row["id"]) or {}

    def job(self, name: str) -> Record | None:
        return self.one(jobs, id=name)

    def with_status(self, *states: str) -> list[Record]:
        """Jobs in some states, oldest first."""
        return self._read(sa.select(jobs).where(jobs.c.status.in_(states)).order_by(jobs.c.seq))

    def act(self, name: str, action: Action, message: str) -> Record | None:
        """A client's action on a job; None: no such job. Raises RequestError if its state forbids it."""
        with self.writing() as connection:
            row = connection.execute(sa.select(jobs.c.status).where(*own(jobs), jobs.c.id == name)).first()
            if row is None:
                return None
            after = state_after(row.status, action, name)
            if after != row.status:
                ended = {"finished_at": int(time.time())} if after in ENDED else {}
                connection.execute(sa.update(jobs).where(jobs.c.id == name).values(status=after, **ended))
                self._queue_webhook(connection, name, after)
                # The events of this step, and of what is saved after it, come later than this one.
                message += RUN_STOPS if row.status == "running" else ""
                self._add_events(connection, [event(name, message)])
        if after != row.status:
            self._announce(name, after)
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
                self._queue_webhook(connection, name, values.get("status"))
                self._add_events(connection, messages)
        if done and "status" in values:
            self._announce(name, values["status"])
        return bool(done)

    def succeed(
        self, name: str, messages: Sequence[Record], *, model: Record, result: Record, trained_tokens: int
    ) -> bool:
        """Model, results, state and events of a job in one transaction; False: it was stopped before."""
        with self.writing() as connection:
            now = int(time.time())
            matches = sa.update(jobs).where(jobs.c.id == name, jobs.c.status == "running")
            values = {"result_file": result["id"], "trained_tokens": trained_tokens, "finished_at": now}
            project = connection.execute(sa.select(jobs.c.project).where(jobs.c.id == name)).scalar()
            if not connection.execute(matches.values(status="succeeded", **values)).rowcount:
                return False
            connection.execute(self.insert_new(files).values(created_at=now, project=project, **result))
            connection.execute(self.insert_new(models).values(created_at=now, project=project, **model))
            self._add_events(connection, messages)
            self._queue_webhook(connection, name, "succeeded")
        self._announce(name, "succeeded")
        return True

    def _announce(self, name: str, status: str) -> None:
        """Let `on_job` hear of a state that a transaction has written; meanwhile it may be another."""
        if (job := self.job(name)) is not None:
            self.on_job({**job, "status": status})

    def _queue_webhook(self, connection: sa.Connection, job: str, state: str | None) -> None:
        """Called in the transaction that ends a job, so that neither is there without the other."""
        if state not in ENDED:
            return
        project = connection.scalar(sa.select(jobs.c.project).where(jobs.c.id == job))
        if self.rules.of(project or "").webhook is not None:
            now, name = int(time.time()), derived_id("evt_", job, state)
            facts = {"id": name, "project": project, "job": job, "type": f"fine_tuning.job.{state}"}
            connection.execute(self.insert_new(webhooks).values(created_at=now, next_at=now, **facts))

    def due_webhooks(self) -> list[Record]:
        """The oldest of each project."""
        is_due = (webhooks.c.ended_at.is_(None), webhooks.c.next_at <= int(time.time()))
        first = sa.select(sa.func.min(webhooks.c.seq)).where(*is_due).group_by(webhooks.c.project)
        return self._read(sa.select(webhooks).where(webhooks.c.seq.in_(first)).order_by(webhooks.c.seq))

    # Events and models

    def add_events(self, messages: Sequence[Record]) -> None:
        if messages:
            with self.writing(only_events=True) as connection:
                self._add_events(connection, messages)

    def _add_events(self, connection: sa.Connection, messages: Sequence[Record]) -> None:
        if messages:
            connection.execute(self.insert_new(events), [dict(message) for message in messages])

    def tuned(self, **is_: Any) -> list[Record]:
        """Tuned models that were not deleted, oldest first."""
        statement = sa.select(models).where(*own(models), models.c.deleted_at.is_(None), *_are(models, is_))
        return self._read(statement.order_by(models.c.seq))

    def add_model(self, model: Record, messages: Sequence[Record]) -> None:
        with self.writing() as connection:
            connection.execute(self.insert_new(models).values(created_at=int(time.time()), **model))
            self._add_events(connection, messages)

    def open_jobs(self) -> list[Record]:
        """Jobs that have not ended, oldest first."""
        return self._read(sa.select(jobs).where(jobs.c.status.not_in(ENDED)).order_by(jobs.c.seq))

    def _needed_models(self) -> tuple[dict[str, Record], set[str]]:
        """All models by name; names of those not deleted, and of those that these or open jobs start from."""
        started = {
            row["id"]: row["request"].get("starts_from") for row in self._read(sa.select(jobs.c.id, jobs.c.request))
        }
        everything = {row["name"]: row for row in self._read(sa.select(models))}
        needed = set[str]()
        starts = [row["name"] for row in everything.values() if row["deleted_at"] is None]
        for first in (*starts, *(row["request"].get("starts_from") for row in self.open_jobs())):
            name = first
            while name is not None and name not in needed:
                needed.add(name)
                name = started[everything[name]["job"]]
        return everything, needed

    def remove_unused_weights(self) -> None:
        """Remove weights that no model needs any more: of deleted ones, and merged ones without an open job."""
        everything, needed = self._needed_models()
        in_use = {row["request"].get("starts_from") for row in self.open_jobs()}
        for name, row in everything.items():
            run = Run(self.model_path(row))
            weights = run.adapter_path if snapshot_step(name) is None else run.path
            for path in (
                *(() if name in needed else (weights,)),
                *(() if name in in_use else (run.merged_path,)),
            ):
                remove(path)

    def delete_model(self, name: str) -> None:
        self.update(models, {"deleted_at": int(time.time())}, name=name)

    # Projects

    def keys(self) -> dict[str, Record]:
        """All keys that were ever made, by id, oldest first. Where there is one, nobody gets in without one."""
        return {row["id"]: row for row in self._read(sa.select(keys).order_by(keys.c.seq))}

    def readers(self) -> dict[str, set[str]]:
        """Other projects that may ask a tuned model, by its name."""
        projects: dict[str, set[str]] = {}
        for row in self._read(sa.select(permissions)):
            projects.setdefault(row["model"], set()).add(row["reader"])
        return projects


def _are(table: sa.Table, is_: Record) -> Iterator[sa.ColumnElement[bool]]:
    return (table.c[name] == value for name, value in is_.items())
