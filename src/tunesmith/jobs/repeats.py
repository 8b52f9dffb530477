"""Requests that a client sends again because their answer was lost: OpenAI's clients count them in a header.

A client that sends an Idempotency-Key gets one job for it, however often and from wherever it is sent.
"""

from __future__ import annotations

import hashlib
import time

from fastapi import Request

from tunesmith.jobs.job_request import JobBody
from tunesmith.jobs.names import DEFAULT_PROJECT, derived_id
from tunesmith.jobs.store import Store
from tunesmith.jobs.tables import files, jobs
from tunesmith.serve.middleware import PROJECT
from tunesmith.serve.protocol import RequestError
from tunesmith.types import Record

LOST_S = 120
"""Longest time between a request and the last one of its repeats."""


def retry_count(request: Request) -> int:
    """Number of times this request was sent before; 0 for a client that does not say."""
    text = request.headers.get("x-stainless-retry-count", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 0


def digest_of(body: JobBody) -> str:
    """SHA-256 of what a request says."""
    return hashlib.sha256(body.model_dump_json().encode()).hexdigest()


def keyed_id(key: str) -> str:
    """The id of the one job of this project that a client makes with an Idempotency-Key."""
    return derived_id("ftjob-", PROJECT.get() or DEFAULT_PROJECT, "key", key)


def job_made_with(store: Store, key: str, body: JobBody) -> Record | None:
    """The job that was made with this key. Raises RequestError if another request made it."""
    row = store.job(keyed_id(key))
    if row is not None and row["request"].get("sent") != digest_of(body):
        message = "Idempotency-Key: was used for a job that says something else. Use a new one for each job."
        raise RequestError(message, status=422, code="idempotency_error", headers={"x-should-retry": "false"})
    return row


def job_made_before(store: Store, body: JobBody, retry: int) -> Record | None:
    """The job that an earlier try of this request made. Equal requests that are no repeats make two jobs."""
    if not retry:
        return None
    sent = digest_of(body)
    since = jobs.c.created_at >= int(time.time()) - LOST_S
    rows, _ = store.page(jobs, since, limit=1, keeps=lambda row: row["request"].get("sent") == sent)
    if not rows or rows[0]["request"]["retry"] >= retry:  # that try has its job already
        return None
    store.update(jobs, {"request": {**rows[0]["request"], "retry": retry}}, id=rows[0]["id"])
    return store.job(rows[0]["id"])


def file_made_before(store: Store, row: Record, retry: int) -> Record | None:
    """The file that an earlier try of this upload made."""
    if not retry:
        return None
    alike = (files.c[name] == row[name] for name in ("sha256", "purpose", "filename"))
    since = files.c.created_at >= int(time.time()) - LOST_S
    rows, _ = store.page(files, files.c.deleted_at.is_(None), since, *alike, limit=1)
    return rows[0] if rows else None
