"""Who may open pages, and whose page may act."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from evaluation.fake_runs import fake_run
from pages.sites import HTML, KEY, OWN, entered, site_in, stranger
from tunesmith.pages.api import make_api
from tunesmith.pages.routes import make_pages
from tunesmith.serve import sessions as access_module
from tunesmith.serve.middleware import ApiKeys
from tunesmith.serve.sessions import OPEN_PATHS

PATHS = ("/ui/", "/ui/runs/a-1", "/ui/data", "/ui/new", "/ui/chat", "/v1/runs", "/v1/models", "/v1/local_files")
ACTS = (
    ("POST", "/v1/runs", {"model": "m", "data": "d"}),
    ("POST", "/v1/runs/a-1/stop", {}),
    ("POST", "/v1/runs/a-1/resume", {}),
    ("PUT", "/v1/local_files/rows.jsonl", {}),
    ("POST", "/v1/deployments", {"run": "a-1"}),
    ("DELETE", "/v1/deployments", {}),
    ("POST", "/v1/chat/completions", {"model": "a", "messages": []}),
)


def test_nothing_is_given_without_a_session_or_a_key(tmp_path: Path) -> None:
    client = stranger(site_in(tmp_path))
    for path in PATHS:
        answer = client.get(path)
        assert answer.status_code == 401, path
        assert "tunesmith ui" in answer.text
        assert "a-1" not in answer.text.replace(path, "")
        assert client.get(path, headers={"Accept": "application/json"}).json()["error"]["code"] == "invalid_api_key"
    for method, path, body in ACTS:
        assert client.request(method, path, json=body, headers=OWN).status_code == 401, path
    # The sheet of styles is no secret, and the page that leads in needs it.
    assert client.get("/ui/static/other/pages.css").status_code == 404


def test_a_link_is_good_once(tmp_path: Path) -> None:
    site = site_in(tmp_path)
    link, client = site.access.new_link(), stranger(site)
    first = client.get(link)
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert client.get("/ui/").status_code == 200
    other = stranger(site)
    assert other.get(link).status_code == 401
    assert other.get("/ui/").status_code == 401
    assert other.get("/ui/open?code=").status_code == 401


def test_a_session_outlives_the_server_and_is_kept_as_a_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = entered(site_in(tmp_path))
    token = client.cookies["tunesmith-8000"]
    file = tmp_path / "runs" / ".ui" / "sessions.json"
    assert token not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    again = stranger(site_in(tmp_path))
    again.cookies.set("tunesmith-8000", token)
    assert again.get("/ui/").status_code == 200
    monkeypatch.setattr(access_module, "SESSION_S", 0)
    assert again.get("/ui/").status_code == 401


# trap: S11
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://127.0.0.1:8001"},  # the same site for a browser, which sends the cookie
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
    ids=str,
)
def test_only_a_page_of_the_server_acts_by_a_session(tmp_path: Path, headers: dict[str, str]) -> None:
    fake_run(tmp_path / "runs" / "a-1")
    client = entered(site_in(tmp_path))
    given = {name: value for name, value in {**HTML, **OWN, **headers}.items() if value}
    _assert_refused(client, given)
    assert not (tmp_path / "rows.jsonl").exists()
    assert not (tmp_path / "runs" / "a-1" / "stop").exists()


def _assert_refused(client: TestClient, headers: dict[str, str]) -> None:
    for method, path, body in ACTS:
        answer = client.request(method, path, content=json.dumps(body), headers=headers)
        assert answer.status_code == 403, (path, answer.text)


def test_a_gate_that_trusts_the_cookie_alone_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_run(tmp_path / "runs" / "a-1")
    monkeypatch.setattr(access_module, "_refuse_foreign", lambda headers: None)
    # The server refuses foreign origins already; a page of another port is let in by --allow-origin, or sends none.
    headers = {name: value for name, value in {**HTML, **OWN}.items() if name != "Origin"}
    with pytest.raises(AssertionError):
        _assert_refused(entered(site_in(tmp_path)), headers)


def test_a_page_of_the_server_and_a_program_with_a_key_act(tmp_path: Path) -> None:
    fake_run(tmp_path / "runs" / "a-1")
    site = site_in(tmp_path, keys=ApiKeys.of([KEY]))
    stopped = entered(site).post("/v1/runs/a-1/stop", json={}, headers=OWN)
    assert (stopped.status_code, stopped.json()["error"]["code"]) == (409, "conflict"), "it is not at work"
    program = stranger(site)
    bearer = {"Authorization": f"Bearer {KEY}", "Accept": "application/json"}
    assert program.get("/v1/runs", headers=bearer).json()["total"] == 1
    assert program.post("/v1/runs/a-1/stop", json={}, headers=bearer).status_code == 409


def test_no_route_is_left_open(tmp_path: Path) -> None:
    site = site_in(tmp_path, keys=ApiKeys.of([KEY]))
    outside, inside = stranger(site), entered(site)
    routes = [route for made in (make_api(site), make_pages(site)) for route in made.routes]
    checked = set()
    for route in routes:
        path = re.sub(r"\{[^}]*\}", "a-1", route.path)
        for method in route.methods - {"HEAD"}:
            if path in OPEN_PATHS or path.startswith("/ui/static/"):
                continue
            assert outside.request(method, path, json={}, headers=OWN).status_code == 401, (method, path)
            if method != "GET":
                foreign = OWN | {"Origin": "http://127.0.0.1:8001"}
                assert inside.request(method, path, json={}, headers=foreign).status_code == 403, (method, path)
                bare = inside.request(method, path, json={}, headers={"Content-Type": "application/json"})
                assert bare.status_code == 403, (method, path)
            checked.add((method, path))
    acts = {("POST", "/v1/keys"), ("POST", "/v1/runs/a-1/exports"), ("DELETE", "/v1/deployments")}
    assert acts <= checked
    assert len(checked) > 25


def test_a_page_of_another_port_starts_nothing_by_reading(tmp_path: Path) -> None:
    client = entered(site_in(tmp_path))
    elsewhere = {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}
    assert client.get("/v1/checks", params={"file": "rows.jsonl"}, headers=elsewhere).status_code == 403
    follows = {**elsewhere, "Sec-Fetch-Mode": "navigate"}
    for page in ("/ui/new", "/ui/compare?run=a-1&run=b-2"):
        assert client.get(page, headers=follows).status_code == 403
    assert client.get("/ui/", headers=follows).status_code == 200
    assert client.get("/ui/new", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_a_foreign_host_gets_nothing(tmp_path: Path) -> None:
    client = entered(site_in(tmp_path))
    assert client.get("/ui/", headers={"Host": "evil.example"}).status_code == 403


def test_a_key_opens_a_session_and_wrong_ones_are_slowed(tmp_path: Path) -> None:
    site = site_in(tmp_path, keys=ApiKeys.of([KEY]))
    client = stranger(site)
    assert 'type="password"' in client.get("/ui/").text
    opened = client.post("/ui/login", data={"key": KEY, "back": "//evil.example/"}, headers={"Origin": OWN["Origin"]})
    assert opened.status_code == 200
    assert "evil" not in opened.text
    assert client.get("/ui/").status_code == 200
    lost = stranger(site_in(tmp_path, keys=ApiKeys.of([f"{KEY}-another"])))
    lost.cookies = client.cookies
    assert lost.get("/ui/").status_code == 401, "a session ends with the key that opened it"
    other = stranger(site)
    tries = [other.post("/ui/login", data={"key": "k" * 30}).status_code for _ in range(6)]
    assert tries == [401] * 5 + [429]


def test_no_page_allows_code_or_styles_that_are_not_files_of_the_server(tmp_path: Path) -> None:
    fake_run(tmp_path / "runs" / "a-1")
    client = entered(site_in(tmp_path))
    for path in ("/ui/", "/ui/runs/a-1", "/ui/runs/a-1/result", "/ui/data", "/ui/new", "/ui/chat", "/ui/nothing"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "<style" not in answer.text
        assert ' style="' not in answer.text
        assert " onclick=" not in answer.text
        assert "http://" not in answer.text.replace("http://www.w3.org/", "").replace("http://127.0.0.1", "")
        for script in answer.text.split("<script")[1:]:
            assert script.partition(">")[2].startswith("</script>"), "no script of a page has text of its own"


def test_a_name_leads_nowhere_but_into_the_folder_of_runs(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "run.json").write_text("{}")
    (tmp_path / "secret.jsonl").write_text("{}")
    site = site_in(tmp_path / "inside")
    client = entered(site)
    for name in ("..%2Fsecret", "%2e%2e%2fsecret", ".ui", "..", "a%00b"):
        assert client.get(f"/v1/runs/{name}").status_code == 404, name
    for name in ("../secret.jsonl", str(tmp_path / "secret.jsonl"), "/etc/passwd"):
        assert client.get("/ui/data", params={"file": name}).status_code == 404, name
    for name in ("..%2Fx.jsonl", ".x.jsonl", "x.py"):
        assert client.put(f"/v1/local_files/{name}", content=b"{}", headers=OWN).status_code in (400, 404), name
    assert not (tmp_path / "x.jsonl").exists()


def test_sessions_end_with_their_file_and_servers_keep_others(tmp_path: Path) -> None:
    first, second = site_in(tmp_path), site_in(tmp_path, port=8001)
    clients = entered(first), entered(second)
    assert clients[0].get("/ui/").status_code == 200
    again = stranger(site_in(tmp_path))
    again.cookies.set("tunesmith-8000", clients[0].cookies["tunesmith-8000"])
    assert again.get("/ui/").status_code == 200, "the second server wrote the file, and did not forget the first one's"
    (tmp_path / "runs" / ".ui" / "sessions.json").unlink()
    assert [client.get("/ui/").status_code for client in clients] == [401, 401]


def test_an_upload_without_its_length_takes_no_more_than_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = entered(site_in(tmp_path))
    monkeypatch.setattr("tunesmith.pages.local_files.MOST_UPLOADED", 10)
    answer = client.put("/v1/local_files/rows.jsonl", content=iter([b"x" * 8] * 3), headers={**OWN, "X-Tunesmith": "1"})
    assert answer.status_code == 507
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []
    assert client.put("/v1/local_files/rows.jsonl", content=b"{}", headers=OWN).json()["name"] == "rows.jsonl"
    assert client.put("/v1/local_files/rows.jsonl", content=b"[]", headers=OWN).json()["name"] == "rows-2.jsonl"
    assert (tmp_path / "rows.jsonl").read_bytes() == b"{}"
