"""What a server of jobs keeps to itself: each line of the list, and the tests that hold it.

| | |
|---|---|
| every route without a key, with a wrong one | test_projects: every_route_is_closed_without_a_key |
| another project's ids: as ids that are not there | test_projects: whatever_is_anothers_is_not_there, no_page_begins_after_anothers_row |
| each missing scope | test_projects: each_route_needs_its_scope |
| Host, Origin | serve/test_security: no_name_leads_here_that_somebody_else_gives, web_pages_stay_outside |
| preflight with DELETE | here |
| planted secrets in no file, row, report, event, output | test_end_to_end; test_projects: a_key_is_kept_nowhere; test_rules: a_webhook_that_is_never_taken |
| SQL in every text; metadata keys with `[`, `%`, quotes | here; test_faults: metadata_is_data; test_store: names_are_data |
| rows with control tokens, deep nesting, 8 MiB lines, gzip | test_faults: rows_made_to_harm_are_an_error_of_the_job; serve/test_security: bombs_are_refused |
| reports and files run nothing in a browser | test_jobs_command: the_report_is_a_page_that_runs_nothing; here |
| webhooks to private addresses, moving names, redirects | test_rules: a_private_address_is_not_called, a_name_cannot_become_another_address, a_webhook_is_what_the_client_unwraps |
| endpoints that hang or drip | test_rules: an_endpoint_that_never_answers_holds_back_its_own_project_alone, an_endpoint_that_answers_by_drops_has_a_time_for_all |
| training files of a million faults, of wide rows, that take memory or time; cancelled meanwhile | test_file_checks |
| a lost, empty, foreign, older or damaged database | test_store: a_lost_database_removes_no_upload_and_the_way_out_is_one, what_an_older_copy_of_the_database_does_not_name_is_set_aside, a_damaged_database_is_named_so_and_nothing_is_removed |
| limits gone around by uploads in parts, pending, at once, or without a length | test_upload_parts: parts_take_no_more_room_than_their_upload_may, pending_uploads_count_for_the_limits_of_their_project, an_upload_without_a_length_ends_where_the_room_of_its_project_does |
| contents that are deleted by hand, or links | test_file_checks: content_that_is_gone_or_a_link_is_an_error_of_its_job; test_routes: content_that_was_removed_by_hand_is_not_found |
| connections that ask nothing | serve/test_security: who_opens_connections_and_asks_nothing_keeps_nobody_out |
| no request names a path or a hub id | here; test_bases |
| adapters are loaded by their recorded hash | serve/test_attach: a_run_that_started_from_another_answers |
| folders 0700, files 0600 | test_faults: folders_and_files_are_for_their_owner_alone |
"""  # noqa: E501

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the openai package is the client of these tests")

from jobs.places import BASES, FakeLauncher, FakeModels, dispatcher, put_file, put_job, rows  # noqa: E402
from jobs.served import Served  # noqa: E402
from serve.running import running  # noqa: E402
from tunesmith.jobs.tables import TABLES  # noqa: E402
from tunesmith.serve.middleware import AccessPolicy  # noqa: E402

SQL = "x'); DROP TABLE jobs; --"


def test_a_page_that_is_allowed_may_delete_and_no_other() -> None:
    page = "https://tune.example"
    with running(AccessPolicy(origins=frozenset({page}))) as server:
        names = "authorization,idempotency-key,openai-organization,openai-project,x-stainless-retry-count"
        asked = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": names}
        status, _, head = server.ask("OPTIONS", "/v1/files/file-x", headers={"Origin": page, **asked})
        assert (status, "DELETE" in head.partition("access-control-allow-methods:")[2].splitlines()[0]) == (200, True)
        assert f"access-control-allow-headers: {names}\r\n" in head
        head = server.ask("GET", "/v1/models", headers={"Origin": page})[2]
        assert "access-control-expose-headers: *\r\n" in head, "clients read Retry-After and x-should-retry"
        status, _, head = server.ask(
            "OPTIONS", "/v1/files/file-x", headers={"Origin": "https://other.example", **asked}
        )
        assert (status, "access-control-allow-origin" in head) == (403, False)


def test_sql_in_any_text_is_a_text(served: Served) -> None:
    client, store = served.client, served.store
    file = client.files.create(file=(SQL, rows(12)), purpose="fine-tune")
    assert client.files.retrieve(file.id).filename == SQL
    body: dict[str, Any] = {"model": "tiny", "training_file": file.id}
    job = client.fine_tuning.jobs.create(**body, suffix=SQL, metadata={SQL: SQL})
    assert client.fine_tuning.jobs.retrieve(job.id).user_provided_suffix == SQL
    assert [one.id for one in client.fine_tuning.jobs.list(metadata={SQL: SQL})] == [job.id]
    made = client.uploads.create(bytes=1, filename=SQL, mime_type=SQL, purpose="user_data")
    asks = [
        ("POST", "/fine_tuning/jobs", {**body, "model": SQL}), ("POST", "/fine_tuning/jobs", {**body, SQL: SQL}),
        ("POST", "/fine_tuning/jobs", {"model": "tiny", "training_file": SQL}),
        ("POST", "/uploads", {"bytes": 1, "filename": "a", "mime_type": "a", "purpose": SQL}),
        ("POST", f"/uploads/{made.id}/complete", {"part_ids": [SQL]}),
        ("POST", f"/fine_tuning/checkpoints/{job.id}/permissions", {"project_ids": [SQL]}),
        *(("GET", f"/{place}after=%27%29%3B--", None) for place in ("files?", "fine_tuning/jobs?",
          f"fine_tuning/jobs/{job.id}/events?", f"fine_tuning/jobs/{job.id}/checkpoints?")),
        ("GET", "/files?order=%27%3B--", None), ("DELETE", "/models/%27%3B--", None),
        ("DELETE", "/files/%27%3B--", None),
    ]  # fmt: skip
    for method, path, sent in asks:
        assert served.running.ask(method, f"/v1{path}", sent)[0] in (400, 404), path
    assert client.files.list(purpose=SQL).data == []
    with store.writing() as connection:
        there = {name for (name,) in connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert set(TABLES.tables) <= there
    assert store.job(job.id) is not None


def test_a_file_is_nothing_that_a_browser_opens(served: Served) -> None:
    page = b"<html><script>alert(1)</script></html>"
    file = served.client.files.create(file=('a".html\r\nX: y', page), purpose="user_data")
    status, _, head = served.running.ask("GET", f"/v1/files/{file.id}/content")
    lines = head.lower().splitlines()
    assert status == 200
    assert "content-type: application/octet-stream" in lines
    assert "x-content-type-options: nosniff" in lines
    assert [line for line in lines if line.startswith("content-disposition: attachment; filename*=utf-8''a%")]
    assert not [line for line in lines if line.startswith("x: ")]


@pytest.mark.parametrize(
    "model", ["tiny-model", "../tiny-model", "/etc", "owner/model", "hf://owner/model", "last", "."]
)
def test_no_request_leads_to_another_model(served: Served, model: str) -> None:
    """`tiny-model` is the folder behind the public name."""
    file = put_file(served.store, rows(12)) if served.store.file("file-a") is None else "file-a"
    with pytest.raises(openai.BadRequestError, match="is not available for fine-tuning") as caught:
        served.client.fine_tuning.jobs.create(model=model, training_file=file)
    assert "tiny-model" not in caught.value.message.replace(f"Model {model}", "")


def test_a_recipe_names_the_base_and_the_files_of_its_job_alone(tmp_path: Path) -> None:
    from tunesmith.jobs.store import Store

    store = Store(tmp_path)
    name = put_job(store, put_file(store, rows(12)), suffix="../../etc", metadata={"model": "/etc"})
    dispatcher(store, FakeLauncher(), FakeModels()).round()
    text = (store.recipes_path / f"{name}.yaml").read_text()
    assert "/etc" not in text
    assert f'"model":"{BASES.bases["tiny"].model}"' in text
    store.close()
