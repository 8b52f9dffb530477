"""Request bodies in OpenAI's shape: read within a size and a time, strict JSON, and nothing that would be ignored."""

from __future__ import annotations

import asyncio
import difflib
import email.message
from collections.abc import Callable, Coroutine, Mapping
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from tunesmith.data.formats.chats import parse_chat
from tunesmith.data.read_json import BadRow, loads
from tunesmith.serve.protocol import GenerationRequest, RequestError
from tunesmith.types import Source

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
TIMEOUT_S = 30.0
DRAINED_BYTES = 16 * MAX_BYTES
"""Read of a body that is too large: a client that is cut off while it writes does not read the answer."""
MAX_INPUTS = 2048

NO_EFFECT = (
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
)  # fmt: skip
"""Accepted without effect. docs/serve.md has the same two tables, and a test compares them."""
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


class StrictRoute(APIRoute):
    """A route that reads and parses its body by these rules before FastAPI sees it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            if self.body_field is not None:
                check_headers(request)
                request._body = (await _read(request)).strip(b" \t\r\n")  # where starlette keeps what it has read
                if request._body:
                    request._json = _parse(request._body)
            return await handle(request)

        return strictly


def check_headers(request: Request) -> None:
    """Raises RequestError 415 for a body that is not declared as plain JSON in UTF-8: a web page may send others."""
    header = email.message.Message()
    header["content-type"] = request.headers.get("content-type", "")
    is_json = header.get_content_type() == "application/json"
    is_plain = request.headers.get("content-encoding", "identity") == "identity"
    if not (is_json and is_plain and header.get_content_charset() in (None, "utf-8", "utf8")):
        message = "The body has to be sent as Content-Type: application/json, in UTF-8 and without a Content-Encoding."
        raise _closing(415, "unsupported_media_type", message)


async def _read(request: Request) -> bytes:
    kept, num_bytes = bytearray(), 0

    async def receive() -> None:
        nonlocal num_bytes
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes <= MAX_BYTES:
                kept.extend(piece)
            elif num_bytes > DRAINED_BYTES:
                break

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
        return loads(raw, depth=MAX_DEPTH)
    except BadRow as bad:
        raise RequestError(f"The body cannot be read as JSON: {bad.message}.", code="invalid_json") from None


def refuse(code: str, param: str, message: str) -> PydanticCustomError:
    """An error with its code and parameter, which the answer names."""
    # pydantic fills in {names} of a message: a client's text must not be read as one.
    return PydanticCustomError("refused", "{message}", {"code": code, "param": param, "message": message})


class StrictModel(BaseModel):
    """An object without unknown fields, whose values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class Parameters(StrictModel):
    """An object of parameters: null is the same as missing, and all that would have to be ignored are named at once,
    with what may be meant."""

    @model_validator(mode="before")
    @classmethod
    def _known_parameters(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        problems = []
        for name, value in given.items():
            if name in cls.model_fields or name in NO_EFFECT or value is None:
                continue
            allowed = ONLY.get(name, ())
            if any(type(value) is type(one) and value == one for one in allowed):
                continue
            near = difflib.get_close_matches(name, cls.model_fields, n=1)
            said = f"unknown parameter{f', did you mean {near[0]}?' if near else '.'}"
            said = f"only {' or '.join(map(repr, allowed))} is supported here." if allowed else said
            problems.append((name, "unsupported_value" if allowed else "unknown_parameter", f"{name[:60]}: {said}"))
        if problems:
            raise refuse(problems[0][1], problems[0][0], " ".join(said for _, _, said in problems[:10]))
        return {name: value for name, value in given.items() if name in cls.model_fields and value is not None}


class Body(Parameters):
    """A request's JSON object."""

    model: str


Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""A text or a list of texts."""


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
    stop: Texts = Field([], max_length=4)
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
        names = {"model", "temperature", "top_p", "seed", "n", "presence_penalty", "frequency_penalty"}
        return {**self.model_dump(include=names), "stop": tuple(self.stop)}


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


class ChatBody(SampledBody):
    """POST /v1/chat/completions"""

    messages: list[Any] = Field(min_length=1)
    """Held to the rules of training rows."""
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[dict[str, Any]] = Field([], max_length=128)
    tool_choice: Literal["auto", "none"] = "auto"
    """A call cannot be forced: the model decides."""

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("invalid_value", "top_logprobs", "top_logprobs: only with logprobs: true.")
        if None not in (limits := (self.max_tokens, self.max_completion_tokens)) and limits[0] != limits[1]:
            message = "max_tokens and max_completion_tokens: two names of one limit, and they differ. Give one."
            raise refuse("invalid_value", "max_tokens", message)
        for i, one in enumerate(self.messages):
            if isinstance(one, dict) and "from" in one:  # a row of training could have it
                message = (
                    f"messages[{i}].role and content are needed: from and value are read in rows of training only."
                )
                raise refuse("invalid_messages", "messages", message)
        record = {"messages": self.messages, "tools": self.tools}
        found = parse_chat(record, Source("messages", 1), answered=False)
        if isinstance(found, list):
            raise refuse("invalid_messages", "messages", " ".join(problem.message for problem in found[:10]))
        return self

    def to_request(self) -> GenerationRequest:
        """As the engine takes it: without nulls, and each content one text, as in training."""

        def one_text(content: Any) -> Any:
            return "".join(part["text"] for part in content) if isinstance(content, list) else content

        fields = [{name: value for name, value in one.items() if value is not None} for one in self.messages]
        return GenerationRequest(
            messages=tuple({**one, "content": one_text(one.get("content"))} for one in fields),
            tools=tuple(self.tools) if self.tool_choice == "auto" else (),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            json_schema=self.response_format.wanted,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **self.sampling,
        )


def _prompt(value: Any) -> str:
    """A text, or a list of one."""
    [given] = value if isinstance(value, list) and len(value) == 1 else [value]
    if isinstance(given, str):
        return given
    raise ValueError("should be one text; send a request for each of several prompts, and no token ids")


class CompletionBody(SampledBody):
    """POST /v1/completions"""

    max_tokens: int | None = Field(16, ge=1)
    prompt: Annotated[str, BeforeValidator(_prompt, json_schema_input_type=str | list[str])]


class EmbeddingBody(Body):
    """POST /v1/embeddings"""

    input: Texts = Field(min_length=1, max_length=MAX_INPUTS)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    input_type: Literal["query", "document"] = "document"


def _documents(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if any(isinstance(one, dict) and one.keys() != {"text"} for one in value):
        raise ValueError('should be texts or {"text": ...} without other fields, which no model would read')
    return [one["text"] if isinstance(one, dict) else one for one in value]


class RerankBody(Body):
    """POST /v1/rerank"""

    query: Text
    documents: Annotated[list[str], BeforeValidator(_documents)] = Field(min_length=1, max_length=MAX_INPUTS)
    """Each a text or {"text": ...}."""
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True


class TextPair(StrictModel):
    """Two texts that are classified together."""

    text: str
    text_pair: str


class ClassifyBody(Body):
    """POST /v1/classify"""

    input: Annotated[
        list[str | TextPair], BeforeValidator(lambda value: value if isinstance(value, list) else [value])
    ] = Field(min_length=1, max_length=MAX_INPUTS)
