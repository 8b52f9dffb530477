"""OpenAI's routes that check a grader, and try it on one answer."""

from __future__ import annotations

import threading
import time

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from tunesmith.errors import InputError
from tunesmith.graders import schema
from tunesmith.graders.grade import Answer, Grade
from tunesmith.graders.openai_object import object_of
from tunesmith.graders.pool import TOO_DEEP, Pool
from tunesmith.graders.strangers import RUNS_CODE, GraderRefusedError, GraderRules, runnable
from tunesmith.serve.protocol import RequestError
from tunesmith.serve.request_schemas import Parameters, StrictRoute
from tunesmith.serve.responses import json_response
from tunesmith.types import JsonObject

MOST_AT_ONCE = 2
"""Graders that are tried at the same time."""


def checked(sent: JsonObject, rules: GraderRules, place: str) -> JsonObject:
    """A client's grader as it runs here. Raises RequestError for one that does not."""
    try:
        return runnable(sent, rules, place)
    except GraderRefusedError as error:
        raise RequestError(str(error), code=error.code, param=error.place) from None


class GraderBody(Parameters):
    """POST …/graders/validate"""

    grader: JsonObject


class TrialBody(GraderBody):
    """POST …/graders/run"""

    model_sample: str
    item: JsonObject = Field(default_factory=dict)
    """The row."""


def make_grader_router(rules: GraderRules) -> APIRouter:
    """Check a grader, and try it."""
    router = APIRouter(route_class=StrictRoute, prefix="/v1/fine_tuning/alpha/graders")
    places = threading.BoundedSemaphore(MOST_AT_ONCE)

    @router.post("/validate")
    def validate(body: GraderBody) -> Response:
        """Check a grader. Nothing of it is run."""
        checked(body.grader, rules, "grader")
        return json_response({"grader": body.grader})

    @router.post("/run")
    def run(body: TrialBody) -> Response:
        """Grade one answer."""
        grader = schema.from_value(checked(body.grader, rules, "grader"), place="grader")
        if not places.acquire(blocking=False):
            message = f"{MOST_AT_ONCE} graders are being tried, as many as there may be at once. Try again."
            raise RequestError(message, status=429, code="rate_limit_exceeded")
        try:
            return json_response(_trial(grader, body))
        finally:
            places.release()

    return router


def _trial(grader: schema.Grader, body: TrialBody) -> JsonObject:
    began = time.monotonic()
    try:
        with Pool(grader) as pool:
            grade = pool.submit(Answer(body.model_sample), body.item).result()
    except InputError as error:  # its code ends while it is loaded, or a judge has no key
        loads_code = any(part.type in RUNS_CODE for part in schema.parts_of(grader).values())
        grade = Grade(None, {}, "exception" if loads_code else "unreachable", str(error))
    except RecursionError:
        grade = Grade(None, {}, "exception", TOO_DEEP)
    return object_of(grader, grade, time.monotonic() - began)
