"""The tables of a store. `migrations` makes them; a test holds the two against each other."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa

from tunesmith.jobs.names import DEFAULT_PROJECT
from tunesmith.serve.middleware import PROJECT

"""A row of a table, by the names of its columns."""

TABLES = sa.MetaData()
BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""Seconds since 1970, bytes and numbers of rows: SQLite counts up by itself only in an INTEGER."""


def _table(name: str, *columns: sa.Column[Any]) -> sa.Table:
    # Never an id again, so that pages keep their order.
    seq = sa.Column("seq", BIG, primary_key=True)
    created = sa.Column("created_at", BIG, nullable=False)
    return sa.Table(name, TABLES, seq, created, *columns, sqlite_autoincrement=True)


def _owned() -> sa.Column[Any]:
    """The project that a row belongs to: the request that makes the row decides."""
    return sa.Column("project", sa.String, nullable=False, index=True, default=lambda: PROJECT.get() or DEFAULT_PROJECT)


def own(table: sa.Table) -> tuple[sa.ColumnElement[bool], ...]:
    """The condition by which a request finds rows of its own project only. Outside of requests: all rows."""
    project = PROJECT.get()
    return () if project is None or "project" not in table.c else (table.c.project == project,)


def is_live() -> sa.ColumnElement[bool]:
    """The condition that a file was not deleted, and its time is not over."""
    return files.c.deleted_at.is_(None) & (files.c.expires_at.is_(None) | (files.c.expires_at > int(time.time())))


def is_pending() -> sa.ColumnElement[bool]:
    """The condition that an upload in parts can be completed still."""
    return (uploads.c.status == "pending") & (uploads.c.expires_at > int(time.time()))


files = _table(
    "files",
    _owned(),
    sa.Column("id", sa.String, unique=True, nullable=False),
    sa.Column("purpose", sa.String, nullable=False),
    sa.Column("filename", sa.String, nullable=False),
    sa.Column("bytes", BIG, nullable=False),
    sa.Column("sha256", sa.String, nullable=False),
    sa.Column("expires_at", BIG),
    sa.Column("deleted_at", BIG),
)
uploads = _table(
    "uploads",
    _owned(),
    sa.Column("id", sa.String, unique=True, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("bytes", BIG, nullable=False),
    sa.Column("filename", sa.String, nullable=False),
    sa.Column("purpose", sa.String, nullable=False),
    sa.Column("expires_at", BIG, nullable=False),
    sa.Column("expires_after_s", BIG),  # of the file that is made
    sa.Column("part_ids", sa.JSON(none_as_null=True)),
    sa.Column("file", sa.String),
)
jobs = _table(
    "jobs",
    _owned(),
    sa.Column("id", sa.String, unique=True, nullable=False),
    sa.Column("status", sa.String, nullable=False, index=True),
    sa.Column("finished_at", BIG),
    sa.Column("base", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),  # as shown: of an alias the dated name
    sa.Column("tuned_name", sa.String, nullable=False),
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("numbers", sa.JSON, nullable=False),  # hyperparameters, "auto" until they are chosen
    sa.Column("is_checked", sa.Boolean, nullable=False, default=False),
    sa.Column("trained_tokens", BIG),
    sa.Column("result_file", sa.String),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),  # starts without a new checkpoint between
    sa.Column("last_checkpoint", sa.Integer, nullable=False, default=-1),
    sa.Column("run_removed_at", BIG),
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
    _owned(),
    sa.Column("name", sa.String, unique=True, nullable=False),
    sa.Column("job", sa.String, nullable=False, index=True),
    sa.Column("base", sa.String, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("deleted_at", BIG),
)
webhooks = _table(
    "webhooks",
    sa.Column("id", sa.String, unique=True, nullable=False),
    sa.Column("project", sa.String, nullable=False),
    sa.Column("job", sa.String, nullable=False),
    sa.Column("type", sa.String, nullable=False),
    sa.Column("next_at", BIG, nullable=False, index=True),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("ended_at", BIG),  # taken, or given up
    sa.Column("failure", sa.String),
)
keys = _table(
    "keys",
    sa.Column("id", sa.String, unique=True, nullable=False),
    sa.Column("project", sa.String, nullable=False),
    sa.Column("label", sa.String, nullable=False),
    sa.Column("digest", sa.String, nullable=False),  # SHA-256 of the key, in hex
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("expires_at", BIG),
    sa.Column("revoked_at", BIG),
    sa.Column("used_at", BIG),
)
permissions = _table(
    "permissions",
    sa.Column("id", sa.String, unique=True, nullable=False),
    sa.Column("model", sa.String, nullable=False, index=True),
    sa.Column("reader", sa.String, nullable=False),  # a project that may ask it
)
stores = _table("stores", sa.Column("id", sa.String, unique=True, nullable=False))
"""One row: the id that the folder of contents and runs has, too."""
