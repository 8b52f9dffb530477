"""A kept answer and a kept job are found again by everything that they follow from, and by nothing less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")

from tunesmith.jobs.job_request import JobBody
from tunesmith.jobs.kept_answers import KeptAnswers
from tunesmith.jobs.repeats import digest_of, keyed_id
from tunesmith.serve.middleware import PROJECT


@contextmanager
def project(name: str) -> Iterator[None]:
    token = PROJECT.set(name)
    try:
        yield
    finally:
        PROJECT.reset(token)


SCOPE: dict[str, Any] = {"method": "GET", "path": "/v1/fine_tuning/jobs", "query_string": b"limit=1"}


@pytest.mark.parametrize(
    "change",
    [
        {"project": "b"}, {"method": "POST"}, {"path": "/v1/fine_tuning/jobs/ftjob-a"}, {"query_string": b"limit=2"},
        {"version": 8},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_an_answer_about_jobs_belongs_to_its_request_and_store(change: dict[str, Any]) -> None:
    store: Any = SimpleNamespace(answers={}, version=7)
    kept = KeptAnswers(store)
    with project("a"):
        request: Any = SimpleNamespace(scope={**SCOPE, "route": "its route"})
        kept.keep(request, lambda: {"answer": 1})
        assert kept.find(dict(SCOPE)) is not None
    store.version = change.get("version", 7)
    with project(change.get("project", "a")):
        other = {key: change.get(key, value) for key, value in SCOPE.items()}
        assert kept.find(other) is None


def test_an_answer_read_while_a_job_changed_is_not_kept() -> None:
    store: Any = SimpleNamespace(answers={}, version=7)
    request: Any = SimpleNamespace(scope={**SCOPE, "route": "its route"})

    def read() -> Any:
        store.version = 8
        return {"answer": "of before"}

    KeptAnswers(store).keep(request, read)
    assert KeptAnswers(store).find(dict(SCOPE)) is None


BODY: dict[str, Any] = {"model": "tiny", "training_file": "file-a"}
BODIES: dict[str, Any] = {
    "model": "other", "training_file": "file-b", "validation_file": "file-c", "hyperparameters": {"n_epochs": 2},
    "method": {"type": "dpo"}, "suffix": "x", "seed": 1, "metadata": {"a": "b"},
    "integrations": [{"type": "wandb", "wandb": {"project": "p"}}],
}  # fmt: skip


def test_the_job_of_a_key_is_that_of_its_project_and_key() -> None:
    with project("a"):
        first, other = keyed_id("one"), keyed_id("another")
        assert keyed_id("one") == first
    with project("b"):
        assert len({first, other, keyed_id("one")}) == 3


@pytest.mark.parametrize("name", JobBody.model_fields)
def test_each_field_of_a_job_is_in_what_its_key_was_used_for(name: str) -> None:
    other = digest_of(JobBody(**{**BODY, name: BODIES.get(name, "x")}))
    assert other != digest_of(JobBody(**BODY)) == digest_of(JobBody(**BODY))
