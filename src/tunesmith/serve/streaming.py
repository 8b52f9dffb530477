"""Answers as server-sent events: `data: {...}` for each chunk, `data: [DONE]` at the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tunesmith.serve.answers import Counted, Head, Shape, chunk
from tunesmith.serve.protocol import Begun, Called, Ended, Piece, Refused, Told
from tunesmith.serve.refusals import refused_body
from tunesmith.serve.telling import unless_gone

DONE = b"data: [DONE]\n\n"

Telling = AsyncGenerator[tuple[int, Told], None]


def event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


async def events(
    telling: Telling, *, head: Head, shape: Shape, n: int, counted: Counted, tells_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The events of one answer. What goes wrong on the way is the last event: the status has been sent by then."""

    def written(choice: dict[str, Any]) -> bytes:
        usage: dict[str, Any] = {"usage": None} if tells_usage else {}
        return event({**chunk(head, shape, [choice]), **usage})

    try:
        async for number, told in telling:
            counted.count(told)
            if isinstance(told, Begun):
                openings = [shape.opening(number * n + index) for index in range(n)]
                for choice in openings:
                    if choice is not None:
                        yield written(choice)
            elif isinstance(told, Piece):
                yield written(shape.piece(number * n + told.index, told))
            elif isinstance(told, Called):
                yield written(shape.called(number * n + told.index, told))
            elif isinstance(told, Ended):
                yield written(shape.ended(number * n + told.index, told))
    except Refused as refused:
        counted.failed = refused.code
        yield event(refused_body(refused))
        return
    if tells_usage:
        yield event({**chunk(head, shape, []), "usage": counted.values()})
    yield DONE


class EventStream(Response):
    """A response that writes events as they come, and stops asking when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, written: AsyncGenerator[bytes, None], telling: Telling) -> None:
        """`telling` is closed in any case, also where `written` was never begun."""
        # no-transform, X-Accel-Buffering: proxies that collect an answer before they pass it on make no stream of it.
        super().__init__(headers={"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.written = written
        self.telling = telling

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(receive, self._write(send))
        finally:
            await self.telling.aclose()

    async def _write(self, send: Send) -> None:
        async with aclosing(self.written):
            async for piece in self.written:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
