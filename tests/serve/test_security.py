"""Who is let in, and what no request can do. Each check is also run on a server in which its bug has been planted."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.requests import Request

from serve.running import Running, running, wait_for
from tunesmith.errors import InputError
from tunesmith.serve import app, http, middleware, request_schemas
from tunesmith.serve.middleware import AccessMiddleware, AccessPolicy, ApiKeys, read_keys
from tunesmith.serve.protocol import RequestError

KEY = "k-0123456789abcdef-0123456789abcdef"
CHAT = {"model": "support", "messages": [{"role": "user", "content": "hello there"}]}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that asks for a key."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# of the team\n{KEY}\n{KEY[::-1]}\n")
    found = read_keys(file, {})
    with running(AccessPolicy(keys=ApiKeys.of(found), hosts=frozenset({"localhost", "box.example"}))) as it:
        yield it


# trap: S1


def nobody_enters_without_a_key(server: Running) -> None:
    described = server.ask("GET", "/openapi.json", headers={"Authorization": f"Bearer {KEY}"})[1]
    paths = [
        *described["paths"],
        "/openapi.json",
        "/docs",
        "/",
        "//v1/models",
        "/v1%2fmodels",
        "/V1/models",
        "/x/../v1",
    ]
    wrong = [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"X-Api-Key": KEY},
        {
            "Upgrade": "websocket",
            "Connection": "Upgrade, close",
            "Sec-WebSocket-Key": "x",
            "Sec-WebSocket-Version": "13",
        },
    ]
    for path in paths:
        for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "PATCH"):
            assert server.ask(method, path)[0] == 401 or (method, path) == ("GET", "/"), (method, path)
        for headers in wrong:
            assert server.ask("GET", path, headers=headers)[0] == 401 or path == "/", (path, headers)
        for host in ("x/?", "127.0.0.1:1/v1/models?", "a b", "", "[::1", "127.0.0.1#", "localhost@evil"):
            assert server.ask("GET", path, headers={"Host": host})[0] in (400, 401, 403), (path, host)
    assert server.ask("GET", f"/v1/models?key={KEY}")[0] == 401


def test_nobody_enters_without_a_key(locked: Running) -> None:
    nobody_enters_without_a_key(locked)
    assert locked.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})[0] == 200
    assert locked.ask("GET", "/v1/models", headers={"Authorization": f"bearer {KEY[::-1]}"})[0] == 200
    assert locked.client(api_key=KEY).chat.completions.create(**CHAT).choices[0].message.content == "hello there"  # type: ignore[call-overload]


def test_a_key_that_is_asked_for_by_path_lets_others_in(locked: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a URL that is put together from the Host, which the sender writes."""
    right = AccessMiddleware._answer

    def by_path(self: AccessMiddleware, scope: dict[str, object]) -> object:
        if not Request(scope).url.path.startswith("/v1"):
            return right(replace_rules(self), scope)  # type: ignore[arg-type]
        return right(self, scope)  # type: ignore[arg-type]

    def replace_rules(old: AccessMiddleware) -> AccessMiddleware:
        return AccessMiddleware(old.app, replace(old.policy, keys=None), ())

    monkeypatch.setattr(AccessMiddleware, "_answer", by_path)
    with pytest.raises(AssertionError):
        nobody_enters_without_a_key(locked)


# trap: S2


def no_name_leads_here_that_somebody_else_gives(server: Running) -> None:
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost:8000:1",
        "box.example.x",
    ):
        assert server.ask("GET", "/v1/models", headers={"Host": host})[0] in (400, 403), host
    request = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert server.raw(request.encode()).split()[1] in (b"400", b"403")
    for host in ("localhost", "LOCALHOST:9", "localhost.", "127.0.0.1", "[::1]:8000", "192.168.1.5"):
        assert server.ask("GET", "/v1/models", headers={"Host": host})[0] == 200, host


def test_no_name_leads_here_that_somebody_else_gives(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    no_name_leads_here_that_somebody_else_gives(server)
    monkeypatch.setattr(
        AccessMiddleware, "_is_allowed_host", lambda self, host: host.startswith((b"localhost", b"127.0.0.1"))
    )
    with pytest.raises(AssertionError):
        no_name_leads_here_that_somebody_else_gives(server)


# trap: S3


def web_pages_stay_outside(server: Running) -> None:
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost",
        "https://chat.example.evil",
        "https://chat.example",
    ):
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("OPTIONS", "/v1/models")):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            status, _, head = server.ask(method, path, CHAT if method == "POST" else None, headers=asked)
            assert status == 403, (origin, method)
            assert "access-control-allow-origin" not in head.lower()
    # What a form or a script may send to anybody without being asked is no JSON.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert server.ask("POST", "/v1/chat/completions", CHAT, headers={"Content-Type": kind})[0] == 415
    assert server.engine.asks == []
    wait_for(lambda: [(one.method, one.status) for one in server.answered].count(("OPTIONS", 403)) == 5)


def test_web_pages_stay_outside(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    web_pages_stay_outside(server)
    monkeypatch.setattr(AccessMiddleware, "_wrong_source", lambda self, scope: None)
    with pytest.raises(AssertionError):
        web_pages_stay_outside(server)
    monkeypatch.undo()
    monkeypatch.setattr(request_schemas, "check_headers", lambda request: None)
    with pytest.raises(AssertionError):
        web_pages_stay_outside(server)


def test_a_page_that_is_allowed_may_ask() -> None:
    page = "https://chat.example"
    with running(AccessPolicy(origins=frozenset({page}), keys=ApiKeys((b"no key has this hash",)))) as server:
        asked = {"Origin": page, "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization,content-type"
        status, _, head = server.ask("OPTIONS", "/v1/chat/completions", headers=asked)
        assert status == 200
        assert f"access-control-allow-origin: {page}" in head
        assert "authorization" in head
        assert "access-control-allow-private-network: true" in head
        status, _, head = server.ask("POST", "/v1/chat/completions", CHAT, headers={"Origin": page})
        assert (status, f"access-control-allow-origin: {page}" in head) == (401, True)
        assert server.ask("OPTIONS", "/v1/models", headers={"Origin": page})[0] == 401


# trap: S10


def no_request_is_smuggled(server: Running) -> None:
    """What a proxy that believes the other length sends next would be a request of its own."""
    body = b"0\r\n\r\n"
    smuggled = b"GET /v1/models/SMUGGLED HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for chunked in (b"chunked", b"Chunked"):
        both = b"Content-Length: %d\r\nTransfer-Encoding: %s\r\n\r\n" % (len(body + smuggled), chunked)
        answer = server.raw(head + both + body + smuggled, timeout_s=2)
        assert answer.split()[1] == b"400"
        assert answer.count(b"HTTP/1.1") == 1, "the second was answered"
        assert b"connection: close" in answer.lower()


def test_no_request_is_smuggled(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    no_request_is_smuggled(server)
    right = middleware._headers
    blind = lambda scope, name: [] if name == b"content-length" else right(scope, name)  # noqa: E731
    monkeypatch.setattr(middleware, "_headers", blind)
    with pytest.raises(AssertionError):
        no_request_is_smuggled(server)


# trap: S4

NAMES = (
    "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%252e%252e/x", "..\\..\\x", "/etc/passwd", "~", ".",
    "support/../mood", "http://169.254.169.254/latest", "file:///etc/passwd", "//host/share", "-h", "sup\u200bport",
    "support\u2024", "x" * 4096,
)  # fmt: skip


def names_are_only_compared(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[object] = []
    with monkeypatch.context() as watched:
        for name in ("exists", "is_file", "stat", "open", "read_text"):
            right = getattr(Path, name)
            watched.setattr(Path, name, lambda self, *a, _r=right, **k: (touched.append(self), _r(self, *a, **k))[1])
        look_up = socket.getaddrinfo
        ours = (server.bound.host, server.bound.port)
        watched.setattr(
            socket, "getaddrinfo", lambda *a, **k: (touched.append(a) if a[:2] != ours else None, look_up(*a, **k))[1]
        )
        for name in NAMES:
            body = {**CHAT, "model": name}
            status, answer = server.ask("POST", "/v1/chat/completions", body)[:2]
            assert (status, answer["error"]["code"]) == (404, "model_not_found"), name
            if " " not in name and name.isascii():
                assert server.ask("GET", f"/v1/models/{name}")[0] in (400, 404), name
    assert touched == []


def test_names_are_only_compared(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    names_are_only_compared(server, monkeypatch)
    right = app.find_model
    monkeypatch.setattr(
        app, "find_model", lambda engine, name, answers=None: (Path(name).exists(), right(engine, name))[1]
    )
    with pytest.raises(AssertionError):
        names_are_only_compared(server, monkeypatch)


# trap: S5


def bombs_are_refused(server: Running) -> None:
    for depth in (70, 2_000, 100_000):
        deep = b'{"a":' * depth + b"1" + b"}" * depth
        status, answer, _ = server.ask("POST", "/v1/chat/completions", deep)
        assert (status, answer["error"]["code"]) == (400, "invalid_json"), depth
        assert "deeper than 64" in answer["error"]["message"], depth
    large = json.dumps({**CHAT, "user": "x" * (1 << 20)}).encode()
    status, answer, _ = server.ask("POST", "/v1/chat/completions", large)
    assert status == 413
    assert answer["error"]["code"] == "request_too_large"
    assert server.engine.asks == []


def test_bombs_are_refused(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    bombs_are_refused(server)
    for name, value in (("MAX_DEPTH", 100), ("MAX_BODY_BYTES", 1 << 24)):
        with monkeypatch.context() as planted:
            planted.setattr(request_schemas, name, value)
            with pytest.raises(AssertionError):
                bombs_are_refused(server)


def test_a_body_without_end_is_cut_off(server: Running) -> None:
    """In chunks, so that nothing says beforehand how long it will be."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with socket.create_connection((server.bound.host, server.bound.port), timeout=10) as connection:
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with suppress(OSError):  # reset or broken pipe, as the system has it
            while sent < 1 << 30:
                connection.sendall(piece)
                sent += 0x10000
    assert sent < 4 * request_schemas.DRAINED_BYTES, "what the system's buffers hold comes on top"


# trap: S6


def nothing_is_held_by_doing_nothing(server: Running, limit_s: float = 3) -> None:
    """Connections that say nothing, a header byte by byte, a body that stops: each is let go."""
    place = (server.bound.host, server.bound.port)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for begun in (b"", b"GET /v1/mo", head, head + b"Content-Length: 100\r\n\r\n{"):
        with socket.create_connection(place, timeout=limit_s) as connection:
            connection.sendall(begun)
            received = b""
            try:
                while piece := connection.recv(4096):
                    received += piece
            except TimeoutError:
                pytest.fail(f"held with {begun!r}")
            assert received.split()[1] == b"408", begun
    # The second request of a connection, too.
    with socket.create_connection(place, timeout=limit_s) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\nGET /v1/models HT")
        try:
            while connection.recv(4096):
                pass
        except TimeoutError:
            pytest.fail("held by a second request")


def test_nothing_is_held_by_doing_nothing(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEADERS_TIMEOUT_S", 0.3)
    monkeypatch.setattr(request_schemas, "BODY_TIMEOUT_S", 0.3)
    nothing_is_held_by_doing_nothing(server)
    monkeypatch.setattr(http.BoundedConnection, "_await_headers", lambda self: None)
    with pytest.raises(pytest.fail.Exception):
        nothing_is_held_by_doing_nothing(server, limit_s=0.6)


def test_headers_have_a_size(server: Running) -> None:
    answer = server.raw(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000)
    assert answer.split()[1] == b"400"
    for size, status in ((32_000, 200), (33_000, 431)):  # whole, in one read
        assert server.ask("GET", "/v1/models", headers={"X": "x" * size})[0] == status
        assert server.ask("GET", f"/v1/models?{'x' * size}")[0] == status


def test_connections_are_counted(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 3)
    place = (server.bound.host, server.bound.port)
    held = [socket.create_connection(place, timeout=3) for _ in range(3)]
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
    for connection in held:
        connection.sendall(head + b"Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(25).startswith(b"HTTP/1.1 100 ")  # a request under way
    assert server.raw(b"GET / HTTP/1.1\r\n").split()[1] == b"503"
    for connection in held:
        connection.close()
    wait_for(lambda: server.ask("GET", "/v1/models")[0] == 200)


# trap: S25
def test_who_opens_connections_and_asks_nothing_keeps_nobody_out(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 20)
    with monkeypatch.context() as patch:
        patch.setattr(http.BoundedConnection, "_end_an_idle_one", lambda it: False)
        with pytest.raises(AssertionError):
            idle_connections_keep_nobody_out(server)
    idle_connections_keep_nobody_out(server)


def idle_connections_keep_nobody_out(server: Running) -> None:
    place = (server.bound.host, server.bound.port)
    with ExitStack() as opened:
        held = [opened.enter_context(socket.create_connection(place, timeout=3)) for _ in range(50)]
        with suppress(OSError):
            held[45].sendall(b"GET /health HTTP/1.1\r\n")
        since = time.monotonic()
        assert [server.ask("GET", "/health")[0] for _ in range(30)] == [200] * 30
        assert time.monotonic() - since < 3, "not when their time is over, which is 15 s"
        assert b" 408 " in held[0].recv(100)


def test_a_client_that_stops_reading_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "WRITE_TIMEOUT_S", 0.3)
    long = {**CHAT, "messages": [{"role": "user", "content": "word " * 60_000}], "stream": True}
    body = json.dumps(long).encode()
    with running() as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((server.bound.host, server.bound.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        wait_for(lambda: server.engine.open == 1)
        server.wait_until_idle()
        assert [one.status for one in server.answered] == [middleware.CLIENT_GONE]


# trap: S7


def a_key_is_nowhere_but_in_the_hand(server: Running) -> None:
    seen = []
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Bearer {KEY}x"}):
        seen += [server.ask("POST", "/v1/chat/completions", body, headers=headers) for body in (CHAT, {**CHAT, "n": 0})]
    server.wait_until_idle()
    assert KEY not in repr(seen)
    assert KEY not in repr(server.answered)
    assert KEY not in repr(server.policy)


async def quoting(app_: AccessMiddleware, scope: dict[str, object]) -> RequestError | None:
    """The planted bug: what was given is quoted to help its sender find what is wrong with it."""
    given = dict(scope["headers"]).get(b"authorization", b"").decode()  # type: ignore[call-overload]
    return (
        None
        if given == f"Bearer {KEY}"
        else RequestError(f"{given!r} is not let in", status=401, code="invalid_api_key")
    )


def test_a_key_is_nowhere_but_in_the_hand(locked: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    a_key_is_nowhere_but_in_the_hand(locked)
    with monkeypatch.context() as patched:
        patched.setattr(AccessMiddleware, "_wrong_key", quoting)
        with pytest.raises(AssertionError):
            a_key_is_nowhere_but_in_the_hand(locked)
    # The planted bug: keys are kept as they were read.
    kept = ApiKeys((KEY.encode(),))
    locked.gate.policy, locked.policy, before = (
        replace(locked.policy, keys=kept),
        replace(locked.policy, keys=kept),
        locked.policy,
    )
    with pytest.raises(AssertionError):
        a_key_is_nowhere_but_in_the_hand(locked)
    locked.gate.policy = locked.policy = before
    a_key_is_nowhere_but_in_the_hand(locked)


def all_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, by hash, with the function that takes the same time for every difference."""
    compared = []
    right = middleware.hmac.compare_digest
    known = ApiKeys(tuple(hashlib.sha256(word).digest() for word in (b"first", b"second", b"third")))
    with monkeypatch.context() as watched:
        watched.setattr(middleware.hmac, "compare_digest", lambda a, b: (compared.append((a, b)), right(a, b))[1])
        assert not known.accepts(b"Bearer x")
        assert known.accepts(b"Bearer first")
    assert len(compared) == 6, "which of them fits must not show"
    assert {len(given) for given, _ in compared} == {32}


def by_equality(known: ApiKeys, authorization: bytes | None) -> bool:
    """The planted bug: the first difference ends the comparison."""
    return hashlib.sha256((authorization or b"").partition(b" ")[2]).digest() in known.digests


def to_the_first(known: ApiKeys, authorization: bytes | None) -> bool:
    """The planted bug: the first key that fits ends it."""
    digest = hashlib.sha256((authorization or b"").partition(b" ")[2]).digest()
    return any(middleware.hmac.compare_digest(digest, one) for one in known.digests)


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    all_are_compared_in_constant_time(monkeypatch)
    for planted in (by_equality, to_the_first):
        monkeypatch.setattr(ApiKeys, "accepts", planted)
        with pytest.raises(AssertionError):
            all_are_compared_in_constant_time(monkeypatch)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "holds no key"), ("# nothing\n", "holds no key"), ("short", "20 printable"), (KEY + " x", "blanks"),
     (KEY + "\n" + "ä" * 30, "key 2")],
)  # fmt: skip
def test_what_is_no_key_is_refused_without_being_shown(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(InputError, match=said) as refused:
        read_keys(tmp_path / "keys", {})
    assert KEY not in str(refused.value)
    assert "short" not in str(refused.value)


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    assert read_keys(None, {}) == []
    found = ApiKeys.of(read_keys(None, {middleware.KEY_VARIABLE: KEY}))
    assert found.accepts(f"Bearer {KEY}".encode())
    with pytest.raises(InputError, match="no key can be read"):
        read_keys(tmp_path / "none", {middleware.KEY_VARIABLE: KEY})
