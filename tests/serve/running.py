"""A server in a thread of its own, and clients of it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from openai import OpenAI

from serve.fake import FakeEngine
from tunesmith.serve import http
from tunesmith.serve.app import make_app
from tunesmith.serve.http import BoundSocket, HttpServer, bind
from tunesmith.serve.middleware import AccessPolicy, RequestLog

http._POLL_S = 0.02  # a server of a test ends at once


@dataclass
class Running:
    """What a test can reach of it."""

    bound: BoundSocket
    engine: FakeEngine
    loop: asyncio.AbstractEventLoop
    policy: AccessPolicy
    answered: list[RequestLog] = field(default_factory=list)
    num_active: int = 0

    def __post_init__(self) -> None:
        self.gate = make_app(self.engine, self.policy, [self.answered.append])

    def client(self, **options: Any) -> OpenAI:
        """The unmodified package, which tries nothing twice so that a test sees the first answer."""
        return OpenAI(base_url=f"{self.bound.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def raw(self, request: bytes, *, timeout_s: float = 10) -> bytes:
        """What comes back for these bytes until the server closes, or for `timeout_s`."""
        with socket.create_connection((self.bound.host, self.bound.port), timeout=timeout_s) as connection:
            connection.sendall(request)
            return read_all(connection)

    def ask(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, str]:
        """(status, JSON or text, head) of one request on a connection of its own."""
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = {"Host": f"127.0.0.1:{self.bound.port}", "Connection": "close", "Content-Length": str(len(raw))}
        if raw:
            lines["Content-Type"] = "application/json"
        lines |= headers or {}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
        answer = self.raw(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + raw)
        first, _, rest = answer.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in first.lower():
            rest = unchunked(rest)
        try:
            value = json.loads(rest)
        except ValueError:
            value = rest.decode()
        return int(first.split()[1]), value, first.decode()

    def wait_until_idle(self) -> None:
        """Until no ask is open in the engine, and all has been told of every request."""
        wait_for(lambda: self.engine.open == 0 and self.num_active == 0)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop).result()


def wait_for(holds: Any, *, timeout_s: float = 10) -> None:
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < timeout_s, "it did not happen in time"
        time.sleep(0.01)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except (TimeoutError, ConnectionResetError):
        pass
    return received


def unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        whole, body = whole + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return whole


@contextmanager
def running(
    policy: AccessPolicy | None = None, engine: FakeEngine | None = None, *, grace_s: float = 2
) -> Iterator[Running]:
    """A server at any free port, which has ended when the block ends."""
    loop = asyncio.new_event_loop()
    it = Running(bind("127.0.0.1", 0), engine or FakeEngine(), loop, policy or AccessPolicy())
    stop = threading.Event()

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        it.num_active += 1
        try:
            await it.gate(scope, receive, send)
        finally:
            it.num_active -= 1

    server = HttpServer(counted, it.engine, grace_s=grace_s, should_stop=stop.is_set)
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([it.bound.socket])))
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield it
    finally:
        stop.set()
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not end"
        loop.close()
