"""Request bodies in OpenAI's shape: read within a size and a time, strict JSON, and
nothing that would be ignored."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, Literal, get_args

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.responses import Response

from tunesmith.data.formats.row_images import RowImages
from tunesmith.data.formats.turns import check_order, parts_of, tools_of, without_answer
from tunesmith.data.problems import RowProblems
from tunesmith.data.read_json import BadRow, loads
from tunesmith.serve.protocol import GenerationRequest, RequestError
from tunesmith.types import JsonObject, Record, Source

MAX_BODY_BYTES = 1 << 20
MAX_SEEING_BYTES = 28 << 20
"""Most bytes of a chat where a model sees: an image of 20 MiB in base64, and text."""
MAX_DEPTH = 64
BODY_TIMEOUT_S = 30.0
DRAINED_BYTES = 16 * MAX_BODY_BYTES
"""Read of a body that is too large: a client that is cut off while it writes does not read the answer."""
MAX_INPUTS = 2048
MAX_SCORED = 128
"""Most tokens that are listed at a place of a prompt."""


class StrictRoute(APIRoute):
    """A route that reads and parses its body by these rules before FastAPI sees it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            if self.body_field is not None:
                check_headers(request)
                # Where starlette keeps what it has read.
                request._body = (await _read(request)).strip(b" \t\r\n")
                try:
                    request._json = loads(request._body, depth=MAX_DEPTH) if request._body else None
                except BadRow as bad:
                    message = f"The body cannot be read as JSON: {bad.message}."
                    raise RequestError(message, code="invalid_json") from None
            return await handle(request)

        return strictly


def check_headers(request: Request) -> None:
    """Raises RequestError 415 for a body that is not declared as plain JSON in
    UTF-8: a web page may send others."""
    kind, *more = request.headers.get("content-type", "").replace(" ", "").replace('"', "").lower().split(";")
    is_plain = request.headers.get("content-encoding", "identity") == "identity"
    if kind != "application/json" or more not in ([], ["charset=utf-8"], ["charset=utf8"]) or not is_plain:
        message = "The body has to be sent as Content-Type: application/json, in UTF-8 and without a Content-Encoding."
        raise RequestError(message, status=415, code="unsupported_media_type")


async def _read(request: Request) -> bytes:
    body = bytearray()
    sees = getattr(request.app.state, "sees", lambda: False)  # set by `app.make_app`
    most = MAX_SEEING_BYTES if request.url.path.endswith("/chat/completions") and sees() else MAX_BODY_BYTES

    async def receive() -> int:
        num_bytes = 0
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes <= most:
                body.extend(piece)
            elif num_bytes > most + DRAINED_BYTES:
                break
        return num_bytes

    try:
        num_bytes = await asyncio.wait_for(receive(), BODY_TIMEOUT_S)
    except asyncio.TimeoutError:
        message = f"The body did not arrive within {BODY_TIMEOUT_S:.0f} seconds."
        raise _closing(408, "request_timeout", message) from None
    if num_bytes > most:
        raise _closing(413, "request_too_large", f"The body has more than {most:,} bytes.")
    return bytes(body)


def _closing(status: int, code: str, message: str) -> RequestError:
    return RequestError(message, status=status, code=code, headers={"Connection": "close"})


class StrictModel(BaseModel):
    """An object without unknown fields, whose values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


def fields_at(model: Any, place: Sequence[int | str]) -> list[str]:
    """The fields of the object at a place of a body, as pydantic names places; none if no class here describes
    it."""
    for part in place:
        if isinstance(part, str) and part != "body":
            field = getattr(model, "model_fields", {}).get(part)
            model = None if field is None else _model_in(field.annotation)
    return list(getattr(model, "model_fields", ()))


def _model_in(annotation: Any) -> Any:
    """The one model that an annotation names, such as `Supervised | None` or `list[Integration]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := _model_in(inner))), None)


class Parameters(StrictModel):
    """An object of parameters: null is the same as missing."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class Body(Parameters):
    """A request's JSON object."""

    model: str
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    """`user` and the five after it have no effect."""


Text = Annotated[str, Field(min_length=1)]
_LISTED = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
Texts = Annotated[list[Text], _LISTED]
"""A text or a list of texts."""


def _only(value: bool | int) -> AfterValidator:
    """A parameter that allows one value. Its type is checked first, since to a Literal true is 1."""

    def check(given: Any) -> Any:
        if given != value:
            raise ValueError(f"should be {str(value).lower()}")
        return given

    return AfterValidator(check)


class SampledBody(Body):
    """Parameters that chats and completions share."""

    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Texts = Field([], max_length=4)
    n: int = Field(1, ge=1, le=128)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] | None = None
    store: Annotated[bool, _only(False)] = False
    service_tier: Literal["auto", "default"] = "auto"
    modalities: list[Literal["text"]] = ["text"]
    parallel_tool_calls: Annotated[bool, _only(True)] = True
    logit_bias: JsonObject = Field({}, max_length=0)
    best_of: Annotated[int, _only(1)] = 1
    echo: Annotated[bool, _only(False)] = False
    suffix: Literal[""] = ""
    """The last eight are accepted with values that change nothing."""

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> SampledBody:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options: only for stream: true.", param="stream_options")
        if (self.stream_options or {}).get("include_obfuscation"):
            raise RequestError("stream_options.include_obfuscation: only false is taken.", param="stream_options")
        return self

    @property
    def sampling(self) -> JsonObject:
        """The fields of a GenerationRequest that both kinds share."""
        names = {"model", "temperature", "top_p", "seed", "n", "presence_penalty", "frequency_penalty"}
        return {**self.model_dump(include=names), "stop": tuple(self.stop)}


class ResponseSchema(StrictModel):
    """A schema with the name that OpenAI's API requires. It is always enforced, `strict` or not."""

    name: str
    description: str | None = None
    schema_: JsonObject = Field({}, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: ResponseSchema | None = None

    @model_validator(mode="after")
    def _schema_of_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and to no other")
        return self

    @property
    def wanted(self) -> Record | None:
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
    tools: list[JsonObject] = Field([], max_length=128)
    tool_choice: Literal["auto", "none"] = "auto"
    """A call cannot be forced: the model decides."""

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs: only with logprobs: true.", param="top_logprobs")
        if None not in (limits := (self.max_tokens, self.max_completion_tokens)) and limits[0] != limits[1]:
            message = "max_tokens and max_completion_tokens: two names of one limit, and they differ. Give one."
            raise RequestError(message, param="max_tokens")
        return self

    def to_request(self) -> GenerationRequest:
        """As the engine takes it. Raises RequestError for messages and tools that a
        row of training could not have."""
        problems = RowProblems(Source("messages", 1))
        shown = RowImages({}, problems)
        parts = parts_of(self.messages, problems, trained=False, images=shown)
        tools = tools_of({"tools": self.tools}, problems)
        without_answer(parts, problems)
        check_order(parts, problems, answered=False)
        if problems.problems:
            message = " ".join(problem.message for problem in problems.problems[:10])
            raise RequestError(message, code="invalid_messages", param="messages")
        images = [(i, place, image) for i, part in enumerate(parts) for place, image in part.images]
        if named := [image.path for _, _, image in images if image.path]:
            message = f"An image is {named[0][:60]!r}: no file of the server is read. Send it as a data URI in base64."
            raise RequestError(message, code="image_address", param="messages")
        return GenerationRequest(
            messages=tuple({"role": part.role, "content": part.text, **part.fields} for part in parts),
            images=tuple((i, place, b64encode(image.data).decode()) for i, place, image in images),
            tools=tools if self.tool_choice == "auto" else (),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            json_schema=self.response_format.wanted,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **self.sampling,
        )


def _text_or_ids(prompt: list[Any]) -> list[Any]:
    is_text = len(prompt) == 1 and isinstance(prompt[0], str)
    if not is_text and not (prompt and all(type(token) is int for token in prompt)):
        raise ValueError("should be a text, a list of one, or ids of tokens")
    return prompt


class CompletionBody(SampledBody):
    """POST /v1/completions"""

    max_tokens: int | None = Field(16, ge=1)
    prompt: Annotated[list[Any], _LISTED, AfterValidator(_text_or_ids)]
    """A prompt, or a list of one; ids of tokens, to be scored. An empty prompt is the tokenizer's own beginning
    of a text."""
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_SCORED)
    """As vLLM has it: tokens that are listed at each place of the prompt, besides its own."""

    @model_validator(mode="after")
    def _scores_or_writes(self) -> CompletionBody:
        if self.prompt_logprobs is None and not isinstance(self.scored, str):
            raise RequestError("prompt: ids are taken with prompt_logprobs. Send the text.", param="prompt")
        writes = (self.max_tokens, self.temperature, self.n, self.stream, self.stop)
        if self.prompt_logprobs is not None and writes != (1, 0, 1, False, []):
            message = "prompt_logprobs: only with max_tokens: 1 and temperature: 0, and without n, stop and stream."
            raise RequestError(message, param="prompt_logprobs")
        return self

    @property
    def scored(self) -> str | list[int]:
        """The prompt: a text, or ids."""
        return self.prompt[0] if isinstance(self.prompt[0], str) else self.prompt


class EmbeddingBody(Body):
    """POST /v1/embeddings"""

    input: Texts = Field(min_length=1, max_length=MAX_INPUTS)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    input_type: Literal["query", "document"] = "document"


class Document(StrictModel):
    """A document as Cohere's clients send it."""

    text: str


class RerankBody(Body):
    """POST /v1/rerank"""

    query: Text
    documents: list[str | Document] = Field(min_length=1, max_length=MAX_INPUTS)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True


class TextPair(StrictModel):
    """Two texts that are classified together."""

    text: str
    text_pair: str


class ClassifyBody(Body):
    """POST /v1/classify"""

    input: Annotated[list[str | TextPair], _LISTED] = Field(min_length=1, max_length=MAX_INPUTS)
