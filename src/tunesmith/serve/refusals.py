"""Answers that are no: one shape, OpenAI's, whatever the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tunesmith.serve.protocol import Refused

RETRY_AFTER_S = 1
"""What a client is told to wait where there is no room now."""
SHOWN_PROBLEMS = 10
NOT_FOUND = "There is nothing here by this path. GET /openapi.json lists what there is."
NO_RESPONSES = (
    "The Responses API is not served here: ask by POST /v1/chat/completions (in OpenAI's package "
    "client.chat.completions.create), which takes the same messages."
)

_TYPES = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error"}


class Refusal(HTTPException):
    """A request that is not answered, in words for its sender. An HTTPException, so that FastAPI lets it pass."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers) if headers else None)
        self.code = code
        self.param = param


def error_body(status: int, code: str | None, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of an answer of this status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refused_body(refused: Refused) -> dict[str, Any]:
    """The same for what an engine said no to."""
    return error_body(refused.status, refused.code, str(refused), refused.param)


def as_response(refusal: Refusal | Refused) -> Response:
    """The answer that says it."""
    if isinstance(refusal, Refused):
        status, body, headers = refusal.status, refused_body(refusal), {}
    else:
        status = refusal.status_code
        body = error_body(status, refusal.code, refusal.detail, refusal.param)
        headers = dict(refusal.headers or {})
    if status in (429, 503):
        headers.setdefault("Retry-After", str(RETRY_AFTER_S))
    return Response(orjson.dumps(body), status, headers, "application/json")


async def on_refused(request: Request, error: Exception) -> Response:
    """For FastAPI: what a Refusal, or a Refused of the engine, is answered with."""
    assert isinstance(error, (Refusal, Refused))
    return as_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """For FastAPI: a path or a method that is not there."""
    assert isinstance(error, HTTPException)
    if isinstance(error, Refusal):
        return as_response(error)
    is_responses = request.url.path.startswith("/v1/responses")
    messages = {
        404: ("not_found", NO_RESPONSES if is_responses else NOT_FOUND),
        405: ("method_not_allowed", "This path takes another method. GET /openapi.json lists them."),
    }
    code, message = messages.get(error.status_code, ("error", str(error.detail)))
    return as_response(Refusal(error.status_code, code, message, headers=error.headers))


async def on_fault(request: Request, error: Exception) -> Response:
    """For FastAPI: an error that nobody expected. Its own words could hold what was asked."""
    message = f"Something went wrong inside the server. It is in its log as {request.state.request_id}."
    return as_response(Refusal(500, "internal_error", message))


async def on_invalid(request: Request, error: Exception) -> Response:
    """For FastAPI: a body whose values cannot be used; all of them at once."""
    assert isinstance(error, RequestValidationError)
    found = [_finding(problem) for problem in error.errors()]
    texts = [text for _, _, text in found[:SHOWN_PROBLEMS]]
    if len(found) > SHOWN_PROBLEMS:
        texts.append(f"and {len(found) - SHOWN_PROBLEMS} more")
    param, code, _ = found[0]
    return as_response(Refusal(400, code, " ".join(texts), param=param))


def _finding(problem: Mapping[str, Any]) -> tuple[str | None, str, str]:
    """(param, code, message) of one problem that pydantic found."""
    place = _place([part for part in problem["loc"] if part != "body"])
    kind, context = str(problem["type"]), problem.get("ctx") or {}
    if "code" in context:  # raised by our own validators, which speak for themselves
        return str(context.get("param") or place) or None, str(context["code"]), str(problem["msg"])
    if kind == "missing":
        return place or None, "missing_required_parameter", f"{place or 'The body'}: missing."
    if kind == "extra_forbidden":
        return place, "unknown_parameter", f"{place}: there is no such parameter."
    message = str(problem["msg"]).removeprefix("Value error, ").replace("Input should", "should")
    return place or None, "invalid_value", f"{place or 'The body'}: {message}."


def _place(parts: Sequence[str | int]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
