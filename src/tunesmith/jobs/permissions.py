"""Routes by which a project lets others ask a tuned model of its own."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import Field, StringConstraints
from starlette.responses import Response

from tunesmith.jobs.engines import Engines
from tunesmith.jobs.names import new_id
from tunesmith.jobs.objects import list_object
from tunesmith.jobs.routes import after, missing, read_limit, read_query
from tunesmith.jobs.store import Store
from tunesmith.jobs.tables import permissions
from tunesmith.serve.protocol import RequestError
from tunesmith.serve.request_schemas import StrictModel, StrictRoute
from tunesmith.serve.responses import json_response
from tunesmith.types import JsonObject, Record

_Project = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,32}$")]


class ReadersBody(StrictModel):
    """POST …/permissions"""

    project_ids: list[_Project] = Field(min_length=1, max_length=100)


def make_permission_router(store: Store, engines: Engines) -> APIRouter:
    """List, give and take back permissions."""
    router = APIRouter(route_class=StrictRoute, prefix="/v1/fine_tuning/checkpoints/{model}/permissions")

    def check(model: str) -> None:
        if not store.tuned(name=model):
            raise missing("Checkpoint", model)

    @router.post("")
    def give(model: str, body: ReadersBody) -> Response:
        """Let projects ask a model."""
        check(model)
        for reader in dict.fromkeys(body.project_ids):
            if store.one(permissions, model=model, reader=reader) is None:
                store.insert(permissions, {"id": new_id("cp_"), "model": model, "reader": reader})
        engines.readers = store.readers()
        rows, _ = store.page(
            permissions, permissions.c.model == model, permissions.c.reader.in_(body.project_ids), limit=100
        )
        return json_response(list_object(list(map(_object, rows)), has_more=False))

    @router.get("")
    def listed(model: str, request: Request) -> Response:
        """Permissions of a model, newest first."""
        check(model)
        query = read_query(request, "after", "limit", "order", "project_id")
        if (order := query.get("order", "descending")) not in ("ascending", "descending"):
            raise RequestError("order: should be ascending or descending.", param="order")
        wanted = [permissions.c.reader == query["project_id"]] if "project_id" in query else []
        rows, more = store.page(
            permissions, permissions.c.model == model, *wanted, after=after(store, permissions, query, model=model),
            limit=read_limit(query, 10, 100), newest_first=order == "descending",
        )  # fmt: skip
        return json_response(list_object(list(map(_object, rows)), has_more=more))

    @router.delete("/{name}")
    def take_back(model: str, name: str) -> Response:
        """Let a project ask a model no longer."""
        check(model)
        if not store.delete(permissions, id=name, model=model):
            raise missing("Permission", name)
        engines.readers = store.readers()
        return json_response({"id": name, "object": "checkpoint.permission", "deleted": True})

    return router


def _object(row: Record) -> JsonObject:
    columns = {"id": row["id"], "created_at": row["created_at"], "project_id": row["reader"]}
    return {"object": "checkpoint.permission", **columns}
