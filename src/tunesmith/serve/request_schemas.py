"""Request bodies in OpenAI's shape: read within a size and a time, strict JSON, and nothing that would be ignored."""

from __future__ import annotations

import asyncio
import difflib
import email.message
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from tunesmith.data.formats.chats import parse_chat
from tunesmith.data.read_json import BadRow, check_depth, loads
from tunesmith.serve.protocol import RequestError
from tunesmith.types import Source

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
TIMEOUT_S = 30.0
DRAINED_BYTES = 16 * MAX_BYTES
"""Read of a body that is too large: a client that is cut off while it writes does not read the answer."""
MAX_STOPS = 4
MAX_INPUTS = 2048

NO_EFFECT = (
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
)  # fmt: skip
"""Accepted without effect. docs/serve.md has the same three tables, and a test compares them."""
ONLY: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Accepted with these values, which change nothing."""
REFUSED = {
    "audio": "models here read and write text.",
    "function_call": "no function can be forced. Give tools, which the model's template shows it.",
    "functions": "give tools, which replaced them.",
    "logprobs": "/v1/chat/completions has them.",
    "moderation": "nothing is moderated here.",
    "prediction": "nothing is predicted ahead here.",
    "reasoning_effort": "a model reasons as it was tuned to.",
    "verbosity": "a model writes as it was tuned to.",
    "web_search_options": "nothing is searched here.",
    "dimensions": "a vector has the size that its model gives it.",
}


class StrictRoute(APIRoute):
    """A route that reads and parses its body by these rules before FastAPI sees it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            if self.body_field is not None:
                check_headers(request)
                request._body = await _read(request)  # where starlette keeps what it has read
                if request._body:
                    request._json = _parse(request._body)
            return await handle(request)

        return strictly


def check_headers(request: Request) -> None:
    """Raises RequestError 415 for a body that is not declared as plain JSON in UTF-8."""
    header = email.message.Message()
    header["content-type"] = request.headers.get("content-type", "")
    if header.get_content_type() != "application/json":
        message = "The body has to be sent as Content-Type: application/json."
    elif header.get_content_charset() not in (None, "utf-8", "utf8"):
        message = "The body has to be UTF-8."
    elif request.headers.get("content-encoding", "identity") != "identity":
        message = "The body has to be sent as it is, without a Content-Encoding."
    else:
        return
    raise _closing(415, "unsupported_media_type", message)


async def _read(request: Request) -> bytes:
    kept, num_bytes = bytearray(), 0

    async def receive() -> None:
        nonlocal num_bytes
        more = True
        while more and num_bytes <= DRAINED_BYTES:
            event = await request.receive()
            if event["type"] == "http.disconnect":
                raise ClientDisconnect
            num_bytes += len(event.get("body", b""))
            if num_bytes <= MAX_BYTES:
                kept.extend(event.get("body", b""))
            more = event.get("more_body", False)

    try:
        await asyncio.wait_for(receive(), TIMEOUT_S)
    except asyncio.TimeoutError:
        message = f"The body did not arrive within {TIMEOUT_S:.0f} seconds."
        raise _closing(408, "request_timeout", message) from None
    if num_bytes > MAX_BYTES:
        raise _closing(413, "request_too_large", f"The body has more than {MAX_BYTES:,} bytes.")
    return bytes(kept)


def _closing(status: int, code: str, message: str) -> RequestError:
    return RequestError(message, status=status, code=code, headers={"Connection": "close"})


def _parse(raw: bytes) -> Any:
    try:
        check_depth(raw, MAX_DEPTH)
    except BadRow:
        raise RequestError(f"The body nests deeper than {MAX_DEPTH}.", code="invalid_json") from None
    try:
        return loads(raw, depth=MAX_DEPTH)
    except BadRow as bad:
        message = "it stops before its end" if bad.code == "truncated_json" else f"{bad.message}. {bad.fix}".strip()
        raise RequestError(f"The body cannot be read as JSON: {message}", code="invalid_json") from None


def refuse(code: str, param: str, message: str) -> PydanticCustomError:
    """An error with its code and parameter, which the answer names."""
    # pydantic fills in {names} of a message: a client's text must not be read as one.
    return PydanticCustomError("refused", "{message}", {"code": code, "param": param, "message": message})


def without_unused(given: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The parameters that are given and have a meaning here. Null is the same as missing.

    Raises PydanticCustomError naming every parameter that is unknown or would have to be ignored.
    """
    known = set(known)
    problems = [(name, *found) for name, value in given.items() if (found := _problem(name, value, known))]
    if problems:
        name, code, _ = problems[0]
        raise refuse(code, name, " ".join(message for _, _, message in problems[:10]))
    return {name: value for name, value in given.items() if name in known and value is not None}


def _problem(name: str, value: Any, known: set[str]) -> tuple[str, str] | None:
    """(code, message) of a parameter that cannot be ignored."""
    if name in known or name in NO_EFFECT or (value is None and (name in ONLY or name in REFUSED)):
        return None
    if name in ONLY:
        if any(type(value) is type(allowed) and value == allowed for allowed in ONLY[name]):
            return None
        allowed = " or ".join(repr(value) for value in ONLY[name])
        return "unsupported_value", f"{name}: only {allowed} is supported here."
    if name in REFUSED:
        return "unsupported_parameter", f"{name}: not supported here: {REFUSED[name]}"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]}?" if near else "."
    return "unknown_parameter", f"{name[:60]}: unknown parameter{hint}"


class StrictModel(BaseModel):
    """An object without unknown fields, whose values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class Parameters(StrictModel):
    """An object of parameters: null is the same as missing, and unknown ones are named with what may be meant."""

    @model_validator(mode="before")
    @classmethod
    def _known_parameters(cls, given: Any) -> Any:
        return without_unused(given, cls.model_fields) if isinstance(given, dict) else given


class Body(Parameters):
    """A request's JSON object."""

    model: str


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("should be a text, or a list of texts, none of them empty")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"should have at most {MAX_STOPS} texts, and has {len(stops)}")
    return stops


class StreamOptions(StrictModel):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class SampledBody(Body):
    """Parameters that chats and completions share."""

    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str], BeforeValidator(_stops, json_schema_input_type=str | list[str])] = []
    n: int = Field(1, ge=1, le=128)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> SampledBody:
        if self.stream_options is not None and not self.stream:
            raise refuse("invalid_value", "stream_options", "stream_options: only for stream: true.")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of a GenerationRequest that both kinds share."""
        names = ("model", "temperature", "top_p", "seed", "n", "presence_penalty", "frequency_penalty")
        return {"stop": tuple(self.stop), **{name: getattr(self, name) for name in names}}


class JsonSchema(StrictModel):
    """A schema with the name that OpenAI's API asks for. It is always enforced, `strict` or not."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_of_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and to no other")
        return self

    @property
    def wanted(self) -> Mapping[str, Any] | None:
        """As a GenerationRequest has it."""
        if self.type == "text":
            return None
        return {} if self.json_schema is None else self.json_schema.schema_


def _messages(value: Any) -> Any:
    if not isinstance(value, list) or not value:
        raise ValueError("should be a list of at least one message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: Any, place: str) -> dict[str, Any]:
    """A message without nulls and with the parts of its content joined, as in training."""
    if not isinstance(message, dict):
        example = '{"role": "user", "content": "Hi"}'
        raise refuse("invalid_value", place, f"{place}: should be an object such as {example}.")
    kept = {name: value for name, value in message.items() if value is not None or name == "content"}
    if isinstance(kept.get("content"), list):
        kept["content"] = "".join(_part(part, f"{place}.content[{i}]") for i, part in enumerate(kept["content"]))
    return kept


def _part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        message = f"{place}: a part of type {str(kind)[:40]!r}: models here read text."
        raise refuse("unsupported_content", place, message)
    if not isinstance(part.get("text"), str):
        raise refuse("invalid_value", place, f"{place}: a part without a text.")
    return str(part["text"])


def _tool_choice(value: Any) -> Any:
    if value not in ("auto", "none"):
        message = "tool_choice: auto or none: a call cannot be forced, the model decides."
        raise refuse("unsupported_value", "tool_choice", message)
    return value


class ChatBody(SampledBody):
    """POST /v1/chat/completions"""

    messages: Annotated[list[dict[str, Any]], BeforeValidator(_messages)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[dict[str, Any]] = Field([], max_length=128)
    tool_choice: Annotated[Literal["auto", "none"], BeforeValidator(_tool_choice)] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("invalid_value", "top_logprobs", "top_logprobs: only with logprobs: true.")
        if None not in (limits := (self.max_tokens, self.max_completion_tokens)) and limits[0] != limits[1]:
            message = "max_tokens and max_completion_tokens: two names of one limit, and they differ. Give one."
            raise refuse("invalid_value", "max_tokens", message)
        record = {"messages": [dict(message) for message in self.messages], "tools": list(self.tools)}
        found = parse_chat(record, Source("messages", 1), answered=False)  # the rules of training rows
        if isinstance(found, list):
            raise refuse("invalid_messages", "messages", " ".join(problem.message for problem in found[:10]))
        return self


def _prompt(value: Any) -> str | Sequence[int]:
    """A text or token ids; a list of one of them is the same."""
    [given] = value if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)) else [value]
    if isinstance(given, str):
        return given
    if isinstance(given, list) and given and all(type(one) is int and 0 <= one < 2**31 for one in given):
        return tuple(given)
    raise ValueError("should be a text or a list of token ids, not empty; send a request for each of several prompts")


class CompletionBody(SampledBody):
    """POST /v1/completions"""

    max_tokens: int | None = Field(16, ge=1)
    prompt: Annotated[Any, BeforeValidator(_prompt, json_schema_input_type=str | list[str] | list[int])]


def _texts(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("should be a text, or a list of texts, none of them empty; token ids are not read here")
    return texts


class EmbeddingBody(Body):
    """POST /v1/embeddings"""

    input: Annotated[list[str], BeforeValidator(_texts, json_schema_input_type=str | list[str])] = Field(
        max_length=MAX_INPUTS
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    input_type: Literal["query", "document"] = "document"


def _documents(value: Any) -> Any:
    texts = [one.get("text") if isinstance(one, dict) else one for one in value] if isinstance(value, list) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError('should be a list of texts, or of {"text": ...}')
    return texts


class RerankBody(Body):
    """POST /v1/rerank"""

    query: str = Field(min_length=1)
    documents: Annotated[list[str], BeforeValidator(_documents, json_schema_input_type=list[str])] = Field(
        max_length=MAX_INPUTS
    )
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True


def _texts_or_pairs(value: Any) -> Any:
    found = []
    for one in value if isinstance(value, list) else [value]:
        texts: tuple[Any, ...] = (one,) if isinstance(one, str) else ()
        if isinstance(one, dict) and one.keys() == {"text", "text_pair"}:
            texts = (one["text"], one["text_pair"])
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError('should be a text, {"text": ..., "text_pair": ...}, or a list of them')
        found.append(texts[0] if len(texts) == 1 else texts)
    return found


class ClassifyBody(Body):
    """POST /v1/classify"""

    input: Annotated[list[Any], BeforeValidator(_texts_or_pairs, json_schema_input_type=str | list[str])] = Field(
        min_length=1, max_length=MAX_INPUTS
    )
