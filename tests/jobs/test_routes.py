"""The unmodified openai client against the routes, over a store without a dispatcher; and raw requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the openai package is the client of these tests")

from orjson import loads  # noqa: E402

from jobs.places import rows  # noqa: E402
from jobs.served import Served  # noqa: E402
from tunesmith.jobs import uploads  # noqa: E402
from tunesmith.jobs.store import Store, event  # noqa: E402


@pytest.fixture
def file(served: Served) -> str:
    return served.client.files.create(file=("a.jsonl", rows(12)), purpose="fine-tune").id


def test_a_file_comes_back_as_it_was(served: Served) -> None:
    made = served.client.files.create(file=("../../x\u202e\r\ny.jsonl", rows(3)), purpose="fine-tune")
    assert (made.status, made.bytes, made.purpose) == ("processed", len(rows(3)), "fine-tune")
    assert "/" not in made.filename
    assert made.filename.isprintable()
    assert served.client.files.retrieve(made.id) == made
    assert served.client.files.content(made.id).read() == rows(3)
    assert sorted(path.name for path in served.store.folder.parent.iterdir()) == [served.store.folder.name]
    assert served.client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError, match=f"No such File object: {made.id}"):
        served.client.files.delete(made.id)


def test_files_are_paged_and_filtered(served: Served) -> None:
    made = [served.client.files.create(file=("b", b"x"), purpose="user_data").id for _ in range(5)]
    found = [one.id for one in served.client.files.list(purpose="user_data", limit=2)]
    assert found == made[::-1]
    assert [one.id for one in served.client.files.list(purpose="user_data", order="asc")] == made
    assert list(served.client.files.list(purpose="nonsense")) == []


@pytest.mark.parametrize(
    ("content", "purpose", "words"),
    [
        (b"", "fine-tune", "empty"),
        (b"hello\n", "fine-tune", 'Line 1 is not a dictionary (HINT: line starts with: "hell...").'),
        (b"\xff\xfe\n", "fine-tune", "Must be .jsonl"),
        (b"[1]\n", "fine-tune", "Line 1 is not a dictionary"),
        (b"x", "fine-tune-results", "is not one of"),
        (b"x", "nonsense", "is not one of"),
    ],
)  # fmt: skip
def test_a_file_that_no_job_could_use_is_refused(served: Served, content: bytes, purpose: str, words: str) -> None:
    before = sorted(served.store.files_path.iterdir())
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.files.create(file=("a", content), purpose=purpose)
    assert words in str(caught.value)
    assert sorted(served.store.files_path.iterdir()) == before


def test_a_long_first_row_is_not_parsed_where_requests_are_answered(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold every other request for most of a second, in whatever thread."""
    parsed: list[int] = []
    monkeypatch.setattr(uploads.orjson, "loads", lambda text: parsed.append(len(text)) or loads(text))
    long = b'{"a": [' + b"[], " * 500_000 + b"0]}\n"
    assert served.client.files.create(file=("a", long + rows(1)), purpose="fine-tune").bytes > len(long)
    for content in (long[:-2] + b"\n", b"[" + long, long[:-1] * 5):  # the last has no end within the first look
        with pytest.raises(openai.BadRequestError, match="Line 1 is not a dictionary"):
            served.client.files.create(file=("a", content), purpose="fine-tune")
    assert max(parsed, default=0) < 100_000


PART = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
WHOLE = PART % (b"file", b'; filename="a"', b"{}\n") + PART % (b"purpose", b"", b"fine-tune") + b"--b--\r\n"


def post(served: Served, body: bytes, kind: str = "multipart/form-data; boundary=b") -> tuple[int, object, str]:
    return served.running.ask("POST", "/v1/files", body, headers={"Content-Type": kind})


def test_fields_may_come_in_any_order(served: Served) -> None:
    assert post(served, WHOLE)[0] == 200


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (WHOLE[:-20], "multipart/form-data; boundary=b", 400),
        (WHOLE, "multipart/form-data", 415),
        (WHOLE, "application/json", 415),
        (PART % (b"file", b"", b"{}") * 2 + b"--b--\r\n", "multipart/form-data; boundary=b", 400),
        (PART % (b"other", b"", b"{}") + b"--b--\r\n", "multipart/form-data; boundary=b", 400),
        (PART % (b"purpose", b"", b"fine-tune") + b"--b--\r\n", "multipart/form-data; boundary=b", 400),
        (PART % (b"purpose", b"", b"x" * 9999) + b"--b--\r\n", "multipart/form-data; boundary=b", 400),
        (b"nonsense", "multipart/form-data; boundary=b", 400),
    ],
)
def test_a_form_that_cannot_be_read_leaves_nothing(served: Served, body: bytes, kind: str, status: int) -> None:
    before = sorted(served.store.files_path.iterdir())
    found, answer, _ = post(served, body, kind)
    assert found == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert sorted(served.store.files_path.iterdir()) == before


def test_an_upload_that_is_cut_off_leaves_nothing(served: Served) -> None:
    before = sorted(served.store.files_path.iterdir())
    head = b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    served.running.raw(head + b"Content-Length: 999999\r\n\r\n" + WHOLE[:60], timeout_s=0.3)
    served.running.wait_until_idle()
    assert sorted(served.store.files_path.iterdir()) == before


def test_a_job_is_created_with_what_was_sent(served: Served, file: str) -> None:
    made = served.client.fine_tuning.jobs.create(
        model="gpt-4o-mini", training_file=file, suffix="mine", seed=5, metadata={"a": "b"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
    )  # fmt: skip
    assert (made.status, made.model, made.seed) == ("validating_files", "gpt-4o-mini-2024-07-18", 5)
    assert (made.user_provided_suffix, made.metadata) == ("mine", {"a": "b"})
    assert made.hyperparameters.n_epochs == made.method.supervised.hyperparameters.n_epochs == 2
    assert made.error.code is None
    assert served.client.fine_tuning.jobs.retrieve(made.id) == made
    assert [one.id for one in served.client.fine_tuning.jobs.list(metadata={"a": "b"})] == [made.id]
    said = [one.message for one in served.client.fine_tuning.jobs.list_events(made.id, limit=1)]
    assert said[-1] == f"Created fine-tuning job: {made.id}"
    assert said[-2] == "gpt-4o-mini is a name of tiny here: that model is tuned"
    assert served.client.fine_tuning.jobs.pause(made.id).status == "paused"
    assert served.client.fine_tuning.jobs.resume(made.id).status == "queued"
    assert served.client.fine_tuning.jobs.cancel(made.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="is already cancelled and cannot be paused"):
        served.client.fine_tuning.jobs.pause(made.id)
    assert list(served.client.fine_tuning.jobs.checkpoints.list(made.id)) == []


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"model": "gpt-9"}, "model", "is not available for fine-tuning or does not exist"),
        ({"model": "/etc/passwd"}, "model", "is not available"),
        ({"training_file": "file-none"}, "training_file", "invalid training_file: file-none"),
        ({"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs", "whole number from 1 to 50"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs", "auto"),
        ({"hyperparameters": {"learning_rate_multiplier": -1}}, "hyperparameters.learning_rate_multiplier", "0.000001"),
        (
            {"hyperparameters": {"learning_rate_multiplier": 1e-320}},
            "hyperparameters.learning_rate_multiplier",
            "0.000001",
        ),
        ({"hyperparameters": {"n_epoch": 3}}, "hyperparameters.n_epoch", "unknown parameter. Did you mean n_epochs?"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 1e-320}}}},
            "method.dpo.hyperparameters.beta",
            "a number from 0.000001 to 2",
        ),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"betta": 1}}}},
            "method.dpo.hyperparameters.betta",
            "n beta?",
        ),
        ({"method": {"type": "evolution"}}, "method", "is not available here"),
        ({"method": {"type": "reinforcement"}}, "method.reinforcement.grader", "is missing"),
        ({"sufix": "x"}, "sufix", "unknown parameter. Did you mean suffix?"),
        ({"suffix": "x" * 65}, "suffix", "64"),
        ({"seed": 2**31}, "seed", ""),
    ],
)
def test_a_job_that_cannot_be_is_refused(served: Served, file: str, body: dict, param: str, words: str) -> None:
    whole = {"model": "tiny", "training_file": file, **body}
    status, answer, _ = served.running.ask("POST", "/v1/fine_tuning/jobs", whole)
    assert (status, answer["error"]["param"]) == (400, param)
    assert words in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/files?limt=1", "limt"),
        ("/v1/files?limit=x", "limit"),
        ("/v1/files?limit=10001", "limit"),
        ("/v1/files?limit=0000000000010001", "limit"),
        ("/v1/files?after=file-none", "after"),
        ("/v1/files?order=up", "order"),
        ("/v1/fine_tuning/jobs?limit=101", "limit"),
    ],
)
def test_a_query_that_means_nothing_is_refused(served: Served, path: str, param: str) -> None:
    status, answer, _ = served.running.ask("GET", path)
    assert (status, answer["error"]["param"]) == (400, param)


def test_a_base_is_no_model_to_delete(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="is a base"):
        served.client.models.delete("tiny")
    with pytest.raises(openai.NotFoundError, match="The model 'ft:x' does not exist"):
        served.client.models.delete("ft:x")


def test_ids_are_data(served: Served, tmp_path: Path) -> None:
    for name in ("..%2F..%2Fetc%2Fpasswd", "'%20OR%201=1--", "file-" + "a" * 500):
        assert served.running.ask("GET", f"/v1/files/{name}/content")[0] == 404
        assert served.running.ask("GET", f"/v1/fine_tuning/jobs/{name}")[0] == 404


def test_a_repeated_request_whose_answer_was_lost_makes_nothing_twice(served: Served, file: str) -> None:
    """Clients of OpenAI count in x-stainless-retry-count how often they sent a request before."""

    def made(retry: int, **more: object) -> str:
        body = {"model": "tiny", "training_file": file, **more}
        headers = {"x-stainless-retry-count": str(retry)}
        return served.running.ask("POST", "/v1/fine_tuning/jobs", body, headers=headers)[1]["id"]

    first = made(0)
    assert made(1) == first
    assert made(2) == first
    assert made(2) != first, "of another request, whose first tries never came"
    second = made(0)
    assert second != first, "the same request by intent"
    assert made(1, seed=3) not in (first, second), "another body"

    again = {"extra_headers": {"x-stainless-retry-count": "1"}}
    once = served.client.files.create(file=("c.jsonl", rows(5)), purpose="fine-tune").id
    assert served.client.files.create(file=("c.jsonl", rows(5)), purpose="fine-tune", **again).id == once
    assert served.client.files.create(file=("d.jsonl", rows(5)), purpose="fine-tune", **again).id != once
    assert served.client.files.create(file=("c.jsonl", rows(5)), purpose="fine-tune").id != once
    assert served.client.fine_tuning.jobs.cancel(first).status == "cancelled"
    assert served.client.fine_tuning.jobs.cancel(first, **again).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="is already cancelled"):
        served.client.fine_tuning.jobs.cancel(first)


def test_one_job_is_made_with_one_key_however_often_it_is_sent(served: Served, file: str) -> None:
    client, path = served.running.client(), "/v1/fine_tuning/jobs"
    before = len(list(client.fine_tuning.jobs.list()))

    def made(number: int = 0, **body: Any) -> str:
        headers = {"Idempotency-Key": "one" if number >= 0 else "another"}
        return client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_headers=headers, **body).id

    with ThreadPoolExecutor(50) as pool:
        [one] = set(pool.map(made, range(50)))
    assert len(list(client.fine_tuning.jobs.list())) == before + 1
    assert [event.message for event in client.fine_tuning.jobs.list_events(one)].count(
        f"Created fine-tuning job: {one}"
    ) == 1
    assert made(-1) != one
    with pytest.raises(openai.UnprocessableEntityError, match="says something else"):
        made(seed=1)
    assert client.fine_tuning.jobs.cancel(one).status == "cancelled"
    assert made() == one, "its job, whatever has become of it"
    body = {"model": "tiny", "training_file": file}
    status, answer, _ = served.running.ask("POST", path, body, headers={"Idempotency-Key": "x" * 300})
    assert (status, answer["status"]) == (200, "validating_files")


def test_a_polling_client_is_answered_from_memory_until_the_job_changes(
    served: Served, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, read = served.client.fine_tuning.jobs, Store._read
    name, num_reads = jobs.create(model="tiny", training_file=file).id, []
    before = jobs.retrieve(name)
    monkeypatch.setattr(Store, "_read", lambda *given: num_reads.append(1) or read(*given))
    assert [jobs.retrieve(name), jobs.list(limit=1).data[0], jobs.list(limit=1).data[0]] == [before] * 3
    served.store.add_events([event(name, "Step 1")])
    assert (jobs.retrieve(name), num_reads) == (before, [])
    served.store.change_job(name, if_status=["validating_files"], status="running")
    assert jobs.retrieve(name).status == jobs.list(limit=1).data[0].status == "running"
    assert jobs.list_events(name, limit=1).data[0].message == "Step 1"
    jobs.cancel(name)
    assert jobs.retrieve(name).status == "cancelled"


@pytest.mark.parametrize("is_link", [False, True])
def test_content_that_was_removed_by_hand_is_not_found(served: Served, tmp_path: Path, is_link: bool) -> None:
    file = served.client.files.create(file=("a.jsonl", rows(12)), purpose="fine-tune").id
    served.store.content_path(file).unlink()
    if is_link:  # who may write there could read any file of the server's by it
        (tmp_path / "secret").write_text("secret")
        served.store.content_path(file).symlink_to(tmp_path / "secret")
    status, answer, _ = served.running.ask("GET", f"/v1/files/{file}/content")
    assert (status, answer["error"]["code"]) == (404, "content_missing")
    assert served.client.files.delete(file).deleted
