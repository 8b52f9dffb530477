"""Requests in bytes that no client sends: each is refused, and nothing after it on the connection is a request."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from serve.running import Running
from tunesmith.serve import http, request_schemas

BODY = json.dumps({"model": "support", "messages": [{"role": "user", "content": "hello"}]}).encode()
JSON = b"Content-Type: application/json\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n"
HOST = b"Host: localhost\r\n"
NEXT = b"GET /v1/models/SMUGGLED HTTP/1.1\r\nHost: localhost\r\n\r\n"
REFUSED = (400, 403, 404, 405, 408, 411, 413, 415, 431, 501, 505)


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


@pytest.mark.parametrize("request_", [*smuggling(), *malformed()], ids=lambda request: repr(request)[:60])
def test_an_improper_request_is_refused(server: Running, monkeypatch: pytest.MonkeyPatch, request_: bytes) -> None:
    monkeypatch.setattr(http, "HEADERS_TIMEOUT_S", 0.3)
    monkeypatch.setattr(request_schemas, "BODY_TIMEOUT_S", 0.3)
    parts = server.raw(request_, timeout_s=5).split(b"HTTP/1.1 ")[1:]
    assert [int(part[:3]) for part in parts] in ([], *([status] for status in REFUSED))
    assert server.engine.asks == []
