"""The socket and the connections on it: how long each may take, and how the server ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
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
from tunesmith.serve.gate import MOST_HEADER_BYTES, Gate
from tunesmith.serve.protocol import Engine
from tunesmith.serve.refusals import error_body

MOST_CONNECTIONS = 512
HEADERS_TIMEOUT_S = 15.0
"""From the first byte of a connection or a request to the end of its headers."""
WRITE_TIMEOUT_S = 60.0
"""Without a byte read by the client while more waits for it."""
KEEP_ALIVE_S = 30
AFTER_GRACE_S = 5
"""For the last words, once the engine has given up what it could not finish."""


_POLL_S = 0.05


@dataclass(frozen=True)
class Bound:
    """A socket with an address, on which nobody listens yet."""

    socket: socket.socket
    host: str
    port: int
    is_loopback: bool
    """Whether only this machine can reach it."""

    @property
    def url(self) -> str:
        """For a person on this machine."""
        address = ipaddress.ip_address(self.host)
        if address.is_unspecified:
            address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
        return f"http://[{address}]:{self.port}" if address.version == 6 else f"http://{address}:{self.port}"


def bind(host: str, port: int) -> Bound:
    """Take the address, before the model is loaded. Raises InputError saying why it cannot be had."""
    place = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise InputError(f"--host {host}: {error.strerror}. Give an address of this machine.") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Two sockets can have one address until one of them listens: the first to do so keeps it.
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise InputError(_cannot_bind(place, error)) from None
    name = listener.getsockname()
    return Bound(listener, name[0], name[1], ipaddress.ip_address(name[0].partition("%")[0]).is_loopback)


def _cannot_bind(place: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{place}: in use by another program. Choose another port: --port 8001, or --port 0 for any."
    if error.errno == errno.EACCES:
        return f"{place}: ports below 1024 are for the administrator. Choose another: --port 8000."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{place}: this machine has no such address. Choose another with --host."
    return f"{place}: {error.strerror}. Choose another with --host and --port."


class Connection(H11Protocol):
    """A connection that cannot be held by doing nothing."""

    _headers_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            self._say(503, "too_many_connections", "There are too many connections. Try again soon.")
        else:
            self._await_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_headers()
        else:
            self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.conn.trailing_data[0]:
            self._await_headers()  # the next request has begun, and did not arrive whole

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
        self._say(400, "bad_request", "This is no HTTP request that can be read.")

    def _await_headers(self) -> None:
        if self._headers_timer is None and not self.transport.is_closing():
            self._headers_timer = self.loop.call_later(HEADERS_TIMEOUT_S, self._too_slow)

    def _stop_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _too_slow(self) -> None:
        self._headers_timer = None
        self._say(408, "request_timeout", "The headers did not arrive in time.")

    def _say(self, status: int, code: str, message: str) -> None:
        """The last answer on this connection, to what is no request yet."""
        body = orjson.dumps(error_body(status, code, message))
        head = f"HTTP/1.1 {status} \r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, whose end is decided by its caller rather than by signals of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def make_server(app: Gate, *, grace_s: float) -> Server:
    """A server of `app` that, once `should_exit` is set, waits so long for requests under way."""
    settings: dict[str, Any] = {
        "http": Connection,
        "ws": "none",
        "lifespan": "off",
        "log_config": _SILENT,
        "access_log": False,
        "proxy_headers": False,
        "server_header": False,
        "timeout_keep_alive": KEEP_ALIVE_S,
        "timeout_graceful_shutdown": int(grace_s) + AFTER_GRACE_S,
        "h11_max_incomplete_event_size": MOST_HEADER_BYTES,
    }
    return Server(uvicorn.Config(app, **settings))


# What uvicorn would print of a request may hold what was asked; the gate tells what may be told.
_SILENT: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"nowhere": {"class": "logging.NullHandler"}},
    "loggers": {"uvicorn": {"handlers": ["nowhere"], "level": "CRITICAL", "propagate": False}},
}


async def serve(
    server: Server, bound: Bound, engine: Engine, *, grace_s: float, should_stop: Callable[[], bool]
) -> None:
    """Answer until `should_stop()`; then take nothing new, finish within the grace what is under way, and end."""
    serving = asyncio.create_task(server.serve(sockets=[bound.socket]))
    while not serving.done() and not should_stop():
        await asyncio.sleep(_POLL_S)
    server.should_exit = True
    # The engine gives up in time what takes longer, so that each client hears why.
    await asyncio.gather(serving, engine.close(grace_s))
