"""Projects over HTTP: what is another's is not there, whatever is asked of it; keys, scopes and permissions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the openai package is the client of these tests")

from jobs.places import BASES, put_file, put_job, rows  # noqa: E402
from serve import running as servers  # noqa: E402
from serve.fake import FakeEngine  # noqa: E402
from tunesmith.errors import InputError  # noqa: E402
from tunesmith.jobs import server  # noqa: E402
from tunesmith.jobs.access import ProjectKeys, create_key, revoke_key, scope_of  # noqa: E402
from tunesmith.jobs.engines import Engines  # noqa: E402
from tunesmith.jobs.store import Store, event  # noqa: E402
from tunesmith.jobs.tables import events, keys  # noqa: E402
from tunesmith.serve.app import make_app  # noqa: E402
from tunesmith.serve.middleware import PROJECT, AccessPolicy  # noqa: E402
from tunesmith.serve.protocol import ModelCard  # noqa: E402

BASE = ModelCard("owner/base", "chat", "text", 512, is_base=True, created=1_600_000_000)


@dataclass
class Place:
    """A server with two projects, each with a file, a job and a model of its own."""

    running: servers.Running
    store: Store
    ids: dict[str, dict[str, str]]
    keys: dict[str, str]

    def ask(self, method: str, path: str, body: Any = None, *, key: str, **headers: str) -> tuple[int, Any, str]:
        given = {"Authorization": f"Bearer {key}", **headers} if key else headers
        return self.running.ask(method, path, body, headers=given)

    def client(self, project: str) -> openai.OpenAI:
        return self.running.client(api_key=self.keys[project])


def belongings(store: Store, project: str) -> dict[str, str]:
    token = PROJECT.set(project)
    try:
        file = put_file(store, rows(12), f"file-{project}")
        job = put_job(store, file)
        store.change_job(job, [event(job, "started")], if_status=["validating_files"], status="running")
        tuned = store.job(job)["tuned_name"]
        result = {
            "id": f"file-result-{project}", "purpose": "fine-tune-results", "filename": "r", "bytes": 1, "sha256": "",
        }  # fmt: skip
    finally:
        PROJECT.reset(token)
    store.content_path(result["id"]).write_bytes(b"x")  # what follows the dispatcher does, outside of any request
    model = {"name": tuned, "job": job, "base": "tiny", "step": 1, "metrics": {}}
    assert store.succeed(job, [], model=model, result=result, trained_tokens=1)
    last = store.page(events, limit=1)[0][0]["id"]
    return {"file": file, "job": job, "model": tuned, "event": last}


@pytest.fixture(scope="module")
def place(opened: Callable[..., Store], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    store = opened(tmp_path_factory.mktemp("projects"))
    ids = {project: belongings(store, project) for project in ("red", "blue")}
    made = {project: create_key(store, project=project)[1] for project in ids}
    cards = [ModelCard(one["model"], "chat", "text", 512, is_base=False, created=1) for one in ids.values()]
    engine = FakeEngine((BASE, *cards))
    engines = Engines({"tiny": engine}, BASES)

    async def detach(name: str) -> None:
        raise AssertionError("a model of another project was taken off")

    engines.detach = detach
    routers = server.make_routers(store, BASES, engines)
    patch = pytest.MonkeyPatch()
    patch.setattr(servers, "make_app", lambda own, policy, listeners: make_app(engines, policy, listeners, routers))
    policy = AccessPolicy(admission=ProjectKeys(store, None, may_be_open=True).admit)
    with servers.running(policy, engine) as running:
        yield Place(running, store, ids, made)
    patch.undo()
    store.close()


def test_each_project_sees_its_own(place: Place) -> None:
    for project, own in place.ids.items():
        client = place.client(project)
        assert {one.id for one in client.files.list()} == {own["file"], f"file-result-{project}"}
        assert [one.id for one in client.fine_tuning.jobs.list()] == [own["job"]]
        job = client.fine_tuning.jobs.retrieve(own["job"])
        assert (job.organization_id, job.fine_tuned_model) == (f"org-{project}", own["model"])
        assert f":{project}:" in own["model"]
        tuned = [one.id for one in client.models.list() if one.id.startswith("ft:")]
        assert tuned == [own["model"]]
        assert [
            one.fine_tuned_model_checkpoint for one in client.fine_tuning.jobs.checkpoints.list(own["job"])
        ] == tuned
        messages = [{"role": "user", "content": "one two"}]
        assert client.chat.completions.create(model=own["model"], messages=messages).choices[0].message.content


def every_route(place: Place) -> Iterator[tuple[str, str]]:
    """Every method and path of a server of jobs that names something, with what stands for the names."""
    key = place.keys["red"]
    for path, methods in place.ask("GET", "/openapi.json", key=key)[1]["paths"].items():
        for method in methods:
            if "{" in path:
                yield method.upper(), path


def test_whatever_is_anothers_is_not_there(place: Place) -> None:
    blue, key = place.ids["blue"], place.keys["red"]
    bodies = {"permissions": {"project_ids": ["red"]}, "complete": {"part_ids": ["part_x"]}}
    seen = 0
    for method, path in every_route(place):
        kind = "model" if "models" in path or "checkpoints/{" in path else "file" if "files" in path else "job"
        name = path.partition("{")[2].partition("}")[0]
        filled = path.replace(f"{{{name}}}", "%s").replace("{action}", "cancel").replace("{name}", "cp_x")
        assert "{" not in filled, f"{path}: say here what stands for its name"
        body = bodies.get(path.rsplit("/", 1)[-1]) if method == "POST" else None
        status, answer, _ = place.ask(method, filled % blue[kind], body, key=key)
        other = blue[kind][:-3] + "xyz"
        unknown = place.ask(method, filled % other, body, key=key)
        assert status == 404, f"{method} {path}: {answer}"
        assert (status, str(answer).replace(blue[kind], other)) == (unknown[0], str(unknown[1])), f"{method} {path}"
        seen += 1
    assert seen >= 12
    assert place.store.job(blue["job"])["status"] == "succeeded"
    assert place.client("blue").files.content(blue["file"]).read() == rows(12)


@pytest.mark.parametrize("field", ["training_file", "validation_file", "model"])
def test_no_job_is_made_of_anothers_file_or_model(place: Place, field: str) -> None:
    body = {"model": "tiny", "training_file": place.ids["red"]["file"]}
    body[field] = place.ids["blue"]["model" if field == "model" else "file"]
    status, answer, _ = place.ask("POST", "/v1/fine_tuning/jobs", body, key=place.keys["red"])
    assert (status, answer["error"]["param"]) == (400, field)


def test_no_page_begins_after_anothers_row(place: Place) -> None:
    red, blue, key = place.ids["red"], place.ids["blue"], place.keys["red"]
    for path in (
        f"/v1/files?after={blue['file']}",
        f"/v1/fine_tuning/jobs?after={blue['job']}",
        f"/v1/fine_tuning/jobs/{red['job']}/events?after={blue['event']}",
    ):
        status, answer, _ = place.ask("GET", path, key=key)
        assert (status, answer["error"]["param"]) == (400, "after"), path


def test_no_answer_is_written_by_anothers_model(place: Place) -> None:
    client = place.client("red")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=place.ids["blue"]["model"], messages=[{"role": "user", "content": "a"}])
    named = str(caught.value).partition("Served here")[2]
    assert place.ids["blue"]["model"] not in named
    assert place.ids["blue"]["model"] not in str(place.ask("GET", "/health", key=place.keys["red"])[1])


def test_a_sweep_in_a_request_keeps_the_files_of_all(place: Place) -> None:
    made = place.client("red").files.create(file=("a", rows(2)), purpose="fine-tune")
    place.client("red").files.delete(made.id)
    assert not place.store.content_path(made.id).exists()
    assert place.client("blue").files.content(place.ids["blue"]["file"]).read() == rows(12)


def test_a_permission_lets_another_project_ask_and_nothing_else(place: Place) -> None:
    model = place.ids["blue"]["model"]
    permissions = place.client("blue").fine_tuning.checkpoints.permissions
    [made] = permissions.create(model, project_ids=["red"])
    [again] = permissions.create(model, project_ids=["red"])
    assert (made.id, made.project_id, made.object) == (again.id, "red", "checkpoint.permission")
    red = place.client("red")
    messages = [{"role": "user", "content": "one two"}]
    assert red.chat.completions.create(model=model, messages=messages).choices[0].message.content
    assert model in [one.id for one in red.models.list()]
    with pytest.raises(openai.NotFoundError):
        red.models.delete(model)
    with pytest.raises(openai.NotFoundError):
        red.fine_tuning.checkpoints.permissions.create(model, project_ids=["green"])
    listed = place.ask("GET", f"/v1/fine_tuning/checkpoints/{model}/permissions?project_id=red", key=place.keys["blue"])
    assert [one["id"] for one in listed[1]["data"]] == [made.id]
    assert permissions.delete(made.id, fine_tuned_model_checkpoint=model).deleted
    with pytest.raises(openai.NotFoundError):
        red.chat.completions.create(model=model, messages=messages)


NEEDED = [
    ("GET", "/v1/files", "files.read"),
    ("POST", "/v1/files", "files.write"),
    ("DELETE", "/v1/files/file-x", "files.write"),
    ("POST", "/v1/uploads", "files.write"),
    ("GET", "/v1/fine_tuning/jobs", "jobs.read"),
    ("GET", "/v1/fine_tuning/jobs/ftjob-x/events", "jobs.read"),
    ("POST", "/v1/fine_tuning/jobs", "jobs.write"),
    ("POST", "/v1/fine_tuning/jobs/ftjob-x/cancel", "jobs.write"),
    ("DELETE", "/v1/models/ft:x", "models.delete"),
    ("POST", "/v1/chat/completions", "models.ask"),
    ("POST", "/v1/completions", "models.ask"),
    ("GET", "/v1/fine_tuning/checkpoints/ft:x/permissions", "admin"),
    ("GET", "/metrics", "admin"),
]


@pytest.mark.parametrize(("method", "path", "scope"), NEEDED)
def test_each_route_needs_its_scope(place: Place, method: str, path: str, scope: str) -> None:
    assert scope_of(method, path) == scope
    others = [one for one in ("models.ask", "files.read", "files.write", "jobs.read", "jobs.write") if one != scope]
    without = create_key(place.store, project="red", scopes=others)[1]
    status, answer, _ = place.ask(method, path, {} if method == "POST" else None, key=without)
    assert (status, answer["error"]["code"]) == (403, "missing_scope")
    assert scope in answer["error"]["message"]
    for key in ([] if scope == "admin" else [create_key(place.store, project="red", scopes=[scope])[1]]) + [
        place.keys["red"]
    ]:
        assert place.ask(method, path, {} if method == "POST" else None, key=key)[0] not in (401, 403)


def test_every_route_is_closed_without_a_key(place: Place) -> None:
    good = place.keys["red"]
    for path, methods in place.ask("GET", "/openapi.json", key=good)[1]["paths"].items():
        for method in methods:
            for key in ("", "ts-aaaaaaaa-bbbb", good[:-1], good + "x", "ts-" + good, "' OR 1=1 --"):
                status, answer, _ = place.ask(method.upper(), path.replace("{", "").replace("}", ""), key=key)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key"), (method, path, key)


def test_a_project_that_is_not_the_keys_is_refused(place: Place) -> None:
    assert place.ask("GET", "/v1/models", key=place.keys["red"], **{"OpenAI-Project": "red"})[0] == 200
    status, answer, _ = place.ask("GET", "/v1/models", key=place.keys["red"], **{"OpenAI-Project": "blue"})
    assert (status, answer["error"]["code"]) == (401, "mismatched_project")


def test_a_key_ends(place: Place) -> None:
    row, key = create_key(place.store, project="red", days=1)
    assert place.ask("GET", "/v1/models", key=key)[0] == 200
    assert place.store.one(keys, id=row["id"])["used_at"] >= int(time.time()) - 5
    place.store.update(keys, {"expires_at": int(time.time()) - 1}, id=row["id"])
    status, answer, _ = place.ask("GET", "/v1/models", key=key)
    assert (status, answer["error"]["message"]) == (401, "This API key is expired.")
    row, key = create_key(place.store, project="red")
    revoke_key(place.store, row["id"])
    assert place.ask("GET", "/v1/models", key=key)[0] == 401
    with pytest.raises(InputError, match="there is no such key"):
        revoke_key(place.store, "key-none")


def test_a_key_is_kept_nowhere(opened: Callable[..., Store], tmp_path: Path) -> None:
    store = opened(tmp_path)
    _, key = create_key(store, project="a")
    assert key not in str(store.page(keys)[0])
    store.close()
    assert not any(key.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for project in ("A", "a b", "", "a:b", "../x", "x" * 33):
        with pytest.raises(InputError, match="a project's name"):
            create_key(store, project=project)
    with pytest.raises(InputError, match="there is no such scope"):
        create_key(store, project="a", scopes=["files"])


def test_without_keys_a_loopback_server_is_open_until_the_first(opened: Callable[..., Store], tmp_path: Path) -> None:
    store = opened(tmp_path)
    admission = ProjectKeys(store, None, may_be_open=True)
    sent = {b"authorization": b"Bearer none", b"openai-project": b"proj_from_elsewhere"}
    assert asyncio.run(admission.admit("POST", "/v1/files", sent)) == "tunesmith"
    shut = replace(admission, may_be_open=False)
    for keeper in (shut, admission):
        with pytest.raises(Exception, match="needs an API key"):
            asyncio.run(keeper.admit("GET", "/v1/files", sent)) if keeper is shut else close(store, keeper, sent)
    store.close()


def close(store: Store, keeper: ProjectKeys, sent: dict[bytes, bytes]) -> None:
    """A key was made and ended: the door that it closed stays closed."""
    row, _ = create_key(store, project="a")
    revoke_key(store, row["id"])
    asyncio.run(keeper.admit("GET", "/v1/files", sent))


def test_a_folder_of_another_database_is_refused(tmp_path: Path) -> None:
    from jobs.postgres import cluster

    first, second = (cluster().url(tmp_path / name) for name in "ab")
    store = Store(tmp_path / "folder", first)
    put_file(store, rows(1))
    store.close()
    with pytest.raises(InputError, match="does not belong to the store"):
        Store(tmp_path / "folder", second)
    with pytest.raises(InputError, match="does not belong to the store"):
        Store(tmp_path / "empty", first)
    store = Store(tmp_path / "folder", first)
    assert store.content_path("file-a").exists()
    store.close()
