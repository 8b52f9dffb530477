"""A request for answers of a model, and the events of its answers. Never imports torch.

GenerationRequest -> Started, Delta, Delta, ..., Finished
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tunesmith.types import Record


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to continue it. Either `messages` or `prompt` is given."""

    model: str
    messages: Sequence[Record] = ()
    """In OpenAI's shape, content as one string; rendered as in training."""
    tools: Sequence[Record] = ()
    images: Sequence[tuple[int, int, str]] = ()
    """Each as the index of its message, the character before which it stands, and its file in base64."""
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
    json_schema: Record | None = None
    """The answer is JSON of this schema; {}: any JSON object."""


Token: TypeAlias = Record
"""A token in OpenAI's shape: its text, log probability before temperature and
penalties, bytes and likeliest tokens."""


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt has been rendered and has a place in the batch."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of answer `index`: whole characters, never part of a stop text."""

    index: int
    text: str
    tokens: Sequence[Token] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Tool call `number` of answer `index`, in OpenAI's shape."""

    index: int
    number: int
    call: Record


@dataclass(frozen=True, slots=True)
class Finished:
    """Answer `index` is complete."""

    index: int
    reason: Literal["stop", "length", "tool_calls"]
    completion_tokens: int
    ids: Sequence[int] = ()
    """Its tokens, with the one that ended it, where the request keeps them."""
    logps: Sequence[float] = ()
    """Log-probability of each in the distribution that it was drawn from."""


StreamEvent: TypeAlias = Started | Delta | ToolCall | Finished


class RequestError(Exception):
    """A request that cannot be answered, in words for its sender.

    `status`: HTTP status: 4xx for the sender's mistake, 429 for a full queue, 503 while the engine is not
    there, 500 for a crash that took this request with it. `code`: what OpenAI's error body calls it.
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
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})
