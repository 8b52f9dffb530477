"""Answers in OpenAI's shapes from the events of an engine: whole, streamed as
server-sent events, and errors."""

from __future__ import annotations

import json
import re
import secrets
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence, Set
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tunesmith.phrases import did_you_mean
from tunesmith.serve.protocol import (
    OPEN,
    Delta,
    Finished,
    RequestError,
    Started,
    StreamEvent,
    Token,
    ToolCall,
    ToolCallFormat,
)
from tunesmith.serve.request_schemas import fields_at
from tunesmith.types import JsonObject, Record

RETRY_AFTER_S = 1
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
"""A report of a run loads nothing and runs nothing."""
MAX_PROBLEMS = 10
_HTTP_ERRORS = {
    404: (
        "not_found",
        "There is nothing here by this path. Chats are at POST /v1/chat/completions (in OpenAI's package "
        "client.chat.completions.create); GET /openapi.json lists what there is.",
    ),
    405: ("method_not_allowed", "This path takes another method. GET /openapi.json lists them."),
}
_PROBLEMS = {
    "missing": ("missing_required_parameter", "missing"),
    "extra_forbidden": ("unknown_parameter", "unknown parameter"),
    "dict_type": ("invalid_value", "should be an object"),
}
_NOT_HERE = {
    "reasoning_effort": " Models here have no levels of reasoning. Leave it out.",
    "verbosity": " Models here have no levels of length. Leave it out, or set max_tokens.",
}
"""Parameters of other models that scripts bring along, with the way out."""
_ERROR_TYPES = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error"}

Events: TypeAlias = AsyncGenerator[StreamEvent, None]


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


def error_body(error: RequestError) -> JsonObject:
    """OpenAI's error body."""
    kind = _ERROR_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError) -> Response:
    """The answer to a request that is refused."""
    retry = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else {}
    return json_response(error_body(error), error.status, {**retry, **error.headers})


async def on_error(request: Request, error: Exception) -> Response:
    """Handle an error for FastAPI: a RequestError, FastAPI's own errors, and unexpected ones."""
    if isinstance(error, RequestError):
        return error_response(error)
    if isinstance(error, RequestValidationError):
        problems, body = error.errors(), getattr(request.scope.get("route"), "body_field", None)
        model = None if body is None else body.field_info.annotation
        described = [_problem(problem, model) for problem in problems[:MAX_PROBLEMS]]
        texts = [text for _, _, text in described]
        texts += [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        return error_response(RequestError(" ".join(texts), code=described[0][1], param=described[0][0]))
    if isinstance(error, HTTPException):
        code, message = _HTTP_ERRORS.get(error.status_code, ("error", str(error.detail)))
        return error_response(RequestError(message, status=error.status_code, code=code, headers=error.headers))
    # An unexpected error's own words could quote the request.
    message = f"Something went wrong inside the server. It is in its log as {request.state.request_id}."
    return error_response(RequestError(message, status=500, code="internal_error"))


def _problem(problem: Record, model: Any) -> tuple[str | None, str, str]:
    """(param, code, message) of one problem that pydantic found in the body of a `model`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"] if part != "body")
    place = "".join(parts).lstrip(".")
    text = str(problem["msg"]).removeprefix("Value error, ").replace("Input should", "should")
    code, text = _PROBLEMS.get(problem["type"], ("invalid_value", text))
    hint = ""
    if code == "unknown_parameter" and len(name := str(problem["loc"][-1])) <= 60:
        hint = _NOT_HERE.get(name) or did_you_mean(name, fields_at(model, problem["loc"][:-1]))
    return place or None, code, f"{place[:60] or 'The body'}: {text}.{hint}"


@dataclass
class Usage:
    """Tokens of one request so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: str | None = None
    """Code of the error that ended a stream early."""

    def count(self, event: StreamEvent) -> None:
        if isinstance(event, Started):
            self.prompt_tokens += event.prompt_tokens
        elif isinstance(event, Finished):
            self.completion_tokens += event.completion_tokens

    def as_dict(self) -> dict[str, int]:
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class ChatFormat:
    """Choices of /v1/chat/completions with `n` answers."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, n: int) -> None:
        self._n = n

    def chunks(self, event: StreamEvent) -> Iterator[JsonObject]:
        """The streamed choices of one event."""
        if isinstance(event, Started):
            for index in range(self._n):
                yield _choice(index, delta={"role": "assistant", "content": "", "refusal": None})
        elif isinstance(event, Delta):
            yield _choice(event.index, tokens=event.tokens, delta={"content": event.text})
        elif isinstance(event, ToolCall):
            yield _choice(event.index, delta={"tool_calls": [{"index": event.number, **event.call}]})
        else:
            yield _choice(event.index, event.reason, delta={})

    def whole(self, index: int, events: Sequence[Any]) -> JsonObject:
        """The choice of a complete answer, which `Finished` ends."""
        message: JsonObject = {"role": "assistant", "content": _text(events), "refusal": None}
        if calls := [event.call for event in events if isinstance(event, ToolCall)]:
            message |= {"content": message["content"] or None, "tool_calls": calls}
        tokens = [token for event in events if isinstance(event, Delta) for token in event.tokens]
        return _choice(index, events[-1].reason, tokens, message=message)


class CompletionFormat:
    """Choices of /v1/completions."""

    whole_object = chunk_object = "text_completion"

    def chunks(self, event: StreamEvent) -> Iterator[JsonObject]:
        if isinstance(event, Delta):
            yield _choice(event.index, text=event.text)
        elif isinstance(event, Finished):
            yield _choice(event.index, event.reason, text="")

    def whole(self, index: int, events: Sequence[Any]) -> JsonObject:
        return _choice(index, events[-1].reason, text=_text(events))


def _text(events: Sequence[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def _choice(index: int, reason: str | None = None, tokens: Sequence[Token] = (), **content: Any) -> JsonObject:
    logprobs = {"content": tokens, "refusal": None} if tokens else None
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}


Format: TypeAlias = ChatFormat | CompletionFormat


async def whole_answer(events: Events, head: Record, form: Format, usage: Usage) -> JsonObject:
    """The body of an answer that is not streamed. `head`: id, created and model."""
    answers: dict[int, list[StreamEvent]] = defaultdict(list)
    async with aclosing(events):
        async for event in events:
            usage.count(event)
            if not isinstance(event, Started):
                answers[event.index].append(event)
    choices = [form.whole(index, answer) for index, answer in sorted(answers.items())]
    return {**head, "object": form.whole_object, "choices": choices, "usage": usage.as_dict()}


def scored_answer(scored: Record, head: Record, usage: Usage) -> JsonObject:
    """The body of a prompt that was scored, see `ServedModel.score`, in vLLM's form."""
    choice = _choice(0, "stop" if scored["ended"] else "length", text=scored["text"])
    choice["prompt_logprobs"] = scored["prompt_logprobs"]
    return {**head, "object": CompletionFormat.whole_object, "choices": [choice], "usage": usage.as_dict()}


async def event_stream(
    first: StreamEvent, events: Events, head: Record, form: Format, usage: Usage, *, shows_usage: bool
) -> AsyncGenerator[bytes, None]:
    """An answer as server-sent events: `data: {...}` for each chunk, then `data: [DONE]`.

    The first event has been awaited: a request that is refused at once has its own status. A later error is the
    last event, since the status has been sent.
    """
    head = {**head, "object": form.chunk_object}
    no_usage: JsonObject = {"usage": None} if shows_usage else {}

    def chunks(event: StreamEvent) -> bytes:
        usage.count(event)
        return b"".join(_sse({**head, "choices": [choice], **no_usage}) for choice in form.chunks(event))

    async with aclosing(events):
        try:
            yield chunks(first)
            async for event in events:
                yield chunks(event)
            if shows_usage:
                yield _sse({**head, "choices": [], "usage": usage.as_dict()})
            yield b"data: [DONE]\n\n"
        except RequestError as error:
            usage.failed = error.code
            yield _sse(error_body(error))


def _sse(value: Record) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


_CALL, _WHOLE = re.compile("<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL), re.compile("^.+$", re.DOTALL)


async def with_tool_calls(events: Events, form: ToolCallFormat, tools: Set[str]) -> Events:
    """Tool calls in place of their text, and the reason "tool_calls" for answers that have some.

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number, after text or not (Hermes,
    Qwen) json     the whole answer is {"name": ..., "parameters": {...}} (Llama 3)

    Text is passed on as it is written up to the first mark; from there on at the end, with the calls. Anything
    that is no call of one of `tools` stays text.
    """
    held: dict[int, str] = defaultdict(str)
    are_text: set[int] = set()
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                text = held[event.index] + event.text
                end = len(text) if form == "json" and event.index in are_text else _certain(text, form)
                held[event.index] = text[end:]
                are_text |= {event.index} if end else set()
                if text[:end] or event.tokens:
                    yield replace(event, text=text[:end])
            elif isinstance(event, Finished):
                calls, rest = find_calls(held.pop(event.index, ""), form, tools)
                if rest and (rest.strip() or not calls):
                    yield Delta(event.index, rest)
                for number, call in enumerate(calls):
                    yield ToolCall(event.index, number, call)
                yield replace(event, reason="tool_calls") if calls and event.reason == "stop" else event
            else:
                yield event


def _certain(text: str, form: ToolCallFormat) -> int:
    """Characters at the start that are not a call, nor white space before one."""
    if form == "json":
        return 0 if text.lstrip()[:1] in ("", "{") else len(text)
    if (start := text.find(OPEN)) < 0:
        partial = (num for num in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:num]))
        start = len(text) - next(partial, 0)
    return len(text[:start].rstrip())


def find_calls(text: str, form: ToolCallFormat, tools: Set[str]) -> tuple[list[JsonObject], str]:
    """The tool calls in an answer, in OpenAI's format, and the text without them."""
    calls: list[JsonObject] = []

    def take(found: re.Match[str]) -> str:
        with suppress(ValueError, TypeError, RecursionError):
            call = json.loads(found[found.lastindex or 0])
            arguments = call.get("arguments", call.get("parameters", {})) if isinstance(call, dict) else None
            if isinstance(arguments, dict) and call.get("name") in tools:
                function = {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
                # Nine letters and digits, as Mistral's templates require.
                calls.append({"id": secrets.token_hex(5)[:9], "type": "function", "function": function})
                return ""
        return found[0]

    return calls, re.sub(_CALL if form == "hermes" else _WHOLE, take, text)
