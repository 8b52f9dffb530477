"""Attacks in bytes on a served model, counted: what is no proper request is refused, and nothing is held or lost by it.

pytest -m slow -s tests/server/test_attack.py
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from inference.engines import two_runs
from inference.soak import cases
from server.running import read_all, wait_for
from server.test_soak import BASE, CHAT, RUNS, Live, asked, needs_proc, serving, soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), needs_proc]

JSON = b"Content-Type: application/json\r\n"
POST = f"POST {CHAT} HTTP/1.1\r\n".encode()
HOST = b"Host: localhost\r\n"
BODY = asked(max_tokens=2)
NEXT = b"GET /v1/models/SMUGGLED HTTP/1.1\r\nHost: localhost\r\n\r\n"


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


def smuggling() -> Iterator[bytes]:
    """Requests whose end two readers could see at two places."""
    size = len(BODY)
    for lengths in (b"5, 6", b"+5", b"-1", b"0x5", b"5 5", b"1e2", b"", b"99999999999999999999", b"\xb2", b"5;6"):
        yield POST + HOST + JSON + b"Content-Length: " + lengths + b"\r\n\r\n" + BODY + NEXT
    yield POST + HOST + JSON + b"Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (size, size + 1) + BODY + NEXT
    for coding in (
        b"chunked",
        b"Chunked",
        b"identity",
        b"gzip, chunked",
        b"chunked, chunked",
        b"xchunked",
        b"\x0bchunked",
    ):
        yield POST + HOST + JSON + b"Content-Length: %d\r\nTransfer-Encoding: %s\r\n\r\n" % (size, coding) + BODY + NEXT
    for coding in (b"identity", b"gzip, chunked", b"chunked, identity", b"xchunked", b"chunked, chunked", b"cow"):
        yield POST + HOST + JSON + b"Transfer-Encoding: %s\r\n\r\n" % coding + chunked(BODY) + NEXT
    for chunk in (
        b"zz\r\nabc\r\n",
        b"-1\r\nabc\r\n",
        b"5\r\nabc",
        b"5\nabcde\r\n",
        b"FFFFFFFFFFFFFFFFFF\r\n",
        b"3\r\nabcXX",
    ):
        yield POST + HOST + JSON + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n" + NEXT


def malformed() -> Iterator[bytes]:
    """Lines and headers that no client writes."""
    end = b"Connection: close\r\n\r\n"
    for line in (b"GET /v1/models", b"GET  /v1/models HTTP/1.1", 
                 b"\x16\x03\x01\x02", b"GET /\x00 HTTP/1.1", b"GE\x01T / HTTP/1.1", b"PRI * HTTP/2.0"):  # fmt: skip
        yield line + b"\r\n" + HOST + end
    for header in (b" folded: x", b"Na me: x", b"X: a\x00b", b": x", b"Content-Type : x", b"X" * 70_000, b"no colon"):
        yield b"GET /v1/models HTTP/1.1\r\n" + HOST + header + b"\r\n" + end


def from_elsewhere() -> Iterator[bytes]:
    """Hosts and origins that are not this server's."""
    get, end = b"GET /v1/models HTTP/1.1\r\n", b"Connection: close\r\n\r\n"
    for host in (b"evil.example", b"localhost.evil.example", b"localhost@evil", b"127.0.0.1.nip.io",
                 b"", b"a b", b"[::1",
                 b"localhost\r\nHost: localhost", b"localhost, evil", b"\xff"):  # fmt: skip
        yield get + b"Host: " + host + b"\r\n" + end
    yield get + end
    for origin in (
        b"http://evil.example",
        b"null",
        b"http://localhost",
        b"https://localhost:1",
        b"file://",
        b"http://localhost@evil",
    ):
        yield get + b"Host: localhost:8\r\nOrigin: " + origin + b"\r\n" + end


class Raw:
    """Bytes to a server, and what comes back."""

    def __init__(self, live: Live) -> None:
        place = urlsplit(live.url)
        self.place = (str(place.hostname), int(place.port or 0))

    def open(self) -> socket.socket:
        return socket.create_connection(self.place, timeout=45)

    def statuses(self, request: bytes) -> list[int]:
        with self.open() as connection:
            connection.sendall(request)
            parts = read_all(connection).split(b"HTTP/1.1 ")[1:]
        return [int(part[:3]) for part in parts]


def refused(raw: Raw, requests: Iterator[bytes], name: str, counts: Counter[str]) -> None:
    """Every one is refused, and what follows it on the connection is no request."""
    for request in requests:
        found = raw.statuses(request)
        assert found in ([], *([status] for status in (400, 403, 404, 405, 408, 411, 413, 415, 431, 501, 505))), (
            request[:200],
            found,
        )
        counts[f"{name}: {found[0] if found else 'closed'}"] += 1


def slow_and_huge(raw: Raw, counts: Counter[str]) -> None:
    """Bodies that come a byte at a time, or never end: each is let go, and others are answered meanwhile."""
    ended: list[float] = []

    def drip() -> None:
        begun = time.monotonic()
        with raw.open() as connection:
            connection.sendall(POST + HOST + JSON + b"Content-Length: 1000\r\n\r\n")
            try:
                while time.monotonic() - begun < 60:
                    connection.sendall(b" ")
                    time.sleep(0.5)
            except OSError:
                pass
        ended.append(time.monotonic() - begun)

    drips = [threading.Thread(target=drip) for _ in range(40)]
    for one in drips:
        one.start()
    for _ in range(20):
        assert raw.statuses(b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n") == [200]
        counts["health beside slow bodies: 200"] += 1
    with raw.open() as connection:
        connection.sendall(POST + HOST + JSON + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        try:
            while sent < 1 << 28:
                sent += connection.send(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        except OSError:
            pass
    assert sent < 1 << 27
    counts["endless body: cut off"] += 1
    for one in drips:
        one.join()
    assert max(ended) < 50
    counts["slow bodies: let go"] += len(ended)


def cancelled(raw: Raw, num: int, counts: Counter[str]) -> None:
    """Streams whose client goes away at once or after some bytes."""
    body = asked(stream=True, max_tokens=200, temperature=1)
    for number in range(num):
        with raw.open() as connection:
            connection.sendall(POST + HOST + JSON + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            if number % 2:
                connection.recv(64)
        counts["streams cancelled"] += 1


def open_files(live: Live) -> tuple[int, int]:
    return len(os.listdir(f"/proc/{live.popen.pid}/fd")), len(os.listdir(f"/proc/{live.child()}/fd"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attack")
    two_runs(folder)
    return folder / "runs"


def test_attacks_are_refused_and_leave_nothing_behind(root: Path, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    with serving(root, tmp_path / "log") as live:
        raw = Raw(live)
        before = open_files(live)
        refused(raw, smuggling(), "smuggling", counts)
        refused(raw, malformed(), "malformed", counts)
        refused(raw, from_elsewhere(), "from elsewhere", counts)
        cancelled(raw, 200, counts)
        slow_and_huge(raw, counts)
        wait_for(lambda: (live.health()["running"], live.health()["waiting"]) == (0, 0), timeout_s=120)
        wait_for(lambda: open_files(live)[0] <= before[0] + 2, timeout_s=60)
        statuses: Any = Counter(line["status"] for line in live.lines() if line["kind"] == "request")
        assert not [status for status in statuses if status >= 500]
        print("\n" + json.dumps({**counts, "statuses": statuses}, indent=2))


def test_two_thousand_requests_leave_memory_as_it_was(root: Path, tmp_path: Path) -> None:
    known = cases(root, RUNS, BASE, num_texts=20)
    with serving(root, tmp_path / "log") as live:
        print(soak(live, known, 2_000))
