"""What a request may hold, as OpenAI's API has it. Strict: no text for a number, no name that nothing reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tunesmith.serve.messages import as_one_text, check
from tunesmith.serve.parameters import refuse, without_unused

MOST_STOPS = 4
MOST_PROMPTS = 128
MOST_INPUTS = 2048

Prompt = str | tuple[int, ...]
TextOrPair = str | tuple[str, str]


class Body(BaseModel):
    """A request's JSON object. Null is the same as missing."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)

    model: str

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_known(cls, given: Any) -> Any:
        return without_unused(given, cls.model_fields) if isinstance(given, dict) else given


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("should be a text, or a list of texts, none of them empty")
    if len(stops) > MOST_STOPS:
        raise ValueError(f"should have at most {MOST_STOPS} texts, and has {len(stops)}")
    return stops


Stops = Annotated[list[str], BeforeValidator(_stops, json_schema_input_type=str | list[str])]


class StreamOptions(BaseModel):
    """How a stream is written."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampled(Body):
    """What chats and completions share."""

    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = []
    n: int = Field(1, ge=1, le=128)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise refuse("invalid_value", "stream_options", "stream_options: only for stream: true.")
        return self

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        return self.stream_options is not None and self.stream_options.include_usage


def _messages(value: Any) -> Any:
    if not isinstance(value, list) or not value:
        raise ValueError("should be a list of at least one message")
    return [as_one_text(message, f"messages[{i}]") for i, message in enumerate(value)]


class JsonSchema(BaseModel):
    """A schema with the name that OpenAI's API asks for. It is always kept exactly, `strict` or not."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What an answer has to be."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and to no other")
        return self

    @property
    def wanted(self) -> Mapping[str, Any] | None:
        """As an Ask has it."""
        if self.type == "text":
            return None
        return {} if self.json_schema is None else self.json_schema.schema_


def _tool_choice(value: Any) -> Any:
    if value not in ("auto", "none"):
        message = "tool_choice: auto or none: a call cannot be forced, the model decides."
        raise refuse("unsupported_value", "tool_choice", message)
    return value


class ChatBody(Sampled):
    """POST /v1/chat/completions"""

    messages: Annotated[list[dict[str, Any]], BeforeValidator(_messages)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[dict[str, Any]] = Field([], max_length=128)
    tool_choice: Annotated[Literal["auto", "none"], BeforeValidator(_tool_choice)] = "auto"

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("invalid_value", "top_logprobs", "top_logprobs: only with logprobs: true.")
        if None not in (limits := (self.max_tokens, self.max_completion_tokens)) and limits[0] != limits[1]:
            message = "max_tokens and max_completion_tokens: two names of one limit, and they differ. Give one."
            raise refuse("invalid_value", "max_tokens", message)
        check(self.messages, self.tools)
        return self


def _prompts(value: Any) -> list[Prompt]:
    """One prompt or many, each text or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are_ids(value):
            return [tuple(value)]
        if all(isinstance(one, str) or (isinstance(one, list) and _are_ids(one)) for one in value):
            if len(value) > MOST_PROMPTS:
                raise ValueError(f"should be at most {MOST_PROMPTS} prompts, and is {len(value)}")
            return [one if isinstance(one, str) else tuple(one) for one in value]
    raise ValueError("should be a text, a list of texts, a list of token ids, or a list of such lists, none empty")


def _are_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(one) is int and 0 <= one < 2**31 for one in value)


class CompletionBody(Sampled):
    """POST /v1/completions"""

    max_tokens: int | None = Field(16, ge=1)
    prompt: Annotated[list[Any], BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int])]
    logprobs: int | None = Field(None, ge=0, le=5)


def _texts(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("should be a text, or a list of texts, none of them empty; token ids are not read here")
    return texts


class EmbeddingBody(Body):
    """POST /v1/embeddings"""

    input: Annotated[list[str], BeforeValidator(_texts, json_schema_input_type=str | list[str])] = Field(
        max_length=MOST_INPUTS
    )
    encoding_format: Literal["float", "base64"] = "float"


def _texts_or_pairs(value: Any) -> Any:
    return [_text_or_pair(one) for one in (value if isinstance(value, list) else [value])]


def _text_or_pair(value: Any) -> TextOrPair:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and value.keys() == {"text", "text_pair"}:
        first, second = value["text"], value["text_pair"]
        if isinstance(first, str) and isinstance(second, str):
            return first, second
    raise ValueError('should be a text, {"text": ..., "text_pair": ...}, or a list of them')


class ClassifyBody(Body):
    """POST /v1/classify"""

    input: Annotated[list[Any], BeforeValidator(_texts_or_pairs, json_schema_input_type=str | list[str])] = Field(
        min_length=1, max_length=MOST_INPUTS
    )
