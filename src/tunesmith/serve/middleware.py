"""Access rules of every request, before any route: Host, Origin and API key; and a log entry for each."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.errors import InputError
from tunesmith.serve.protocol import RequestError
from tunesmith.serve.responses import Usage, error_response

CLIENT_GONE = 499
"""Logged status of a request whose client went away before its answer."""
MAX_HEADER_BYTES = 32 * 1024
KEY_VARIABLE = "TUNESMITH_API_KEY"
PROJECT: ContextVar[str | None] = ContextVar("project", default=None)
"""The project of the request under way, if an Admission gave it one."""

MAKE_KEY = 'Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
_HOST = re.compile(rb"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


@dataclass(frozen=True)
class ApiKeys:
    """SHA-256 digests of the accepted API keys. The keys themselves are not kept."""

    digests: tuple[bytes, ...]

    def accepts(self, authorization: bytes | None) -> bool:
        """Whether an Authorization header carries one of the keys. Compared in constant time."""
        scheme, _, key = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # All of them: which one must not show.
        same = [hmac.compare_digest(digest, known) for known in self.digests]
        return scheme.lower() == b"bearer" and any(same)

    @classmethod
    def of(cls, keys: Sequence[str]) -> ApiKeys | None:
        """The accepted keys; None if there are none."""
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in keys)) if keys else None


def wrong_key(message: str = "This server needs an API key: Authorization: Bearer KEY.") -> RequestError:
    return RequestError(message, status=401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


Admission = Callable[[str, str, Mapping[bytes, bytes]], Awaitable[str]]
"""The project of a request by its method, path and headers. Raises RequestError."""


def read_keys(file: Path | None, environment: Mapping[str, str]) -> list[str]:
    """The keys in `file`, one a line, or the one in TUNESMITH_API_KEY.

    Raises InputError if the file cannot be read or holds no key, and for a key that is too short.
    """
    keys = [environment[KEY_VARIABLE].strip()] if environment.get(KEY_VARIABLE) else []
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or "it is no UTF-8 text"
            raise InputError(f"{file}: no key can be read: {why}.") from None
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise InputError(f"{file}: holds no key. One a line. {MAKE_KEY}")
    for number, key in enumerate(keys, 1):
        if not re.fullmatch(r"[!-~]{20,}", key):
            place = str(file or KEY_VARIABLE) + (f": key {number}" if len(keys) > 1 else "")
            raise InputError(f"{place}: a key has 20 printable ASCII characters or more, and no blanks. {MAKE_KEY}")
    return keys


@dataclass(frozen=True)
class RequestLog:
    """A request that has ended. Contains nothing of its content or its answer."""

    id: str
    method: str
    path: str
    route: str
    """The declared path; "" if there is none."""
    status: int
    seconds: float
    usage: Usage
    fault: str = ""
    """Place in the code that raised an unexpected error, whose message could quote the request."""


@dataclass(frozen=True)
class AccessPolicy:
    """Who may send requests."""

    keys: ApiKeys | None = None
    """None: no key is needed."""
    hosts: frozenset[str] = frozenset({"localhost"})
    """Allowed names in a Host header. Addresses are always allowed: only a name can
    be made to point elsewhere."""
    origins: frozenset[str] = frozenset()
    """Web pages that may send requests from a browser, such as https://chat.example.org."""
    admission: Admission | None = None
    """In place of `keys`."""
    known: Callable[[Scope], Response | None] = lambda scope: None
    """Answers for which no route is needed."""
    refused: Callable[[Scope, RequestError], Response] = lambda scope, error: error_response(error)
    """The answer to a request that is not allowed."""


class AccessMiddleware:
    """An ASGI app around another: refuses what the policy does not allow, and logs every request."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy, listeners: Sequence[Callable[[RequestLog], None]]) -> None:
        self.app, self.policy, self.listeners = app, policy, listeners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._handle(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, request_id, fault = time.monotonic(), secrets.token_hex(8), ""
        status, is_complete, origin = 500, False, Headers(scope=scope).get("origin")
        scope.setdefault("state", {})["request_id"] = request_id

        async def sending(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"], headers["X-Content-Type-Options"] = request_id, "nosniff"
                headers.setdefault("Cache-Control", "no-store")
                if origin in self.policy.origins:  # so that the page can read also why it is refused
                    headers["Access-Control-Allow-Origin"], headers["Access-Control-Expose-Headers"] = origin, "*"
                    headers.add_vary_header("Origin")
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            answer = await self._answer(scope)
            await answer(scope, receive, sending)
        except ClientDisconnect:
            is_complete = False
        except Exception as error:  # uvicorn closes the connection: half an answer must not look whole
            fault = _where(error)
        finally:
            usage, route = scope["state"].get("usage") or Usage(), getattr(scope.get("route"), "path", "")
            status, seconds = status if is_complete or fault else CLIENT_GONE, time.monotonic() - started
            log = RequestLog(request_id, scope["method"], str(scope["path"]), route, status, seconds, usage, fault)
            for listener in self.listeners:
                listener(log)

    async def _answer(self, scope: Scope) -> ASGIApp:
        """The app, or the answer in its place."""
        error = self._wrong_source(scope)
        if error is None and (preflight := self._preflight(scope)) is not None:
            return preflight
        error = error or await self._wrong_key(scope)
        return self.policy.known(scope) or self.app if error is None else self.policy.refused(scope, error)

    def _preflight(self, scope: Scope) -> Response | None:
        """The answer to a CORS preflight, for which no key is needed: what an allowed page may send."""
        sent = Headers(scope=scope)
        if scope["method"] != "OPTIONS" or "access-control-request-method" not in sent or "origin" not in sent:
            return None
        return Response(headers={
            "Access-Control-Allow-Methods": "GET, POST, DELETE",
            "Access-Control-Allow-Headers": sent.get("access-control-request-headers", "*"),
            "Access-Control-Allow-Private-Network": "true",  # some browsers need it for pages on the internet
            "Access-Control-Max-Age": "600",
        })  # fmt: skip

    def _wrong_source(self, scope: Scope) -> RequestError | None:
        # h11 limits what has arrived of unfinished headers, and they can arrive whole.
        num_bytes = len(scope["raw_path"]) + len(scope["query_string"])
        if num_bytes + sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            message = f"The headers have more than {MAX_HEADER_BYTES:,} bytes."
            return RequestError(message, status=431, code="headers_too_large", headers={"Connection": "close"})
        if _headers(scope, b"content-length") and _headers(scope, b"transfer-encoding"):
            # A proxy that believes the other of the two would read the rest of the body as a request (RFC 9112, 6.1).
            message = "A request has a Content-Length or a Transfer-Encoding, not both."
            return RequestError(message, code="bad_request", headers={"Connection": "close"})
        hosts, origins = _headers(scope, b"host"), _headers(scope, b"origin")
        if len(hosts) != 1 or not self._is_allowed_host(hosts[0]):
            message = "The Host of this request is not one that is served here. Allow it with --allow-host NAME."
            return RequestError(message, status=403, code="host_not_allowed")
        own_origins = (b"http://" + hosts[0].lower(), b"https://" + hosts[0].lower())
        if any(
            origin.lower() not in own_origins and origin.decode("latin-1") not in self.policy.origins
            for origin in origins
        ):
            message = "Web pages of this origin may not send requests here. Allow it with --allow-origin URL."
            return RequestError(message, status=403, code="origin_not_allowed")
        return None

    async def _wrong_key(self, scope: Scope) -> RequestError | None:
        keys, admission = self.policy.keys, self.policy.admission
        if (keys is None and admission is None) or (scope["method"], scope["path"]) == ("GET", "/"):
            return None  # the page is not secret
        if any(len(_headers(scope, name)) > 1 for name in (b"authorization", b"openai-project")):
            return wrong_key("A request has one key, and one project.")
        headers = dict(scope["headers"])
        if keys is not None and not keys.accepts(headers.get(b"authorization")):
            return wrong_key()
        if admission is not None:
            try:
                PROJECT.set(await admission(scope["method"], str(scope["path"]), headers))
            except RequestError as error:
                return error
        return None

    def _is_allowed_host(self, host: bytes) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].decode().lower().removesuffix(".")
        with suppress(ValueError):
            ipaddress.ip_address(name.strip("[]"))
            return True
        return name in self.policy.hosts


def _headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value for header, value in scope["headers"] if header == name]


def _where(error: BaseException) -> str:
    """The type of an error, and the lines that it passed through."""
    frames = list(traceback.extract_tb(error.__traceback__)[-6:])
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}"
