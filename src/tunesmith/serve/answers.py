"""Answers in OpenAI's shapes, whole and in chunks, from what an engine tells."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunesmith.serve.protocol import Begun, Called, Ended, Piece, TokenChance, Told

LEAST_LOGPROB = -9999.0
"""How OpenAI's API writes the logarithm of a probability that is as good as 0."""


@dataclass
class Counted:
    """What a request used so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: str | None = None
    """The code of what ended a stream before its end."""

    def count(self, told: Told) -> None:
        if isinstance(told, Begun):
            self.prompt_tokens += told.prompt_tokens
        elif isinstance(told, Ended):
            self.completion_tokens += told.completion_tokens

    def values(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass(frozen=True)
class Head:
    """What every chunk of an answer begins with."""

    id: str
    created: int
    model: str


class Shape(Protocol):
    """How one route writes its choices."""

    whole_object: str
    chunk_object: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of the first chunk; None: there is none before the text."""
        ...

    def piece(self, index: int, piece: Piece) -> dict[str, Any]: ...

    def called(self, index: int, call: Called) -> dict[str, Any]: ...

    def ended(self, index: int, ended: Ended) -> dict[str, Any]: ...

    def whole(self, index: int, pieces: Sequence[Piece], calls: Sequence[Called], ended: Ended) -> dict[str, Any]: ...


def chunk(head: Head, shape: Shape, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": head.id, "object": shape.chunk_object, "created": head.created, "model": head.model,
            "choices": choices}  # fmt: skip


@dataclass
class Collected:
    """Answers that are written whole, by their index."""

    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    calls: dict[int, list[Called]] = field(default_factory=dict)
    ended: dict[int, Ended] = field(default_factory=dict)

    def add(self, index: int, told: Piece | Called | Ended) -> None:
        if isinstance(told, Piece):
            self.pieces.setdefault(index, []).append(told)
        elif isinstance(told, Called):
            self.calls.setdefault(index, []).append(told)
        else:
            self.ended[index] = told

    def answer(self, head: Head, shape: Shape, counted: Counted) -> dict[str, Any]:
        choices = [
            shape.whole(i, self.pieces.get(i, []), self.calls.get(i, []), self.ended[i]) for i in sorted(self.ended)
        ]
        return {**chunk(head, shape, choices), "object": shape.whole_object, "usage": counted.values()}


def _bounded(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _chat_token(token: TokenChance) -> dict[str, Any]:
    return {"token": token.text, "logprob": _bounded(token.logprob), "bytes": list(token.bytes)}


def _call(call: Called) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


@dataclass(frozen=True)
class ChatShape:
    """/v1/chat/completions"""

    logprobs: bool
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _logprobs(self, tokens: Sequence[TokenChance]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        listed = [{**_chat_token(one), "top_logprobs": [_chat_token(top) for top in one.top]} for one in tokens]
        return {"content": listed, "refusal": None}

    def _chunk(
        self, index: int, delta: dict[str, Any], tokens: Sequence[TokenChance] = (), reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._chunk(index, {"content": piece.text}, piece.tokens)

    def called(self, index: int, call: Called) -> dict[str, Any]:
        return self._chunk(index, {"tool_calls": [{"index": call.number, **_call(call)}]})

    def ended(self, index: int, ended: Ended) -> dict[str, Any]:
        return self._chunk(index, {}, reason=ended.reason)

    def whole(self, index: int, pieces: Sequence[Piece], calls: Sequence[Called], ended: Ended) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        logprobs = self._logprobs([token for piece in pieces for token in piece.tokens])
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [_call(call) for call in calls]}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": ended.reason}


@dataclass(frozen=True)
class TextShape:
    """/v1/completions"""

    logprobs: bool
    whole_object = "text_completion"
    chunk_object = "text_completion"
    _offsets: dict[int, _Offsets] = field(default_factory=dict)

    def _logprobs(self, index: int, tokens: Sequence[TokenChance]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        offsets = self._offsets.setdefault(index, _Offsets())
        return {
            "tokens": [_spelled(token) for token in tokens],
            "token_logprobs": [_bounded(token.logprob) for token in tokens],
            "top_logprobs": [{_spelled(top): _bounded(top.logprob) for top in token.top} for token in tokens],
            "text_offset": list(offsets.of(tokens)),
        }

    def _choice(
        self, index: int, text: str, tokens: Sequence[TokenChance], reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(index, tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._choice(index, piece.text, piece.tokens)

    def called(self, index: int, call: Called) -> dict[str, Any]:
        raise AssertionError("texts that are gone on with call nothing")

    def ended(self, index: int, ended: Ended) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": ended.reason}

    def whole(self, index: int, pieces: Sequence[Piece], calls: Sequence[Called], ended: Ended) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.tokens]
        return self._choice(index, "".join(piece.text for piece in pieces), tokens, ended.reason)


def _spelled(token: TokenChance) -> str:
    """A token's text, or its bytes where those are a part of a character: two such would have one name."""
    if token.text.encode() == token.bytes:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


class _Offsets:
    """Where each token begins in the answer's text, in characters: a character can be several tokens."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def of(self, tokens: Sequence[TokenChance]) -> Iterator[int]:
        for token in tokens:
            yield self._num_characters
            self._num_characters += len(self._decoder.decode(token.bytes))
