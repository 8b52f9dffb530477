"""Calls of tools taken out of the text of an answer, as it is written.

hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number, after text or without (Hermes, Qwen)
json     the whole answer is {"name": ..., "parameters": {...}} (Llama 3)

What is no call of a tool that was given stays text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Iterator, Set
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from tunesmith.serve.protocol import Called, CallFormat, Ended, Piece, Told

OPEN, CLOSE = "<tool_call>", "</tool_call>"


async def with_calls(
    telling: AsyncGenerator[tuple[int, Told], None], form: CallFormat, tools: Set[str]
) -> AsyncGenerator[tuple[int, Told], None]:
    """The same with calls in place of their text, and the reason "tool_calls" where there were any."""
    readers: dict[tuple[int, int], Reader] = {}
    async with aclosing(telling):
        async for number, told in telling:
            if not isinstance(told, (Piece, Ended)):
                yield number, told
                continue
            reader = readers.setdefault((number, told.index), Reader(form, tools))
            tokens = () if isinstance(told, Ended) else told.tokens
            for found in reader.finish() if isinstance(told, Ended) else reader.feed(told.text):
                if isinstance(found, str):
                    yield number, Piece(told.index, found, tokens)
                    tokens = ()
                else:
                    yield number, replace(found, index=told.index)
            if tokens:
                yield number, Piece(told.index, "", tokens)
            if isinstance(told, Ended):
                has_called = reader.num_calls > 0 and told.reason == "stop"
                yield number, replace(told, reason="tool_calls") if has_called else told


class Reader:
    """One answer: pieces of its text in, text and calls out."""

    def __init__(self, form: CallFormat, tools: Set[str]) -> None:
        self.num_calls = 0
        self._form = form
        self._tools = tools
        self._held = ""
        """What may be a call, or the beginning of one."""
        self._is_text = False
        """Whether the answer has begun with something that no whole call begins with."""
        self._blank = ""
        """White space that is text only where text follows."""

    def feed(self, piece: str) -> Iterator[str | Called]:
        self._held += piece
        if self._form == "json":
            self._is_text = self._is_text or self._held.lstrip()[:1] not in ("", "{")
            if self._is_text:
                yield from self._text(self._held)
                self._held = ""
            return
        while (begin := self._held.find(OPEN)) >= 0 and (end := self._held.find(CLOSE, begin)) >= 0:
            end += len(CLOSE)
            yield from self._text(self._held[:begin])
            yield from self._called(self._held[begin:end])
            self._held = self._held[end:]
        begin = begin if begin >= 0 else len(self._held) - _begun(self._held)
        yield from self._text(self._held[:begin])
        self._held = self._held[begin:]

    def finish(self) -> Iterator[str | Called]:
        """Nothing comes any more: a call that was not closed is read as it stands."""
        if self._held:
            yield from self._called(self._held)
        if self._blank and not self.num_calls:
            yield self._blank
        self._held = self._blank = ""

    def _text(self, text: str) -> Iterator[str]:
        said = text.rstrip()
        if said:
            yield self._blank + said
            self._blank = ""
        self._blank += text[len(said) :]

    def _called(self, text: str) -> Iterator[str | Called]:
        call = _read(text.removeprefix(OPEN).removesuffix(CLOSE) if self._form == "hermes" else text)
        if call is None or call[0] not in self._tools:
            yield from self._text(text)
            return
        self._blank = ""
        # Nine letters and digits, as the templates of Mistral want them.
        yield Called(0, self.num_calls, secrets.token_hex(5)[:9], *call)
        self.num_calls += 1


def _begun(text: str) -> int:
    """How much of the end may be the beginning of a call."""
    return next((num for num in range(min(len(OPEN) - 1, len(text)), 0, -1) if OPEN.startswith(text[-num:])), 0)


def _read(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON) of a call; None: it is none."""
    try:
        call: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    return call["name"], json.dumps(arguments, ensure_ascii=False)
