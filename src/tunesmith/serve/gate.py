"""What every request passes before any route: Host, Origin, key, and whether there is room. And what became of it."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import secrets
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.serve.answers import Counted
from tunesmith.serve.keys import Keys
from tunesmith.serve.page import is_wanted
from tunesmith.serve.refusals import Refusal, as_response

MOST_HEADER_BYTES = 32 * 1024
GONE = 499
"""Status in logs of a request whose client went away before its answer."""

_HOST = re.compile(rb"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


@dataclass(frozen=True)
class Answered:
    """A request that has ended. Nothing of what was asked or answered is in it."""

    id: str
    method: str
    path: str
    """As it was asked."""
    route: str
    """As it is declared; "" where there is none."""
    status: int
    seconds: float
    counted: Counted
    fault: str = ""
    """Where in the code an error came from that nobody expected; its message could hold what was asked."""


@dataclass(frozen=True)
class Rules:
    """Who may ask, and how many at once."""

    keys: Keys | None = None
    """None: nobody is asked for a key."""
    hosts: frozenset[str] = frozenset({"localhost"})
    """Names that a Host header may have. Addresses are always allowed: only a name can be made to point elsewhere."""
    origins: frozenset[str] = frozenset()
    """Web pages that may ask from a browser, such as https://chat.example.org."""
    most_requests: int = 256
    """Requests under way at once."""


@dataclass
class Gate:
    """An ASGI app around another. Denies whatever it does not know."""

    app: ASGIApp
    rules: Rules
    listeners: list[Callable[[Answered], None]] = field(default_factory=list)
    under_way: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        begun = time.monotonic()
        sending = _Sending(send, secrets.token_hex(8), self._allowed_origin(scope))
        scope.setdefault("state", {})["request_id"] = sending.id
        self.under_way += 1
        fault, is_gone = "", False
        try:
            await self._let_through(scope, receive, sending)
        except ClientDisconnect:
            is_gone = True
        except asyncio.CancelledError:
            is_gone = True
            raise
        except Exception as error:
            fault = _where(error)
            if not sending.is_complete:
                raise  # the server closes the connection: half an answer must not look whole
        finally:
            self.under_way -= 1
            status = GONE if is_gone else sending.status or 500
            self._tell(scope, sending.id, status, time.monotonic() - begun, fault)

    async def _let_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        if refusal is not None:
            await as_response(refusal)(scope, receive, send)
        elif _is_preflight(scope):
            await send({"type": "http.response.start", "status": 204, "headers": list(_PREFLIGHT)})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        return self._not_from_here(scope) or self._not_known(scope) or self._not_now(scope)

    def _not_from_here(self, scope: Scope) -> Refusal | None:
        if _headers(scope, b"content-length") and _headers(scope, b"transfer-encoding"):
            # A proxy that believes the other of the two would take the rest of the body for a request (RFC 9112, 6.1).
            message = "A request has a Content-Length or a Transfer-Encoding, not both."
            return Refusal(400, "bad_request", message, headers={"Connection": "close"})
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
            message = f"The headers have more than {MOST_HEADER_BYTES:,} bytes."
            return Refusal(431, "headers_too_large", message)
        hosts = _headers(scope, b"host")
        if len(hosts) != 1 or not self._is_allowed_host(hosts[0]):
            message = "The Host of this request is not one that is served here. Allow it with --allow-host NAME."
            return Refusal(403, "host_not_allowed", message)
        origin = _header(scope, b"origin")
        if origin is not None and not self._is_own(origin, hosts[0]) and self._allowed_origin(scope) is None:
            message = "Web pages of this origin may not ask here. Allow it with --allow-origin URL."
            return Refusal(403, "origin_not_allowed", message)
        return None

    def _not_known(self, scope: Scope) -> Refusal | None:
        # Browsers ask first, and without a key, whether a page of this origin may ask at all.
        is_question = _header(scope, b"origin") is not None and _is_preflight(scope)
        if self.rules.keys is not None and not is_question and not is_wanted(scope):
            given = _headers(scope, b"authorization")
            if len(given) != 1 or not self.rules.keys.let_in(given[0]):
                message = "This server asks for an API key: Authorization: Bearer KEY."
                return Refusal(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        return None

    def _not_now(self, scope: Scope) -> Refusal | None:
        if scope["query_string"]:
            message = "Nothing is read from the query of a URL. Parameters belong into the body, a key into a header."
            return Refusal(400, "unknown_parameter", message)
        if self.under_way > self.rules.most_requests:
            message = f"{self.rules.most_requests} requests are under way, and no more are taken. Try again soon."
            return Refusal(429, "too_many_requests", message)
        return None

    def _is_allowed_host(self, host: bytes) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].decode().lower().removesuffix(".")
        with suppress(ValueError):
            ipaddress.ip_address(name.strip("[]"))
            return True
        return name in self.rules.hosts

    @staticmethod
    def _is_own(origin: bytes, host: bytes) -> bool:
        """Whether a page comes from this server. The Host has been looked at: no other's name leads here."""
        return origin.lower() in (b"http://" + host.lower(), b"https://" + host.lower())

    def _allowed_origin(self, scope: Scope) -> str | None:
        origins = [origin.decode("latin-1") for origin in _headers(scope, b"origin")]
        return origins[0] if len(origins) == 1 and origins[0] in self.rules.origins else None

    def _tell(self, scope: Scope, request_id: str, status: int, seconds: float, fault: str) -> None:
        counted = scope["state"].get("counted") or Counted()
        route = getattr(scope.get("route"), "path", "")
        path = str(scope["path"])
        for listener in self.listeners:
            listener(Answered(request_id, scope["method"], path, route, status, seconds, counted, fault))


_PREFLIGHT = (
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, content-type, x-requested-with"),
    (b"access-control-max-age", b"600"),
)


class _Sending:
    """`send` that remembers the status and adds the headers that every answer has."""

    def __init__(self, send: Send, request_id: str, origin: str | None) -> None:
        self._send = send
        self.id = request_id
        self._origin = origin
        self.status = 0
        self.is_complete = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            headers += [(b"x-request-id", self.id.encode()), (b"x-content-type-options", b"nosniff")]
            if not any(name == b"cache-control" for name, _ in headers):
                headers.append((b"cache-control", b"no-store"))
            if self._origin is not None:
                headers += [(b"access-control-allow-origin", self._origin.encode("latin-1")), (b"vary", b"Origin")]
            message = {**message, "headers": headers}
        await self._send(message)
        self.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)


def _headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value for header, value in scope["headers"] if header == name]


def _is_preflight(scope: Scope) -> bool:
    return scope["method"] == "OPTIONS" and _header(scope, b"access-control-request-method") is not None


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next(iter(_headers(scope, name)), None)


def _where(error: BaseException) -> str:
    """The kind of an error and the places it came through."""
    frames: Iterable[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)[-6:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(list(frames)))
    return f"{type(error).__name__} at {places}"
