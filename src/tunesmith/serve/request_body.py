"""Bodies of requests: read whole within a size and a time, then as strict JSON, before anything else sees them."""

from __future__ import annotations

import asyncio
import email.message
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from tunesmith.data.read_json import BadRow, check_depth, loads
from tunesmith.serve.refusals import Refusal

MOST_BYTES = 1 << 20
MOST_DEPTH = 64
TIMEOUT_S = 30.0
DRAINED_BYTES = 16 * MOST_BYTES
"""What of a body that is too large is still read, and thrown away: a client that is cut off while it writes reads no
answer."""

_CLOSE = {"Connection": "close"}


class StrictRequest(Request):
    """A request whose body is what `docs/serve.md` allows, or refused."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._check_headers()
            try:
                self._body = await asyncio.wait_for(self._read(), TIMEOUT_S)
            except (asyncio.TimeoutError, TimeoutError):
                message = f"The body did not arrive within {TIMEOUT_S:.0f} seconds."
                raise Refusal(408, "request_timeout", message, headers=_CLOSE) from None
        return self._body

    async def json(self) -> Any:
        raw = await self.body()
        try:
            check_depth(raw, MOST_DEPTH)
        except BadRow:
            message = f"The body nests deeper than {MOST_DEPTH}."
            raise Refusal(400, "invalid_json", message) from None
        try:
            return loads(raw, depth=MOST_DEPTH)
        except BadRow as bad:
            message = "it stops before its end" if bad.code == "truncated_json" else f"{bad.message}. {bad.fix}".strip()
            raise Refusal(400, "invalid_json", f"The body cannot be read as JSON: {message}") from None

    def _check_headers(self) -> None:
        said = email.message.Message()
        said["content-type"] = self.headers.get("content-type", "")
        if said.get_content_type() != "application/json":
            message = "The body has to be sent as Content-Type: application/json."
            raise Refusal(415, "unsupported_media_type", message, headers=_CLOSE)
        charset = said.get_content_charset()
        if charset not in (None, "utf-8", "utf8"):
            raise Refusal(415, "unsupported_media_type", "The body has to be UTF-8.", headers=_CLOSE)
        if self.headers.get("content-encoding", "identity") != "identity":
            message = "The body has to be sent as it is, without a Content-Encoding."
            raise Refusal(415, "unsupported_media_type", message, headers=_CLOSE)

    async def _read(self) -> bytes:
        kept, num_bytes = bytearray(), 0
        more = True
        while more and num_bytes <= DRAINED_BYTES:
            event = await self.receive()
            if event["type"] == "http.disconnect":
                raise ClientDisconnect
            piece = event.get("body", b"")
            num_bytes += len(piece)
            if num_bytes <= MOST_BYTES:
                kept += piece
            more = event.get("more_body", False)
        if num_bytes > MOST_BYTES:
            message = f"The body has more than {MOST_BYTES:,} bytes."
            raise Refusal(413, "request_too_large", message, headers=_CLOSE)
        return bytes(kept)


class StrictRoute(APIRoute):
    """A route that reads its body so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strictly
