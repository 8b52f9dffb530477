"""Limits, expiry and webhooks of projects."""

from __future__ import annotations

import asyncio
import base64
import http.server
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

openai = pytest.importorskip("openai", reason="the openai package is the client of these tests")

from jobs.places import FakeLauncher, FakeModels, dispatcher, put_file, put_job, rows  # noqa: E402
from jobs.postgres import opener  # noqa: E402
from jobs.served import serving  # noqa: E402
from tunesmith.errors import InputError  # noqa: E402
from tunesmith.jobs import webhooks as sending  # noqa: E402
from tunesmith.jobs.access import ProjectKeys  # noqa: E402
from tunesmith.jobs.bases import bases_of_file  # noqa: E402
from tunesmith.jobs.rules import ProjectRules, Rules, WebhookEndpoint  # noqa: E402
from tunesmith.jobs.store import Store  # noqa: E402
from tunesmith.jobs.tables import files, jobs, webhooks  # noqa: E402
from tunesmith.jobs.webhooks import WebhookSender, post  # noqa: E402
from tunesmith.serve.middleware import PROJECT  # noqa: E402
from tunesmith.serve.protocol import RequestError  # noqa: E402

Opened = Callable[..., Store]
opened = opener("sqlite", "postgresql")
SECRET = "whsec_" + base64.b64encode(b"a secret of 24 characters").decode()
DAY = 86_400


@contextmanager
def as_project(name: str) -> Iterator[None]:
    token = PROJECT.set(name)
    try:
        yield
    finally:
        PROJECT.reset(token)


def every(**rules: Any) -> Rules:
    return Rules(every_project=ProjectRules(**rules))


# What is read


RULES = """
bases: {small: {model: owner/model}}
every_project: {jobs_waiting: 5, keep_files_days: 30}
projects:
  red: {jobs_waiting: 50}
"""


def test_a_projects_rules_win_field_by_field(tmp_path: Path) -> None:
    path = tmp_path / "bases.yaml"
    path.write_text(RULES)
    rules = bases_of_file(path)
    assert (rules.of("red").jobs_waiting, rules.of("red").keep_files_days) == (50, 30)
    assert rules.of("blue").jobs_waiting == 5


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("jobs_waiting: 5,", "jobs_waiting: 0,", "jobs_waiting"),
        ("jobs_waiting: 5,", "job_waiting: 5,", "job_waiting"),
        ("red:", "Red:", "a project's name"),
        ("{jobs_waiting: 50}", "{webhook: {url: 'http://x.example/', secret_file: none}}", "https://"),
        ("{jobs_waiting: 50}", "{webhook: {url: 'https://x.example/', secret_file: none}}", "cannot be read"),
        ("{jobs_waiting: 50}", "{webhook: {url: 'ftp://x', secret_file: none}}", "url"),
    ],
)
def test_a_fault_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "bases.yaml"
    path.write_text(RULES.replace(old, new))
    with pytest.raises(InputError, match=r"bases\.yaml|project") as caught:
        bases_of_file(path)
    assert words in str(caught.value)


# Limits


def test_no_more_jobs_wait_than_a_project_may_have(store: Store) -> None:
    store.rules = every(jobs_waiting=2)
    for project in ("red", "blue"):  # each for itself
        with as_project(project):
            file = put_file(store, rows(12), f"file-{project}")
            names = [put_job(store, file) for _ in range(2)]
            with pytest.raises(RequestError, match="2 jobs of this project wait") as caught:
                put_job(store, file)
            error = caught.value
            assert (error.status, error.code, error.headers["Retry-After"]) == (429, "rate_limit_exceeded", "60")
            store.act(names[0], "cancel", "cancelled")
            put_job(store, file)


def test_projects_take_turns(store: Store) -> None:
    launcher = FakeLauncher()
    owner = {}
    for project, num in (("red", 3), ("blue", 2)):
        with as_project(project):
            file = put_file(store, rows(12), f"file-{project}")
            owner |= {put_job(store, file): project for _ in range(num)}
    working = dispatcher(store, launcher, FakeModels())
    for _ in range(60):
        working.round()
    assert [owner[one.path.name] for one in launcher.started] == ["red", "blue", "red", "blue", "red"]


def test_no_more_jobs_run_than_a_project_may_have(store: Store) -> None:
    launcher = FakeLauncher()
    store.rules = Rules(projects={"red": ProjectRules(jobs_running=1)})
    for project, num in (("red", 3), ("blue", 3)):
        with as_project(project):
            file = put_file(store, rows(12), f"file-{project}")
            for _ in range(num):
                put_job(store, file)
    working = dispatcher(store, launcher, FakeModels())
    working.parallel = 3
    most = dict.fromkeys(("red", "blue"), 0)
    for _ in range(60):
        working.round()
        for project in most:
            most[project] = max(most[project], sum(one.project == project for one in working.active.values()))
    assert most == {"red": 1, "blue": 2}
    assert len(launcher.started) == 6


def test_files_have_room_or_are_refused_whole(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.store.rules = every(file_bytes=3 * len(rows(10)))
        made = [served.client.files.create(file=("a", rows(10)), purpose="fine-tune") for _ in range(3)]
        for refused in (
            lambda: served.client.files.create(file=("a", rows(1)), purpose="fine-tune"),
            lambda: served.client.uploads.create(bytes=9, filename="a", mime_type="text/jsonl", purpose="fine-tune"),
        ):
            with pytest.raises(openai.RateLimitError) as caught:
                refused()
            assert caught.value.code == "insufficient_quota"
            assert caught.value.response.headers["x-should-retry"] == "false"
        assert {path.name for path in served.store.files_path.iterdir()} == {one.id for one in made}
        served.client.files.delete(made[0].id)
        served.client.files.create(file=("a", rows(10)), purpose="fine-tune")


def test_a_refused_upload_reads_its_answer_to_the_end(tmp_path: Path) -> None:
    """A server that closes with bytes unread resets the connection: a client that still sends may lose the answer."""
    size = 5_000_000
    head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n"
    head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    with serving(tmp_path) as served:
        served.store.rules = every(file_bytes=10)
        at = served.client.base_url
        with socket.create_connection((at.host, at.port)) as connection:
            connection.settimeout(10)
            for _ in range(2):  # the second on the same connection
                connection.sendall(head.encode())
                answer = connection.recv(65536)
                connection.sendall(b"x" * size)
                while b"insufficient_quota" not in answer:
                    answer += connection.recv(65536)
                assert answer.startswith(b"HTTP/1.1 429")


def test_requests_a_minute(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.rules = every(requests_per_minute=3)
    admission = ProjectKeys(store, None, may_be_open=True)
    for _ in range(3):
        asyncio.run(admission.admit("GET", "/v1/models", {}))
    with pytest.raises(RequestError, match="Most requests a minute: 3") as caught:
        asyncio.run(admission.admit("GET", "/v1/models", {}))
    assert caught.value.status == 429
    assert 1 <= int(caught.value.headers["Retry-After"]) <= 60
    store.close()


# Expiry


def test_a_file_lives_as_long_as_its_client_says(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        lifetime = {"anchor": "created_at", "seconds": 3600}
        made = served.client.files.create(file=("a", rows(2)), purpose="fine-tune", expires_after=lifetime)
        assert made.expires_at == pytest.approx(made.created_at + 3600, abs=2)
        upload = served.client.uploads.create(
            bytes=len(rows(2)), filename="a", mime_type="text/jsonl", purpose="fine-tune", expires_after=lifetime
        )
        part = served.client.uploads.parts.create(upload.id, data=rows(2))
        joined = served.client.uploads.complete(upload.id, part_ids=[part.id]).file
        assert joined.expires_at == pytest.approx(made.expires_at, abs=5)
        for seconds in (3599, 2_592_001, "000003600000000"):
            lifetime = {"anchor": "created_at", "seconds": seconds}
            with pytest.raises(openai.BadRequestError, match="expires_after"):
                served.client.files.create(file=("a", rows(2)), purpose="fine-tune", expires_after=lifetime)
        served.store.update(files, {"expires_at": int(time.time()) - 1}, id=made.id)
        with pytest.raises(openai.NotFoundError):
            served.client.files.retrieve(made.id)
        assert [one.id for one in served.client.files.list()] == [joined.id]
        assert served.store.expire() == [f"{made.id}: its time is over"]
        assert not served.store.content_path(made.id).exists()


def ended_job(store: Store, name: str) -> str:
    """A job that failed two days ago, with a run folder."""
    job = put_job(store, put_file(store, rows(12), name))
    store.change_job(job, if_status=["validating_files"], status="failed")
    store.update(jobs, {"finished_at": int(time.time()) - 2 * DAY}, id=job)
    (store.runs_path / job / "adapter").mkdir(parents=True)
    return job


def test_what_a_job_or_a_model_needs_is_kept(store: Store) -> None:
    store.rules = every(keep_files_days=1, keep_runs_days=1)
    job = put_job(store, put_file(store, rows(12), "file-open"))
    put_file(store, rows(12), "file-old")
    put_file(store, rows(12), "file-new")
    for name in ("file-open", "file-old"):
        store.update(files, {"created_at": int(time.time()) - 2 * DAY}, id=name)
    failed, kept = ended_job(store, "file-x"), ended_job(store, "file-y")
    for what in ("output", "lock"):
        (store.runs_path / f".{failed}.{what}").touch()
    store.change_job(kept, if_status=["failed"], status="running")
    model = {"name": "ft:a:tunesmith::b", "job": kept, "base": "tiny", "step": 1, "metrics": {}}
    result = {"id": "file-r", "purpose": "fine-tune-results", "filename": "r", "bytes": 1, "sha256": ""}
    assert store.succeed(kept, [], model=model, result=result, trained_tokens=1)
    store.update(jobs, {"finished_at": int(time.time()) - 2 * DAY}, id=kept)
    expected = {f"{name}: its time is over" for name in ("file-open", "file-old")}
    expected.add(f"{failed}: its run is removed, no model of it is left")
    assert set(store.expire()) == expected
    assert store.content_path("file-open").exists(), "a job needs it"
    assert not store.content_path("file-old").exists()
    assert store.content_path("file-new").exists()
    assert sorted(path.name for path in store.runs_path.iterdir()) == [kept]
    assert store.expire() == []
    store.act(job, "cancel", "cancelled")
    store.remove_unused()
    assert not store.content_path("file-open").exists()
    store.delete_model("ft:a:tunesmith::b")
    assert store.expire() == [f"{kept}: its run is removed, no model of it is left"]


def test_a_deletion_that_is_killed_is_finished_at_the_next_start(opened: Opened, tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.rules = every(keep_files_days=1, keep_runs_days=1)
    put_file(store, rows(12), "file-old")
    store.update(files, {"created_at": int(time.time()) - 2 * DAY}, id="file-old")
    failed = ended_job(store, "file-x")
    store.remove_unused = lambda **how: None  # it is killed before
    assert len(store.expire()) == 2
    assert store.content_path("file-old").exists()
    store.close()
    store = opened(tmp_path)
    dispatcher(store, FakeLauncher(), FakeModels()).recover()
    assert not store.content_path("file-old").exists()
    assert not (store.runs_path / failed).exists()
    store.close()


def test_a_sweep_leaves_an_upload_that_is_being_finished(opened: Opened, tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.content_path("file-fresh").write_bytes(b"x")  # renamed, and its row not yet written
    put_file(store, rows(1), "file-a")
    store.delete_file("file-a")
    assert store.content_path("file-fresh").exists()
    store.close()


# Webhooks


class Receiver(http.server.ThreadingHTTPServer):
    """Keeps what it gets; answers with `statuses`, then 200."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://localhost:{self.server_port}/hook?a=b"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((dict(self.headers), body))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    yield server
    server.shutdown()
    server.server_close()


def endpoint(tmp_path: Path, url: str, **more: Any) -> WebhookEndpoint:
    (tmp_path / "secret").write_text(SECRET + "\n")
    return WebhookEndpoint(url=url, secret_file=tmp_path / "secret", **more)


def due_now(store: Store) -> None:
    for row in store.page(webhooks, limit=100)[0]:
        store.update(webhooks, {"next_at": 0}, id=row["id"])


def test_a_webhook_is_what_the_client_unwraps(opened: Opened, tmp_path: Path, receiver: Receiver) -> None:
    store, said = opened(tmp_path / "store"), []
    store.rules = every(webhook=endpoint(tmp_path, receiver.url, private=True))
    file = put_file(store, rows(12))
    done, broken, dropped = (
        put_job(store, file),
        put_job(store, put_file(store, rows(3), "file-b")),
        put_job(store, file),
    )
    working = dispatcher(store, FakeLauncher(), FakeModels())
    store.act(dropped, "cancel", "cancelled")
    for _ in range(20):
        working.round()
    sender = WebhookSender(store, said.append)
    receiver.statuses = [500, 302]
    sender.round()  # 500: the rest of the project waits
    assert len(receiver.got) == 1
    due_now(store)
    store.close()
    store = opened(tmp_path / "store")  # what was not taken outlives the server
    store.rules = every(webhook=endpoint(tmp_path, receiver.url, private=True))
    sender = WebhookSender(store, said.append)
    sender.round()  # a redirect is not followed
    assert len(receiver.got) == 2
    due_now(store)
    sender.round()
    client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
    events = [client.webhooks.unwrap(body, headers) for headers, body in receiver.got]
    assert {(one.type.removeprefix("fine_tuning.job."), one.data.id) for one in events[2:]} == {
        ("cancelled", dropped), ("succeeded", done), ("failed", broken),
    }  # fmt: skip
    assert {one.id for one in events[:2]} <= {one.id for one in events[2:]}, "repeated under its id"
    headers, body = receiver.got[-1]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace(b"ftjob", b"other"), headers)
    assert said[0].endswith("was not taken (status 500): it is sent again")
    sender.round()
    assert len(receiver.got) == 5, "each once when it was taken"
    store.close()


def test_a_webhook_that_is_never_taken_is_given_up(tmp_path: Path) -> None:
    store, said = Store(tmp_path / "store"), []
    store.rules = every(webhook=endpoint(tmp_path, "https://hook.example/"))
    store.act(put_job(store, put_file(store, rows(12))), "cancel", "cancelled")
    delays = []

    def refuse(*what: object) -> int:
        raise httpx.ConnectError("no way")

    sender = WebhookSender(store, said.append, refuse)
    for _ in range(6):
        due_now(store)
        sender.round()
        delays.append(store.due_webhooks() == [])
    row = store.one(webhooks)
    assert row["attempts"] == 6
    assert row["next_at"] - time.time() == pytest.approx(3600, abs=5)
    assert all(delays)
    store.update(webhooks, {"created_at": int(time.time()) - 73 * 3600, "next_at": 0}, id=row["id"])
    sender.round()
    assert "given up after 72 h" in said[-1]
    due_now(store)
    assert store.due_webhooks() == []
    assert SECRET not in str(said) + str(store.page(webhooks))
    store.close()


def queue_webhooks(store: Store, project: str, num: int) -> None:
    for i in range(num):
        facts = {"project": project, "job": f"ftjob-{i}", "type": "fine_tuning.job.failed", "next_at": 0}
        store.insert(webhooks, {"id": f"evt_{project}{i}", **facts})


@pytest.mark.parametrize("num", [1, 150])
def test_an_endpoint_that_never_answers_holds_back_its_own_project_alone(tmp_path: Path, num: int) -> None:
    store, ends, sent = Store(tmp_path / "store"), threading.Event(), list[str]()
    hooks = {name: ProjectRules(webhook=endpoint(tmp_path, f"https://{name}.example/")) for name in ("red", "blue")}
    store.rules = Rules(projects=hooks)
    queue_webhooks(store, "red", num)
    queue_webhooks(store, "blue", 3)

    def send(hook: WebhookEndpoint, body: bytes, headers: Any) -> int:
        if "red" in hook.url:
            assert ends.wait(20)
            raise httpx.ReadTimeout("no answer")
        sent.append(json.loads(body)["data"]["id"])
        return 200

    sender = WebhookSender(store, lambda line: None, send)
    since = time.monotonic()
    sender.round(0.5)
    sender.round(0.5)
    assert sent == ["ftjob-0", "ftjob-1", "ftjob-2"]
    assert time.monotonic() - since < 5
    assert list(sender.sending) == ["red"], "one at a time"
    ends.set()
    for thread in sender.sending.values():
        thread.join()
    assert store.one(webhooks, id="evt_red0")["attempts"] == 1
    store.close()


def test_an_endpoint_that_answers_by_drops_has_a_time_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection = listener.accept()[0]
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                for i in range(100):
                    time.sleep(0.1)
                    connection.sendall(f"X-{i}: y\r\n".encode())

        threading.Thread(target=drip, daemon=True).start()
        since = time.monotonic()
        with pytest.raises(OSError, match=r"no answer within 0\.5 s"):
            post(endpoint(tmp_path, f"http://127.0.0.1:{listener.getsockname()[1]}/", private=True), b"{}", {})
        assert time.monotonic() - since < 3


INSIDE = "127.0.0.1 [::1] localhost 169.254.169.254 10.0.0.1 192.168.1.1 0.0.0.0 [::ffff:127.0.0.1]"
INSIDE += " [64:ff9b::a00:1] [64:ff9b:1::7f00:1] [2002:7f00:1::] [::7f00:1] [fec0::1] [::ffff:10.0.0.1] [ff02::1]"
INSIDE += " [64:ff9b::7f00:1] [2002:a00:1::1]"


# trap: S24
def test_a_check_of_the_outer_address_alone_lets_inner_ones_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "_is_public", lambda address: address.is_global)
    monkeypatch.setattr(sending, "TIMEOUT_S", 0.2)
    with pytest.raises(AssertionError):
        test_a_private_address_is_not_called(tmp_path, "[64:ff9b::7f00:1]")


def test_public_addresses_are_called_also_through_a_translator() -> None:
    for text in ("8.8.8.8", "2001:4860:4860::8888", "64:ff9b::808:808", "2002:808:808::1", "::ffff:8.8.8.8"):
        assert sending._is_public(ipaddress.ip_address(text)), text


@pytest.mark.parametrize("host", INSIDE.split())
def test_a_private_address_is_not_called(tmp_path: Path, host: str) -> None:
    with pytest.raises(OSError, match="is not a public address"):
        post(endpoint(tmp_path, f"https://{host}/"), b"{}", {})


def test_a_name_cannot_become_another_address_after_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    asked = []

    def resolve(host: str, *how: Any, **more: Any) -> list[Any]:
        asked.append(host)
        return [(2, 1, 6, "", ("127.0.0.1" if host in ("hook.example", "127.0.0.1") else "10.0.0.1", 0))]

    monkeypatch.setattr(sending.socket, "getaddrinfo", resolve)
    url = f"http://hook.example:{receiver.server_port}/"
    with pytest.raises(OSError, match="is not a public address"):
        post(endpoint(tmp_path, url.replace("http:", "https:")), b"{}", {})
    monkeypatch.undo()
    monkeypatch.setattr(sending, "_address", lambda host, hook: "127.0.0.1")
    assert post(endpoint(tmp_path, url, private=True), json.dumps({}).encode(), {}) == 200
    assert receiver.got[0][0]["Host"] == f"hook.example:{receiver.server_port}"
    assert asked == ["hook.example"]


@pytest.mark.parametrize("url", ["https://host:port/x", "https://\u2603.com/", "https://[::1/x"])
def test_an_address_that_no_request_can_have_is_refused_at_the_start(tmp_path: Path, url: str) -> None:
    (tmp_path / "secret").write_text(SECRET)
    with pytest.raises(ValueError, match="url: "):
        WebhookEndpoint(url=url, secret_file=tmp_path / "secret")
