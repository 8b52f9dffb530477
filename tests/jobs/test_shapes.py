"""Every answer in the shape that OpenAI publishes: by the types of its package, and by its OpenAPI description.

The description is not part of this repository: OPENAI_DESCRIPTION names a copy of openapi.json of
github.com/openai/openai-openapi. What differs was written down at its commit f85dbe223d40.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the openai package is the client of these tests")

from openai.types import FileDeleted, FileObject, Model, ModelDeleted, Upload  # noqa: E402
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent  # noqa: E402
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint  # noqa: E402
from openai.types.shared import ErrorObject  # noqa: E402
from openai.types.uploads import UploadPart  # noqa: E402
from pydantic import BaseModel, ValidationError  # noqa: E402

from jobs.places import FakeLauncher, FakeModels, dispatcher, pairs, put_file, put_job, rows  # noqa: E402
from jobs.served import Served, serving  # noqa: E402

DIFFERENCES = {
    ("FineTuningJob", "error.code"), ("FineTuningJob", "error.message"),  # an object of nulls, which scripts read
    ("FineTuningJob", "status"),  # paused, which OpenAI's own example of a pause has and its list of states lacks
    ("FineTuningJob", "tunesmith"),  # ours
    ("FineTuningJob", "user_provided_suffix"), ("FineTuningJob", "usage_metrics"),  # in recorded answers only
    ("FineTuningJob", "shared_with_openai"),  # as these
    ("OpenAIFile", "status_details"), ("Upload", "file.status_details"),  # null, as in recorded answers
    ("ListFilesResponse", "first_id"), ("ListFilesResponse", "last_id"),  # null in an empty list
    *(("Model", name) for name in ("task", "answers", "max_tokens", "base", "labels", "tool_calls")),  # ours
}  # fmt: skip
"""(schema, place) of what differs on purpose; docs/guide/jobs.md has the reasons."""
TYPES: dict[str, type[BaseModel]] = {
    "FineTuningJob": FineTuningJob, "FineTuningJobEvent": FineTuningJobEvent,
    "FineTuningJobCheckpoint": FineTuningJobCheckpoint, "OpenAIFile": FileObject, "DeleteFileResponse": FileDeleted,
    "Upload": Upload, "UploadPart": UploadPart, "Model": Model, "DeleteModelResponse": ModelDeleted,
    "Error": ErrorObject,
}  # fmt: skip
LISTS = {
    "ListFilesResponse": "OpenAIFile", "ListPaginatedFineTuningJobsResponse": "FineTuningJob",
    "ListFineTuningJobEventsResponse": "FineTuningJobEvent",
    "ListFineTuningJobCheckpointsResponse": "FineTuningJobCheckpoint", "ListModelsResponse": "Model",
}  # fmt: skip


WRONG = (
    *(("GET", f"/{place}/x", None) for place in ("files", "fine_tuning/jobs", "models", "uploads", "nothing")),
    *(("GET", f"/{place}?limit=x", None) for place in ("files", "fine_tuning/jobs", "fine_tuning/jobs/x/events")),
    ("GET", "/files?after=x", None), ("GET", "/files?limt=1", None), ("DELETE", "/files/x", None),
    ("DELETE", "/models/tiny", None), ("DELETE", "/models/ft:x", None), ("PUT", "/files", None),
    ("POST", "/files", {"file": "x"}), ("POST", "/uploads", {}), ("POST", "/fine_tuning/jobs", []),
    ("POST", "/fine_tuning/jobs", {"model": "none", "training_file": "file-a"}),
    ("POST", "/fine_tuning/jobs", {"model": "tiny", "training_file": "file-a", "method": {"type": "reinforcement"}}),
    ("POST", "/fine_tuning/jobs/x/cancel", None), ("POST", "/uploads/x/complete", {"part_ids": ["part_a"]}),
    ("POST", "/chat/completions", {"model": "none", "messages": [{"role": "user", "content": "a"}]}),
    ("POST", "/completions", {"model": "none", "prompt": "a"}),
)  # fmt: skip
"""Requests that are refused, each by a rule of its own."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, dict[str, Any]]]:
    """(name of the schema, answer) of a conversation with each route and each state of a job."""
    found: list[tuple[str, dict[str, Any]]] = []
    with serving(tmp_path_factory.mktemp("served")) as served:
        for schema, answer in _conversation(served):
            assert schema == "ErrorResponse" or "type" not in (answer.get("error") or {}), answer
            found.append((schema, answer))
    return found


def _conversation(served: Served) -> Iterator[tuple[str, dict[str, Any]]]:
    def ask(method: str, path: str, body: Any = None) -> dict[str, Any]:
        return dict(served.running.ask(method, f"/v1{path}", body)[1])

    store = served.store
    yield "ListFilesResponse", ask("GET", "/files")
    put_file(store, rows(12))
    put_file(store, pairs(12), "file-b")
    upload = ask("POST", "/uploads", {"bytes": 4, "filename": "a", "mime_type": "text/plain", "purpose": "user_data"})
    part = served.client.uploads.parts.create(upload["id"], data=("part", b"text"))
    yield "Upload", upload
    yield "UploadPart", part.model_dump()
    yield "Upload", ask("POST", f"/uploads/{upload['id']}/complete", {"part_ids": [part.id]})
    working = dispatcher(store, FakeLauncher(), FakeModels())
    dpo = put_job(store, "file-b", validation_file="file-b", method={"type": "dpo"}, suffix="x", metadata={"a": "b"})
    names = [put_job(store, "file-a"), dpo, put_job(store, "file-b"), put_job(store, "file-a")]
    yield "FineTuningJob", ask("GET", f"/fine_tuning/jobs/{names[0]}")
    for action in ("pause", "resume", "cancel"):
        yield "FineTuningJob", ask("POST", f"/fine_tuning/jobs/{names[3]}/{action}")
    for step in range(40):
        working.round()
        if step == 3:
            yield "FineTuningJob", ask("GET", f"/fine_tuning/jobs/{names[0]}")
    states = [store.job(name)["status"] for name in names]
    assert states == ["succeeded", "succeeded", "failed", "cancelled"]
    for name in names:
        yield "FineTuningJob", ask("GET", f"/fine_tuning/jobs/{name}")
        yield "ListFineTuningJobEventsResponse", ask("GET", f"/fine_tuning/jobs/{name}/events?limit=100")
        yield "ListFineTuningJobCheckpointsResponse", ask("GET", f"/fine_tuning/jobs/{name}/checkpoints")
    yield "ListPaginatedFineTuningJobsResponse", ask("GET", "/fine_tuning/jobs")
    yield "ListFilesResponse", ask("GET", "/files")
    yield "OpenAIFile", ask("GET", f"/files/{store.job(names[0])['result_file']}")
    yield "DeleteFileResponse", ask("DELETE", "/files/file-b")
    yield "ListModelsResponse", ask("GET", "/models")
    yield "Model", ask("GET", "/models/support")
    tuned = store.job(names[0])["tuned_name"]
    yield "DeleteModelResponse", ask("DELETE", f"/models/{tuned}")
    for method, path, body in WRONG:
        yield "ErrorResponse", ask(method, path, body)


def test_answers_have_the_types_of_the_package(answers: list[tuple[str, dict[str, Any]]]) -> None:
    """Strictly: nothing is converted, and there is no field that the types do not have."""
    found = set()
    for schema, answer in answers:
        one = LISTS.get(schema)
        for body in answer["data"] if one else [answer]:
            name = "Error" if schema == "ErrorResponse" else one or schema
            value = body["error"] if name == "Error" else body
            try:
                found |= {(name, place) for place in _extras(TYPES[name].model_validate(value, strict=True))}
            except ValidationError as error:
                for problem in error.errors():
                    found.add((name, ".".join(str(part) for part in problem["loc"])))
    assert found - DIFFERENCES == set()


def _extras(value: Any, place: str = "") -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield from (f"{place}{name}" for name in value.model_extra or ())
        for name in type(value).model_fields:
            yield from _extras(getattr(value, name), f"{place}{name}.")


def test_answers_follow_the_published_description(answers: list[tuple[str, dict[str, Any]]]) -> None:
    if not (path := os.environ.get("OPENAI_DESCRIPTION")):
        pytest.skip("OPENAI_DESCRIPTION names no copy of openapi.json of github.com/openai/openai-openapi")
    jsonschema = pytest.importorskip("jsonschema", reason="it reads the description")
    # Its bounds are written as in OpenAPI 3.0: true was no number there.
    whole = json.loads(Path(path).read_text("utf-8").replace('"exclusiveMinimum": true', '"exclusiveMinimum": 0'))
    found = set()
    for schema, answer in answers:
        rule = {"$ref": f"#/components/schemas/{schema}", "components": whole["components"]}
        for error in jsonschema.Draft202012Validator(rule).iter_errors(answer):
            found |= {(LISTS.get(schema, schema), place) for place in _places(error)}
            found |= {(schema, place) for place in _places(error) if place in ("first_id", "last_id")}
    found -= {(LISTS["ListFilesResponse"], "first_id"), (LISTS["ListFilesResponse"], "last_id")}
    assert found - DIFFERENCES == set()


def _places(error: Any) -> set[str]:
    """Places of the innermost errors, from the object that is described."""
    if error.context:
        deepest = max(len(one.absolute_path) for one in error.context)
        return {place for one in error.context if len(one.absolute_path) == deepest for place in _places(one)}
    parts = [str(part) for part in error.absolute_path]
    return {".".join(parts[2:] if parts[:1] == ["data"] else parts)}
