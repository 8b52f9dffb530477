"""Messages between the HTTP routes, the engine and the worker process that holds the models.

    route -> GenerationRequest -> Engine -> Started, Delta, Delta, ..., Finished -> route

Server and worker exchange these classes in lines of JSON, see `pack`. Never imports torch.
"""

from __future__ import annotations

import shlex
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import orjson

from tunesmith.errors import InputError, TunesmithError
from tunesmith.generation.requests import (
    Delta,
    Finished,
    GenerationRequest,
    RequestError,
    Started,
    StreamEvent,
    Token,
    ToolCall,
)
from tunesmith.types import JsonObject, TaskName

__all__ = ["Delta", "Finished", "GenerationRequest", "RequestError", "Started", "StreamEvent", "Token", "ToolCall"]

ToolCallFormat: TypeAlias = Literal["hermes", "json"]
"""Form in which a chat template writes tool calls; see responses.with_tool_calls."""
OPEN = "<tool_call>"
ToRead: TypeAlias = str | Sequence[int | str | Sequence[str]]
"""Texts, pairs of texts, or one prompt: its text or its ids."""
Modality: TypeAlias = Literal["text", "labels", "embeddings"]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model a client can name: a base model, or a run's adapter on it."""

    name: str
    task: TaskName
    answers: Modality
    max_tokens: int
    """Most tokens of prompt and answer together."""
    is_base: bool
    created: int
    """Seconds since 1970, of the run or the model's files."""
    labels: Sequence[str] = ()
    calls: ToolCallFormat | None = None
    sees: bool = False
    """Whether messages may have images."""

    def to_ask(self, url: str, *, key: str = "") -> str:
        """A shell command that sends the model a request, with a `key`, which may be a variable of the
        shell."""
        body: JsonObject = {"input": "Hello"}
        routes = {"text": "/v1/chat/completions", "embeddings": "/v1/embeddings", "labels": "/v1/classify"}
        route = routes[self.answers]
        if self.answers == "text":
            body = {"messages": [{"role": "user", "content": "Hello"}]}
        elif self.task == "rank":
            route, body = "/v1/rerank", {"query": "Where is my parcel?", "documents": ["It left on Monday.", "Hello"]}
        head = f' -H "Authorization: Bearer {key}"' if key else ""
        data = shlex.quote(orjson.dumps({"model": self.name, **body}).decode())
        return f"curl {url}{route} -H 'Content-Type: application/json'{head} -d {data}"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Limits of an engine, given when it is started."""

    max_new_tokens: int = 4096
    """Most tokens of an answer. A request without a number gets as many as there is room for."""
    streams: int = 16
    """Answers decoded together, and the greatest `n`."""
    queue: int = 64
    """Requests that may wait for a place."""
    memory_limit_bytes: int | None = None
    """Resident memory at which the worker is ended and started again; None: 90 % of the machine."""
    threads: int | None = None
    """Threads of the worker; None: one a core."""
    offline: bool = False
    base: str | None = None
    """Place of the runs' base model, if it was moved."""
    attaches: bool = False
    """Whether runs will be attached while it answers."""
    engines: int = 1
    """Number of engines of the server, which share its part of a card."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """State of the engine, for /health and /metrics. Counters count from the start of the server."""

    alive: bool
    running: int
    """Answers in the batch."""
    waiting: int
    restarts: int
    prompt_tokens: int
    completion_tokens: int


class Engine(Protocol):
    """Answers requests of many clients at once. All methods are called on one event loop."""

    @property
    def served(self) -> Sequence[ModelCard]: ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[StreamEvent, None]:
        """`Started`, then the deltas of `n` answers as they are written, each closed by `Finished`.

        Closing the generator frees its place. Raises RequestError, at once or in the middle.
        """
        ...

    async def read(self, model: str, texts: ToRead, **how: Any) -> Any:
        """A line for each text or pair of texts, as `tunesmith predict` writes it.

        Of a model that embeds: a vector for each text, cut to `dimensions` numbers, and the number of tokens
        read; `is_query`: with the prompt of texts that search. Of a model that writes: what it finds likely at
        each place of one prompt, a text or ids, see `ServedModel.score`; `top`: tokens that are listed.
        """
        ...

    def state(self) -> EngineState: ...

    async def close(self, grace_s: float) -> None:
        """Refuse new requests, finish the others within the grace period, and end the worker."""
        ...


def pack(message: object) -> bytes:
    """A message between server and worker, as a line of JSON.

    A message is a value: a tuple of values, one of the classes above, an error, or anything that JSON has.
    """
    return orjson.dumps(_tagged(message), option=orjson.OPT_APPEND_NEWLINE)


def unpack(line: bytes) -> Any:
    """The message in a line. Sequences in fields are lists."""
    return _value(orjson.loads(line))


_CLASSES: Mapping[str, Any] = {
    cls.__name__: cls for cls in (Delta, EngineOptions, Finished, GenerationRequest, ModelCard, Started)
}
_ERRORS: Mapping[str, Any] = {cls.__name__: cls for cls in (InputError, RequestError, TunesmithError)}


def _tagged(value: Any) -> tuple[str, Any]:
    """(name of the class, content); "" for what JSON has: what a client wrote is
    never read as one of the classes."""
    name = type(value).__name__
    if isinstance(value, tuple):
        return "tuple", [_tagged(member) for member in value]
    if isinstance(value, Exception):
        return name, {"message": str(value), **vars(value)}
    return (name if name in _CLASSES else ""), value


def _value(tagged: Sequence[Any]) -> Any:
    name, content = tagged
    if name == "tuple":
        return tuple(_value(member) for member in content)
    if name in _ERRORS:
        return _ERRORS[name](content.pop("message"), **content)
    return _CLASSES[name](**content) if name else content
