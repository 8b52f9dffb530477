"""Messages between the HTTP routes, the engine and the worker process that holds the models.

    route -> GenerationRequest -> Engine -> Started, Delta, Delta, ..., Finished -> route

Server and worker exchange these classes in the frames of `pack`. Never imports torch.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import orjson

from tunesmith.errors import InputError, TunesmithError
from tunesmith.types import TaskName

ToolCallFormat: TypeAlias = Literal["hermes", "json"]
"""How a chat template writes tool calls; see responses.with_tool_calls."""
OPEN = "<tool_call>"
Modality: TypeAlias = Literal["text", "labels", "embeddings"]
LENGTH_BYTES = 4


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


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to continue it. Either `messages` or `prompt` is given."""

    model: str
    messages: Sequence[Mapping[str, Any]] = ()
    """In OpenAI's shape, content as one string; rendered as in training."""
    tools: Sequence[Mapping[str, Any]] = ()
    prompt: str | None = None
    max_tokens: int | None = None
    """Most new tokens; None: as many as there is room for."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    """Texts that end an answer; they are not part of it."""
    n: int = 1
    logprobs: int | None = None
    """Number of most likely tokens listed for each token; 0: its own log probability only; None: nothing."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    json_schema: Mapping[str, Any] | None = None
    """The answer is JSON of this schema; {}: any JSON object."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log probability (natural) before temperature and penalties."""

    text: str
    """With a replacement character where it is a part of one."""
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt has been rendered and has a place in the batch."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of answer `index`: whole characters, never part of a stop text."""

    index: int
    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Tool call `number` of answer `index`; `arguments` is JSON."""

    index: int
    number: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Answer `index` is complete."""

    index: int
    reason: Literal["stop", "length", "tool_calls"]
    completion_tokens: int


StreamEvent: TypeAlias = Started | Delta | ToolCall | Finished


class RequestError(Exception):
    """A request that cannot be answered, in words for its sender.

    `status`: HTTP status: 4xx for the sender's mistake, 429 for a full queue, 503 while the engine is not there, 500
    for a crash that took this request with it. `code`: what OpenAI's error body calls it.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


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
    """Of the worker; None: one a core."""
    offline: bool = False
    base: str | None = None
    """Where the base model of the runs is now, if it was moved."""
    attaches: bool = False
    """Whether runs will be attached while it answers."""


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

    async def classify(self, model: str, texts: Sequence[str | tuple[str, str]]) -> list[Mapping[str, Any]]:
        """A line for each text, as `tunesmith predict` writes it."""
        ...

    async def embed(
        self, model: str, texts: Sequence[str], *, dimensions: int | None = None, is_query: bool = False
    ) -> tuple[list[list[float]], int]:
        """A vector for each text, cut to `dimensions` numbers, and the number of tokens read.

        `is_query`: with the prompt of texts that search."""
        ...

    def state(self) -> EngineState: ...

    async def close(self, grace_s: float) -> None:
        """Refuse new requests, finish those under way within the grace, and end the worker."""
        ...


def pack(message: Any) -> bytes:
    """A message between server and worker: its length in four bytes, and its JSON.

    A message is a value: a tuple of values, one of the classes above, an error, a path, or anything that JSON has.
    """
    content = orjson.dumps(_tagged(message))
    return len(content).to_bytes(LENGTH_BYTES, "big") + content


def unpack(content: bytes) -> Any:
    """The message in what follows its length. Sequences in fields are lists."""
    return _value(orjson.loads(content))


def _tagged(value: Any) -> tuple[str, Any]:
    """(name of the class, content); "" for what JSON has: what a client wrote is never read as one of the classes."""
    name = type(value).__name__
    if isinstance(value, tuple):
        return "tuple", [_tagged(one) for one in value]
    if isinstance(value, Exception):
        return name, {"message": str(value), **(vars(value) if isinstance(value, RequestError) else {})}
    if isinstance(value, Path):
        return "Path", str(value)
    return (name if name in _READ else ""), value


def _value(tagged: Sequence[Any]) -> Any:
    name, content = tagged
    if name == "tuple":
        return tuple(_value(one) for one in content)
    return _READ[name](content) if name else content


def _token(fields: Mapping[str, Any]) -> TokenLogprob:
    logprob = -math.inf if fields["logprob"] is None else fields["logprob"]  # JSON has no infinity
    return TokenLogprob(fields["text"], logprob, tuple(map(_token, fields["top"])))


_READ: Mapping[str, Callable[[Any], Any]] = {
    "Delta": lambda fields: Delta(**{**fields, "tokens": tuple(map(_token, fields["tokens"]))}),
    "Finished": lambda fields: Finished(**fields),
    "GenerationRequest": lambda fields: GenerationRequest(**fields),
    "EngineOptions": lambda fields: EngineOptions(**fields),
    "InputError": lambda fields: InputError(fields["message"]),
    "ModelCard": lambda fields: ModelCard(**fields),
    "Path": Path,
    "RequestError": lambda fields: RequestError(fields.pop("message"), **fields),
    "Started": lambda fields: Started(**fields),
    "TunesmithError": lambda fields: TunesmithError(fields["message"]),
}
