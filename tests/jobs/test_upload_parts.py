"""Uploads in parts: order, sizes, MD5, cancel, expiry, and kills between their writes."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

openai = pytest.importorskip("openai", reason="the openai package is the client of these tests")

from jobs.places import rows  # noqa: E402
from jobs.served import Served  # noqa: E402
from tunesmith.jobs import upload_parts  # noqa: E402
from tunesmith.jobs import uploads as whole_uploads  # noqa: E402
from tunesmith.jobs.rules import ProjectRules, Rules  # noqa: E402
from tunesmith.jobs.tables import is_pending, uploads  # noqa: E402
from tunesmith.serve.protocol import RequestError  # noqa: E402

WHOLE = rows(40)
CUT = 1000


def begin(served: Served, *, num_bytes: int = len(WHOLE), purpose: str = "fine-tune") -> Any:
    facts = {"bytes": num_bytes, "filename": "../a.jsonl", "mime_type": "text/jsonl", "purpose": purpose}
    return served.client.uploads.create(**facts)


def add(served: Served, upload: Any, content: bytes) -> str:
    return served.client.uploads.parts.create(upload.id, data=("part", content)).id


def test_parts_are_joined_in_the_order_of_the_end(served: Served) -> None:
    upload = begin(served)
    assert (upload.status, upload.bytes, upload.filename) == ("pending", len(WHOLE), "a.jsonl")
    assert upload.expires_at - upload.created_at == 3600
    last, first = add(served, upload, WHOLE[CUT:]), add(served, upload, WHOLE[:CUT])
    add(served, upload, b"sent again under another id, and not used")
    done = served.client.uploads.complete(upload.id, part_ids=[first, last], md5=hashlib.md5(WHOLE).hexdigest())
    assert (done.status, done.file.bytes, done.file.purpose) == ("completed", len(WHOLE), "fine-tune")
    assert served.client.files.content(done.file.id).read() == WHOLE
    assert served.store.file(done.file.id)["sha256"] == hashlib.sha256(WHOLE).hexdigest()
    assert served.client.uploads.complete(upload.id, part_ids=[first, last]) == done, "a repeated call is answered"
    assert list(served.store.parts_path.iterdir()) == []
    for call in (lambda: served.client.uploads.cancel(upload.id), lambda: add(served, upload, b"x")):
        with pytest.raises(openai.BadRequestError, match="is completed: only a pending one"):
            call()


@pytest.mark.parametrize("code", [None, errno.EXDEV, errno.EPERM])
def test_parts_are_joined_where_the_system_cannot_copy(
    served: Served, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def refuse(*_: Any) -> int:
        raise AttributeError if code is None else OSError(code, "no copy")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    upload = begin(served)
    parts = [add(served, upload, piece) for piece in (WHOLE[:100], WHOLE[100:])]
    done = served.client.uploads.complete(upload.id, part_ids=parts, md5=hashlib.md5(WHOLE).hexdigest())
    assert served.client.files.content(done.file.id).read() == WHOLE


def test_the_helper_of_the_client_uploads_in_chunks(served: Served) -> None:
    done = served.client.uploads.upload_file_chunked(
        file=WHOLE, filename="b.jsonl", bytes=len(WHOLE), mime_type="text/jsonl", purpose="fine-tune", part_size=CUT
    )
    assert served.client.files.content(done.file.id).read() == WHOLE


@pytest.mark.parametrize(
    ("content", "num_bytes", "more", "words"),
    [
        (WHOLE, len(WHOLE) + 1, {}, "and not the"),
        (WHOLE, len(WHOLE), {"md5": "0" * 32}, f"md5: the parts have {hashlib.md5(WHOLE).hexdigest()}"),
        (WHOLE, len(WHOLE), {"part_ids": ["part_none"]}, "is not part of this upload"),
        (WHOLE, len(WHOLE), {"part_ids": ["../../jobs.sqlite"]}, "is not part of this upload"),
        (b"not json\n", 9, {}, "Line 1 is not a dictionary"),
    ],
)
def test_an_end_that_does_not_fit_leaves_the_upload_pending(
    served: Served, content: bytes, num_bytes: int, more: dict, words: str
) -> None:
    upload = begin(served, num_bytes=num_bytes)
    part = add(served, upload, content)
    before = sorted(served.store.files_path.iterdir())
    with pytest.raises(openai.BadRequestError, match="(?s)" + words.replace(".", "[.]")):
        served.client.uploads.complete(upload.id, **{"part_ids": [part], **more})
    assert sorted(served.store.files_path.iterdir()) == before
    if num_bytes == len(WHOLE):
        assert served.client.uploads.complete(upload.id, part_ids=[part]).status == "completed"
    else:
        assert served.client.uploads.cancel(upload.id).status == "cancelled"
        assert not (served.store.parts_path / upload.id).exists()


def test_an_upload_expires(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_parts, "LIFETIME_S", 0)
    upload = begin(served)
    with pytest.raises(openai.BadRequestError, match="is expired"):
        add(served, upload, WHOLE)
    with pytest.raises(openai.NotFoundError, match="No such Upload object: upload_x"):
        served.client.uploads.complete("upload_x", part_ids=["part_x"])


def test_parts_are_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_parts, "MAX_PART_BYTES", 10)
    with pytest.raises(openai.APIStatusError, match="more than 10 bytes"):
        add(served, begin(served, num_bytes=80), b"x" * 11)
    upload = begin(served, num_bytes=8)
    with pytest.raises(openai.APIStatusError, match="more than 8 bytes") as caught:
        add(served, upload, b"x" * 9)
    assert caught.value.status_code == 413
    assert list((served.store.parts_path / upload.id).iterdir()) == []
    add(served, upload, b"x" * 8)
    add(served, upload, b"x" * 8)
    with pytest.raises(openai.BadRequestError, match="twice its 8 bytes in parts already"):
        add(served, upload, b"x")


@pytest.mark.parametrize(
    ("body", "param"),
    [({"purpose": "nonsense"}, "purpose"), ({"bytes": 0}, "bytes"), ({"bytes": "9"}, "bytes"), ({"sort": 1}, "sort")],
)
def test_an_upload_that_cannot_be_is_refused(served: Served, body: dict, param: str) -> None:
    whole = {"bytes": 9, "filename": "a", "mime_type": "text/plain", "purpose": "fine-tune", **body}
    status, answer, _ = served.running.ask("POST", "/v1/uploads", whole)
    assert (status, answer["error"]["param"]) == (400, param)


class Killed(BaseException):
    """The process is gone: no handler of Exception sees it."""


@pytest.mark.parametrize("at", ["joined", "renamed"])
def test_a_kill_in_the_end_leaves_a_pending_upload(served: Served, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    upload = begin(served)
    part = add(served, upload, WHOLE)
    before = sorted(served.store.files_path.iterdir())

    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(upload_parts, "_publish" if at == "joined" else "fsync_dir", killed)
    with pytest.raises(Killed):
        upload_parts.complete_upload(served.store, upload.id, upload_parts.JoinBody(part_ids=[part]))
    monkeypatch.undo()
    served.store.remove_unused(with_uploads=True)
    assert sorted(served.store.files_path.iterdir()) == before
    assert served.client.uploads.complete(upload.id, part_ids=[part]).status == "completed"


def test_a_part_is_taken_while_another_gets_its_name(served: Served) -> None:
    upload = begin(served)
    add(served, upload, WHOLE[:10])
    (served.store.parts_path / upload.id / ".part_gone").symlink_to("nowhere")  # listed, and not there any more
    assert add(served, upload, WHOLE[10:]).startswith("part_")
    served.client.uploads.cancel(upload.id)


def test_an_upload_that_is_made_during_a_sweep_keeps_its_parts(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    store = served.store
    read, folder = store._read, store.parts_path / "upload_new"
    facts = {"status": "pending", "bytes": 1, "filename": "a", "purpose": "evals", "expires_at": int(time.time()) + 99}

    def read_and_be_overtaken(statement: Any) -> Any:
        found = read(statement)
        if "uploads" in str(statement) and not folder.exists():
            store.insert(upload_parts.uploads, {"id": folder.name, **facts})
            folder.mkdir()
        return found

    monkeypatch.setattr(store, "_read", read_and_be_overtaken)
    store.remove_unused()
    assert folder.is_dir()


def test_parts_take_no_more_room_than_their_upload_may(served: Served) -> None:
    upload = begin(served, num_bytes=1)
    with pytest.raises(openai.APIStatusError, match=r"data: has more than 1 bytes"):
        add(served, upload, bytes(20 << 20))
    add(served, upload, b"x")
    add(served, upload, b"y")
    with pytest.raises(openai.BadRequestError, match="has twice its 1 bytes in parts already"):
        add(served, upload, b"z")
    folder = served.store.parts_path / upload.id
    assert sum(path.stat().st_size for path in folder.iterdir()) == 2
    served.client.uploads.cancel(upload.id)


def test_parts_that_arrive_at_once_share_the_room(served: Served) -> None:
    upload, content = begin(served, num_bytes=1 << 20), bytes(1 << 20)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(add, served, upload, content) for _ in range(8)]
    assert sum(answer.exception() is None for answer in answers) <= 2
    folder = served.store.parts_path / upload.id
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2 << 20
    assert served.store.arriving == {}
    served.client.uploads.cancel(upload.id)


# trap: S23
def test_pending_uploads_count_for_the_limits_of_their_project(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tunesmith.jobs.store.is_pending", sa.false)
        with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
            pending_uploads_are_counted(served, patch)
    pending_uploads_are_counted(served, monkeypatch)


def pending_uploads_are_counted(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in served.store.page(uploads, is_pending(), limit=1000)[0]:
        served.client.uploads.cancel(row["id"])
    taken = sum(file.bytes for file in served.client.files.list())
    monkeypatch.setattr(served.store, "rules", Rules(every_project=ProjectRules(file_bytes=taken + 2500)))
    first, _ = begin(served, num_bytes=1000), begin(served, num_bytes=1000)
    client = served.client.with_options(max_retries=0)
    with pytest.raises(openai.RateLimitError, match=r"and pending uploads of this project have"):
        begin(served, num_bytes=1000)
    with pytest.raises(openai.RateLimitError):
        client.files.create(file=("a.jsonl", rows(12)), purpose="fine-tune")
    part = add(served, first, rows(9)[:500] + b" " * 500)
    with pytest.raises(openai.BadRequestError):  # no rows: but its own bytes are not counted twice
        served.client.uploads.complete(first.id, part_ids=[part, part])
    served.client.uploads.cancel(first.id)
    done = begin(served, num_bytes=1400)
    content = (rows(10) + b" " * 1400)[:1400]
    assert served.client.uploads.complete(done.id, part_ids=[add(served, done, content)]).status == "completed"
    monkeypatch.setattr(served.store, "rules", Rules())
    monkeypatch.setattr(upload_parts, "MOST_PENDING", 3)
    begin(served), begin(served)
    with pytest.raises(RequestError, match="3 uploads of this project are pending"):
        upload_parts.create_upload(served.store, upload_parts.UploadBody(**FACTS))


FACTS: dict[str, Any] = {"bytes": 9, "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"}


def test_a_too_large_file_is_named_so_if_its_project_has_no_limit(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.store, "rules", Rules())
    monkeypatch.setattr(whole_uploads, "MAX_BYTES", 2000)
    client = served.client.with_options(max_retries=0)
    with pytest.raises(openai.APIStatusError, match=r"file: has more than 2,000 bytes") as refused:
        client.files.create(file=("a.jsonl", rows(200)), purpose="fine-tune")
    assert refused.value.status_code == 413, "not 429, after which a client would send it again"


def test_an_upload_without_a_length_ends_at_its_projects_limit(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in served.store.page(uploads, is_pending(), limit=1000)[0]:
        served.client.uploads.cancel(row["id"])
    taken = sum(file.bytes for file in served.client.files.list())
    monkeypatch.setattr(served.store, "rules", Rules(every_project=ProjectRules(file_bytes=taken + 2000)))
    most = [0]

    def pieces() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{"a": 1}\n'
        for _ in range(200):
            yield b"x" * 100_000
            for path in served.store.files_path.glob(".*"):
                with suppress(FileNotFoundError):  # the server removes it at any moment
                    most[0] = max(most[0], path.stat().st_size)

    url = f"{served.client.base_url}files"
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    with suppress(httpx.HTTPError):  # it is closed while it sends
        answer = httpx.post(url, content=pieces(), headers=head)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")
    assert most[0] < 1 << 20, "it was stored whole before it was refused"
    assert not list(served.store.files_path.glob(".*"))


def test_ends_of_one_upload_at_once_are_all_answered(served: Served) -> None:
    for _ in range(10):
        upload = begin(served)
        parts = [add(served, upload, WHOLE[:CUT]), add(served, upload, WHOLE[CUT:])]
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(served.client.uploads.complete, upload.id, part_ids=parts) for _ in range(4)]
        assert len({call.result().file.id for call in calls}) == 1
    assert served.store.joining == {}
