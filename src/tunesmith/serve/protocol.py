"""What travels between the routes of the server and the engine that holds the model. Standard library only.

routes → Ask → Engine → Begun, Piece, Piece, ..., Ended → routes
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from tunesmith.types import TaskName

CallFormat: TypeAlias = Literal["hermes", "json"]
"""See server/calls.py."""


@dataclass(frozen=True, slots=True)
class Served:
    """One model a client can name: a base, or a run's adapter on it."""

    name: str
    task: TaskName
    answers: Literal["text", "labels", "embeddings"]
    max_tokens: int
    """Most tokens of prompt and answer together."""
    is_base: bool
    created: int
    """Seconds since 1970, of the run or the model's files."""
    labels: tuple[str, ...] = ()
    calls: CallFormat | None = None
    """How its template writes calls of tools; None: in none of the ways that are read here."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt and how it is gone on from. Either `messages` or `prompt` is given."""

    model: str
    messages: tuple[Mapping[str, Any], ...] = ()
    """In OpenAI's shape, content as one string; rendered as in training."""
    tools: tuple[Mapping[str, Any], ...] = ()
    prompt: str | tuple[int, ...] | None = None
    max_tokens: int | None = None
    """Most new tokens; None: as many as there is room for."""
    temperature: float = 1.0
    """0: the likeliest token."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    n: int = 1
    logprobs: int | None = None
    """Likeliest tokens listed for each token written; 0: its own logarithm alone; None: none."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    json_schema: Mapping[str, Any] | None = None
    """The answer is JSON of this schema; {}: any JSON object."""


@dataclass(frozen=True, slots=True)
class TokenChance:
    """A token, its bytes and the natural logarithm of its probability before temperature and penalties."""

    text: str
    bytes: bytes
    logprob: float
    top: tuple[TokenChance, ...] = ()


@dataclass(frozen=True, slots=True)
class Begun:
    """The prompt has been rendered and has a place in the batch."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """More of answer `index`: whole characters, never part of a stop text."""

    index: int
    text: str
    tokens: tuple[TokenChance, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """Answer `index` is complete."""

    index: int
    reason: Literal["stop", "length", "tool_calls"]
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Called:
    """Call `number` of a tool in answer `index`, taken out of its text."""

    index: int
    number: int
    id: str
    name: str
    arguments: str
    """JSON."""


Told: TypeAlias = Begun | Piece | Called | Ended


class Refused(Exception):
    """An ask that cannot be answered, in words for its sender.

    `code`: what it is called in OpenAI's error body; `status`: its HTTP status: 400 for the sender's mistake, 429 for
    a full queue, 503 when the engine is not there, 500 for a crash that took this ask with it.
    """

    def __init__(self, message: str, *, status: int, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine may take, said when it is started:

        from tunesmith.serve.engine import start_engine
        engine = await start_engine(names, root=root, options=EngineOptions(), on_note=print)

    `names`: run names or folders, model folders or ids; `root`: the folder of runs; `on_note`: told in a line each what
    a person should know (a run that has not ended, a restart). The models of all names are on one base; every name and
    the base itself, where it can answer, is in `served`. It comes back when the child has loaded them and proved that
    it asks as was trained; else it raises `InputError` or `TunesmithError` naming the run, and no child is left.
    """

    max_prompt_tokens: int | None = None
    """Longest prompt; None: what the model's window takes. Longer: Refused 400, context_length_exceeded."""
    max_new_tokens: int = 4096
    """Most tokens of an answer. An ask for more: Refused 400; an ask without a number gets as many as there is room."""
    streams: int = 16
    """Answers decoded together; an ask with a greater `n` is Refused 400."""
    queue: int = 64
    """Asks that wait for a place at most; one more: Refused 429."""
    memory_limit_bytes: int | None = None
    """Resident memory at which the child is ended and started again; None: 90 % of what the machine has."""
    threads: int | None = None
    """Of the child; None: one a core."""
    offline: bool = False
    """Nothing is downloaded: models are on this machine already."""
    base: str | None = None
    """Where the base of the runs is now, if it was moved."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """How the engine is, for /health and /metrics. Counters count from the start of the server."""

    alive: bool
    running: int
    """Answers in the batch now."""
    waiting: int
    restarts: int
    prompt_tokens: int
    completion_tokens: int
    rss_bytes: int
    """Of the child process."""


class Engine(Protocol):
    """Answers asks of many clients at once. All methods are called on one event loop."""

    served: Sequence[Served]

    def ask(self, ask: Ask) -> AsyncIterator[Told]:
        """`Begun`, then pieces of its `n` answers as they are written, each closed by `Ended`. Closing the iterator
        (`aclose`) frees its place. Raises Refused, at once or in the middle."""
        ...

    async def classify(self, model: str, texts: Sequence[str | tuple[str, str]]) -> list[Mapping[str, Any]]:
        """A line a text, as `tunesmith predict` writes it: label, and probabilities where there are classes."""
        ...

    async def embed(self, model: str, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """A vector a text, and how many tokens were read."""
        ...

    def state(self) -> EngineState: ...

    async def close(self, grace_s: float) -> None:
        """Take no more asks, finish those under way within the grace, and end the child."""
        ...
