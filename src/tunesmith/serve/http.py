"""The socket, the limits of each connection, and the end of the server."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tunesmith.errors import InputError
from tunesmith.serve.middleware import MAX_HEADER_BYTES, AccessMiddleware
from tunesmith.serve.protocol import Engine, RequestError
from tunesmith.serve.responses import error_body

MAX_CONNECTIONS = 512
HEADERS_TIMEOUT_S = 15.0
"""From the first byte of a connection or a request to the end of its headers."""
WRITE_TIMEOUT_S = 60.0
"""While the client reads nothing."""
KEEP_ALIVE_S = 30
AFTER_GRACE_S = 5
"""For the last answers, after the engine has ended what it could not finish."""
_POLL_S = 0.25
"""Pause between two checks for the end, long enough to leave the core to a run."""


@dataclass(frozen=True)
class BoundSocket:
    """A socket that has its address."""

    socket: socket.socket
    host: str
    port: int
    is_loopback: bool
    """Whether only this machine can reach it."""

    @property
    def url(self) -> str:
        """For a person on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def bind(host: str, port: int) -> BoundSocket:
    """Bind the address, before the model is loaded. Raises InputError with the reason if that fails."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # :: takes IPv4 too
        listener = socket.create_server(address[:2], family=family, backlog=1, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        why = getattr(error, "strerror", None) or "it is not the name of a host"
        if number > 0:
            why = os.strerror(number)
        message = f"{host}:{port}: {why}. Choose another with --host and --port; port 0 is any free one."
        raise InputError(message) from None
    name = listener.getsockname()
    return BoundSocket(listener, name[0], name[1], ipaddress.ip_address(name[0].partition("%")[0]).is_loopback)


class BoundedConnection(H11Protocol):
    """A connection with time limits: uvicorn limits only the time between requests."""

    _headers_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _idle_since = 0.0
    """When it was opened, or its last answer ended."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does so for sockets whose protocol is named. Else what follows the first part of an answer, its body
        # or a further token, waits until the client has said that it has that: up to 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._idle_since = self.loop.time()
        if len(self.connections) > MAX_CONNECTIONS and not self._end_an_idle_one():
            self._end(503, "too_many_connections", "There are too many connections. Try again soon.")
        else:
            self._await_headers()

    def _end_an_idle_one(self) -> bool:
        """Whether another connection gave its place: the one without a request for longest, so that those who
        open connections and ask nothing keep nobody out."""
        others: list[Any] = [
            connection
            for connection in self.connections
            if connection is not self and not connection.transport.is_closing()
        ]
        if len(others) < MAX_CONNECTIONS:
            return True
        idle = [connection for connection in others if connection.cycle is None or connection.cycle.response_complete]
        if idle:
            longest = min(idle, key=lambda connection: connection._idle_since)
            longest._end(408, "request_timeout", "Others needed the place of this connection, which sent no request.")
        return bool(idle)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_headers()
        else:
            self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since = self.loop.time()
        if self.cycle.response_complete and self.conn.trailing_data[0]:
            self._await_headers()  # part of the next request is there

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._end(400, "bad_request", "This is no HTTP request that can be read.")

    def _await_headers(self) -> None:
        if self._headers_timer is None and not self.transport.is_closing():
            message = "The headers did not arrive in time."
            self._headers_timer = self.loop.call_later(HEADERS_TIMEOUT_S, self._end, 408, "request_timeout", message)

    def _stop_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _end(self, status: int, code: str, message: str) -> None:
        """The last answer on this connection, to something that is not a request yet."""
        body = orjson.dumps(error_body(RequestError(message, status=status, code=code)))
        head = f"HTTP/1.1 {status} \r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn's server, which ends with `engine` when `should_stop()`, and not by signals of its own.

    It refuses new requests then, and finishes the others within `grace_s`.
    """

    def __init__(
        self, app: AccessMiddleware, engine: Engine, *, grace_s: float, should_stop: Callable[[], bool]
    ) -> None:
        settings: dict[str, Any] = {
            "http": BoundedConnection,
            "ws": "none",
            "lifespan": "off",
            "log_config": None,  # uvicorn's own log would quote requests; the middleware logs what may be shown
            "log_level": "critical",
            "access_log": False,
            "proxy_headers": False,
            "server_header": False,
            "timeout_keep_alive": KEEP_ALIVE_S,
            "timeout_graceful_shutdown": int(grace_s) + AFTER_GRACE_S,
            "h11_max_incomplete_event_size": MAX_HEADER_BYTES,
        }
        super().__init__(uvicorn.Config(app, **settings))
        self._engine, self._grace_s, self._should_stop = engine, grace_s, should_stop

    async def main_loop(self) -> None:
        while not self._should_stop():
            await self.on_tick(0)  # the date of answers
            await asyncio.sleep(_POLL_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # The engine ends in time what takes longer, so that each client gets a reason.
        await asyncio.gather(super().shutdown(sockets), self._engine.close(self._grace_s))

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
