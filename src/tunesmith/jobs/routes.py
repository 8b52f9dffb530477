"""OpenAI's routes of files, fine-tuning jobs and tuned models over a store."""

from __future__ import annotations

import asyncio
import difflib
import os
import re
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from tunesmith.errors import InputError
from tunesmith.jobs import objects
from tunesmith.jobs.bases import Bases
from tunesmith.jobs.grader_routes import checked
from tunesmith.jobs.job_request import GRADER, JobBody
from tunesmith.jobs.kept_answers import KeptAnswers
from tunesmith.jobs.names import DEFAULT_PROJECT, new_id, tuned_name
from tunesmith.jobs.repeats import digest_of, job_made_before, job_made_with, keyed_id, retry_count
from tunesmith.jobs.states import Action, JobState
from tunesmith.jobs.store import Store, event
from tunesmith.jobs.tables import events, files, is_live, jobs
from tunesmith.jobs.upload_parts import JoinBody, UploadBody, add_part, cancel_upload, complete_upload, create_upload
from tunesmith.jobs.uploads import receive_file
from tunesmith.serve.middleware import PROJECT
from tunesmith.serve.protocol import RequestError
from tunesmith.serve.request_schemas import StrictRoute
from tunesmith.serve.responses import REPORT_POLICY, json_response
from tunesmith.trackers.libraries import check_names
from tunesmith.types import JsonObject, Record

_METADATA = re.compile(r"metadata\[(.+)\]", re.DOTALL)
_SAID: dict[Action, str] = {
    "cancel": "Fine-tuning job cancelled",
    "pause": "Fine-tuning job paused",
    "resume": "Fine-tuning job resumed",
}
_LEADS_TO: dict[Action, JobState] = {"cancel": "cancelled", "pause": "paused", "resume": "queued"}
Detach = Callable[[str], Awaitable[None]]


def read_query(request: Request, *allowed: str) -> dict[str, str]:
    """The parameters of a URL. Raises RequestError for an unknown one, or one given twice."""
    query: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in allowed and not ("metadata" in allowed and _METADATA.fullmatch(name)):
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f", did you mean {near[0]}?" if near else f"; there are {', '.join(allowed) or 'none'}."
            raise RequestError(f"{name[:60]}: unknown parameter{hint}", code="unknown_parameter", param=name[:60])
        if name in query:
            raise RequestError(f"{name[:60]}: is given twice.", param=name[:60])
        query[name] = value
    return query


def read_limit(query: dict[str, str], usual: int, most: int) -> int:
    text = query.get("limit", str(usual))
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) > most:
        raise RequestError(f"limit: should be a whole number from 0 to {most:,}.", param="limit")
    return int(text)


def missing(kind: str, name: str) -> RequestError:
    return RequestError(f"No such {kind} object: {name[:80]}", status=404, code="not_found", param="id")


def make_file_router(store: Store) -> APIRouter:
    """Upload, list, read and delete files."""
    router = APIRouter(route_class=StrictRoute)

    def find(name: str) -> Record:
        if (row := store.file(name)) is None:
            raise missing("File", name)
        return row

    @router.post("/v1/files")
    async def upload(request: Request) -> Response:
        """Store a file."""
        read_query(request)
        return json_response(objects.file_object(await receive_file(request, store)))

    @router.get("/v1/files")
    def listed(request: Request) -> Response:
        """All files, newest first."""
        query = read_query(request, "after", "limit", "order", "purpose")
        if query.get("order", "desc") not in ("asc", "desc"):
            raise RequestError("order: should be asc or desc.", param="order")
        wanted = [files.c.purpose == query["purpose"]] if "purpose" in query else []
        rows, more = store.page(
            files, is_live(), *wanted,
            after=after(store, files, query), limit=read_limit(query, 10_000, 10_000),
            newest_first=query.get("order", "desc") == "desc",
        )  # fmt: skip
        return json_response(objects.list_with_ends([objects.file_object(row) for row in rows], has_more=more))

    @router.get("/v1/files/{name}")
    def one(name: str, request: Request) -> Response:
        """One file."""
        read_query(request)
        return json_response(objects.file_object(find(name)))

    @router.get("/v1/files/{name}/content")
    def content(name: str, request: Request) -> Response:
        """The content of a file, as it was sent."""
        read_query(request)
        row = find(name)
        path = store.content_path(row["id"])
        if path.is_symlink() or not path.is_file():
            message = f"{name}: its content was removed from the store by hand. Delete the file, and upload it again."
            raise RequestError(message, status=404, code="content_missing", param="id")
        headers = {"Content-Disposition": f"attachment; filename*=utf-8''{quote(row['filename'], safe='')}"}
        return FileResponse(path, headers=headers, media_type="application/octet-stream")

    @router.delete("/v1/files/{name}")
    def delete(name: str, request: Request) -> Response:
        """Delete a file. What a job needs stays until it has ended."""
        read_query(request)
        if not store.delete_file(name):
            raise missing("File", name)
        return json_response({"id": name, "object": "file", "deleted": True})

    return router


def make_upload_router(store: Store) -> APIRouter:
    """Uploads in parts."""
    router = APIRouter(route_class=StrictRoute, prefix="/v1/uploads")

    def answer(row: Record) -> Response:
        file = store.one(files, id=row["file"]) if row["file"] else None
        return json_response(objects.upload_object(row, file))

    @router.post("")
    def create(body: UploadBody) -> Response:
        """Begin an upload in parts."""
        return answer(create_upload(store, body))

    @router.post("/{name}/parts")
    async def part(name: str, request: Request) -> Response:
        """Add a part."""
        part_id = await add_part(request, store, name)
        facts = {"id": part_id, "object": "upload.part", "created_at": int(time.time()), "upload_id": name}
        return json_response(facts)

    @router.post("/{name}/complete")
    def complete(name: str, body: JoinBody) -> Response:
        """Join parts to a file, in the order given."""
        return answer(complete_upload(store, name, body))

    @router.post("/{name}/cancel")
    def cancel(name: str) -> Response:
        """Drop an upload with its parts."""
        return answer(cancel_upload(store, name))

    return router


def after(store: Store, table: Any, query: dict[str, str], **is_: str) -> int | None:
    """The number of the row that a page follows. Raises RequestError for one that is not there."""
    if "after" not in query:
        return None
    if (row := store.one(table, id=query["after"], **is_)) is None:
        raise RequestError(f"after: there is no {query['after'][:80]!r}.", param="after")
    return int(row["seq"])


def find_job(store: Store, name: str) -> Record:
    """Raises RequestError."""
    if (row := store.job(name)) is None:
        raise missing("FineTuningJob", name)
    return row


def make_job_router(store: Store, bases: Bases) -> APIRouter:
    """Create, list, read and steer jobs, and read their events and checkpoints."""
    router, answers = APIRouter(route_class=StrictRoute, prefix="/v1/fine_tuning/jobs"), KeptAnswers(store)

    @router.post("")
    def create(body: JobBody, request: Request) -> Response:
        """Put a job into the queue."""
        read_query(request)
        retry, key = retry_count(request), request.headers.get("idempotency-key")
        earlier = job_made_with(store, key, body) if key else job_made_before(store, body, retry)
        row = earlier or create_job(store, bases, body, retry=retry, key=key)
        return json_response(objects.job_object(row))

    @router.get("")
    def listed(request: Request) -> Response:
        """All jobs, newest first."""
        query = read_query(request, "after", "limit", "metadata")
        wanted = {match[1]: value for key, value in query.items() if (match := _METADATA.fullmatch(key))}
        if query.get("metadata", "null") != "null" or ("metadata" in query and wanted):
            raise RequestError("metadata: should be null, or metadata[key]=value for each pair.", param="metadata")

        def keeps(row: Record) -> bool:
            metadata = row["request"]["metadata"]
            return not metadata if "metadata" in query else wanted.items() <= (metadata or {}).items()

        def read() -> JsonObject:
            limit = read_limit(query, 20, 100)
            rows, more = store.page(jobs, after=after(store, jobs, query), limit=limit, keeps=keeps)
            return objects.list_object([objects.job_object(row) for row in rows], has_more=more)

        return answers.keep(request, read)

    @router.get("/{name}")
    def one(name: str, request: Request) -> Response:
        """One job."""
        read_query(request)
        return answers.keep(request, lambda: objects.job_object(find_job(store, name)))

    @router.get("/{name}/report.html")
    def report(name: str, request: Request) -> Response:
        """The report of a job that has succeeded, as a page."""
        read_query(request)
        path = store.runs_path / find_job(store, name)["id"] / "report.html"
        if not path.is_file():
            raise RequestError(f"{name}: it has no report yet.", status=404, code="not_found", param="id")
        return FileResponse(path, headers={"Content-Security-Policy": REPORT_POLICY}, media_type="text/html")

    @router.post("/{name}/{action}")
    def act(name: str, action: Action, request: Request) -> Response:
        """Cancel, pause or resume a job. Its run stops after its step."""
        read_query(request)
        row = store.job(name)
        if row is not None and retry_count(request) and row["status"] == _LEADS_TO[action]:
            return json_response(objects.job_object(row))  # the answer of the first try was lost
        if (row := store.act(name, action, _SAID[action])) is None:
            raise missing("FineTuningJob", name)
        return json_response(objects.job_object(row))

    _add_event_routes(router, store)
    return router


def _add_event_routes(router: APIRouter, store: Store) -> None:
    @router.get("/{name}/events")
    def events_of(name: str, request: Request) -> Response:
        """Events of a job, newest first."""
        query = read_query(request, "after", "limit")
        job, limit = find_job(store, name)["id"], read_limit(query, 20, 1000)
        start = after(store, events, query, job=job)
        rows, more = store.page(events, events.c.job == job, after=start, limit=limit)
        return json_response(objects.list_object([objects.event_object(row) for row in rows], has_more=more))

    @router.get("/{name}/checkpoints")
    def checkpoints(name: str, request: Request) -> Response:
        """Checkpoints of a job that are served, newest first."""
        query = read_query(request, "after", "limit")
        limit = read_limit(query, 10, 100)
        listed = [objects.checkpoint_object(row) for row in store.tuned(job=find_job(store, name)["id"])[::-1]]
        if "after" in query:
            names = [checkpoint["id"] for checkpoint in listed]
            if query["after"] not in names:
                raise RequestError(f"after: there is no {query['after'][:80]!r}.", param="after")
            listed = listed[names.index(query["after"]) + 1 :]
        return json_response(objects.list_with_ends(listed[:limit], has_more=limit > 0 and len(listed) > limit))


def create_job(store: Store, bases: Bases, body: JobBody, *, retry: int = 0, key: str | None = None) -> Record:
    """The row of a new job, or of the one that a request with the same key has just made.

    Raises RequestError for a model, a file or a service that is not there, and for a
    grader that is not allowed.
    """
    base, shown, parent = _start(store, bases, body.model)
    if body.grader is not None:
        checked(body.grader, bases.graders, GRADER)
    for param in ("training_file", "validation_file"):
        _check_file(store, param, getattr(body, param))
    integrations = [integration.model_dump(exclude_none=True) for integration in body.integrations or ()]
    if integrations:
        _check_wandb()
    name, numbers = keyed_id(key) if key else new_id("ftjob-"), body.chosen
    request = {
        "model": body.model, "training_file": body.training_file, "validation_file": body.validation_file,
        "suffix": body.suffix, "seed": secrets.randbelow(2**31) if body.seed is None else body.seed,
        "metadata": body.metadata, "integrations": integrations, "hyperparameters": numbers, "method": body.kind,
        "starts_from": parent, "sent": digest_of(body), "retry": retry, "grader": body.grader,
    }  # fmt: skip
    messages = [event(name, f"Created fine-tuning job: {name}")]
    if parent is not None:
        messages.append(event(name, f"{parent} is merged into its base, and the result is tuned further"))
    elif body.model != base:
        messages.append(event(name, f"{body.model} is a name of {base} here: that model is tuned"))
    if body.validation_file == body.training_file:
        text = "The validation file is the training file: measured on it, the model shows what it learnt by heart"
        messages.append(event(name, text, level="warn"))
    which = f"Validating training file: {body.training_file}"
    which += f" and validation file: {body.validation_file}" if body.validation_file else ""
    messages.append(event(name, which))
    project = PROJECT.get() or DEFAULT_PROJECT
    row = {"id": name, "base": base, "model": shown, "tuned_name": tuned_name(shown, project, body.suffix, name)}
    made = store.create_job({**row, "request": request, "numbers": numbers}, messages)
    return (job_made_with(store, key, body) if key else None) or made


def _start(store: Store, bases: Bases, name: str) -> tuple[str, str, str | None]:
    """The base of a request's model, the name that its job shows, and its own if it is a tuned one."""
    if name in bases.names:
        return (*bases.names[name], None)
    tuned = store.tuned(name=name)
    if tuned and tuned[0]["base"] in bases.bases:
        return tuned[0]["base"], find_job(store, tuned[0]["job"])["model"], name
    message = f"Model {name[:200]} is not available for fine-tuning or does not exist. "
    message += f"There are: {', '.join(bases.names)}, and tuned models by their names."
    raise RequestError(message, code="model_not_available", param="model")


def _check_file(store: Store, param: str, name: str | None) -> None:
    row = store.file(name) if name is not None else None
    if name is not None and row is None:
        raise RequestError(f"invalid {param}: {name[:80]}", param=param, code="file_not_found")
    if row is not None and row["purpose"] != "fine-tune":
        message = f"invalid {param}: {name or '':.80}: its purpose is {row['purpose']}, and has to be fine-tune."
        raise RequestError(message, param=param, code="invalid_purpose")


def _check_wandb() -> None:
    """Raises RequestError if nothing could be sent from here."""
    try:
        check_names(["wandb"])
        is_offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        if not (is_offline or os.environ.get("WANDB_API_KEY")):
            raise InputError("the server has no key: set WANDB_API_KEY (or WANDB_MODE=offline) where it is started.")
    except InputError as error:  # clients see no paths of this machine
        message = f"integrations: wandb: on the server: {str(error).replace(sys.executable, 'python')}"
        raise RequestError(message, param="integrations", code="integration_failed") from None


def make_model_router(store: Store, bases: Bases, detach: Detach) -> APIRouter:
    """Delete tuned models."""
    router = APIRouter(route_class=StrictRoute)

    @router.delete("/v1/models/{name:path}")
    async def delete(name: str) -> Response:
        """Delete a tuned model with its weights; events and results of its job stay."""
        if name in bases.names:
            raise RequestError(f"The model '{name}' is a base and cannot be deleted.", param="model")
        tuned = store.tuned(name=name)
        if not tuned:
            message = f"The model '{name[:200]}' does not exist"
            raise RequestError(message, status=404, code="model_not_found", param="model")
        if users := [job["id"] for job in store.open_jobs() if job["request"].get("starts_from") == name]:
            message = f"The model '{name}' is being tuned further by {users[0]}. Wait for that, or cancel it."
            raise RequestError(message, param="model", code="model_in_use")
        await detach(name)
        store.delete_model(name)
        await asyncio.to_thread(store.remove_unused_weights)
        return json_response({"id": name, "object": "model", "deleted": True})

    return router
