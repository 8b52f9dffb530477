"""Requests as bytes: what is read, what is refused and how it is said."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest

from serve.fake import MODELS, FakeEngine
from serve.running import Running, running, wait_for
from tunesmith.serve import http
from tunesmith.serve.protocol import GenerationRequest, ModelCard, Started, StreamEvent
from tunesmith.serve.request_schemas import ChatBody, ClassifyBody, CompletionBody

CHAT = {"model": "support", "messages": [{"role": "user", "content": "hello there"}]}
VECTORS = {"model": "vectors", "input": "a"}
SCORED = {"model": "support", "prompt": [1, 2], "prompt_logprobs": 1, "max_tokens": 1, "temperature": 0}
BARE_SCHEMA = {"type": "json_schema"}


def test_classes_come_with_their_probabilities(server: Running) -> None:
    asked = {"model": "mood", "input": ["fine", {"text": "a", "text_pair": "b"}]}
    status, answer, _ = server.ask("POST", "/v1/classify", asked)
    assert status == 200
    line = {"object": "classification", "label": "good", "probabilities": {"good": 0.75, "bad": 0.25}}
    assert answer == {"object": "list", "model": "mood", "data": [{**line, "index": 0}, {**line, "index": 1}]}
    status, answer, _ = server.ask("POST", "/v1/classify", {"model": "mood", "input": [{"text": "a"}]})
    assert (status, answer["error"]["code"]) == (400, "invalid_value")


class Orderer(FakeEngine):
    """Serves a model of one number: that many characters has the document."""

    key = "score"

    async def classify(self, model, texts):
        return [{self.key: float(len(document))} for _, document in texts]


@pytest.mark.parametrize("key", ["score", "reward", "label"])
def test_documents_come_in_the_order_of_their_scores(key, monkeypatch):
    monkeypatch.setattr(Orderer, "key", key)
    order = ModelCard("order", "rank", "labels", 64, is_base=False, created=1)
    with running(engine=Orderer(served=(*MODELS, order))) as server:
        body = {"model": "order", "query": "a", "documents": ["ab", {"text": "abcd"}, ""]}
        status, answer, _ = server.ask("POST", "/v1/rerank", body)
        assert status == 200
        found = [(one["index"], one["document"]["text"]) for one in answer["results"]]
        assert found == [(1, "abcd"), (0, "ab"), (2, "")]
        expected = [1 / (1 + math.exp(-length)) for length in (4, 2, 0)]
        assert [one["relevance_score"] for one in answer["results"]] == pytest.approx(expected)
        _, answer, _ = server.ask("POST", "/v1/rerank", {**body, "top_n": 1, "return_documents": False})
        assert [sorted(one) for one in answer["results"]] == [["index", "relevance_score"]]
        for documents in ([], ["a", 1], [{"text": "a", "title": "b"}]):
            status, answer, _ = server.ask("POST", "/v1/rerank", {**body, "documents": documents})
            assert (status, answer["error"]["code"]) == (400, "invalid_value")
        status, answer, _ = server.ask("POST", "/v1/rerank", {**body, "model": "mood"})
        assert (status, answer["error"]["code"]) == (400, "wrong_route")


def test_health_and_metrics(server: Running) -> None:
    status, health, _ = server.ask("GET", "/health")
    assert (status, health["status"], health["engine"]["restarts"]) == (200, "ok", 3)
    server.ask("POST", "/v1/chat/completions", CHAT)
    server.ask("GET", "/v1/nowhere-1")
    server.wait_until_idle()
    status, text, head = server.ask("GET", "/metrics")
    assert status == 200
    assert "text/plain" in head
    assert 'tunesmith_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert 'tunesmith_requests_total{route="none",status="404"}' in text
    assert "nowhere-1" not in text
    for line in (
        "tunesmith_engine_up 1.0",
        "tunesmith_engine_restarts_total 3.0",
        "# TYPE tunesmith_prompt_tokens_total counter",
    ):
        assert line in text.splitlines()


def test_health_says_when_the_model_cannot_answer() -> None:
    with running(engine=FakeEngine(alive=False)) as server:
        assert server.ask("GET", "/health")[:2][0] == 503


def test_a_stream_is_server_sent_events(server: Running) -> None:
    status, text, head = server.ask("POST", "/v1/chat/completions", {**CHAT, "stream": True})
    assert status == 200
    assert "content-type: text/event-stream; charset=utf-8" in head.lower()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("GET", "//v1/models", None, {}, 404, "not_found"),
        ("GET", "/v1/models/", None, {}, 404, "model_not_found"),
        ("GET", "/v1/chat/completions", None, {}, 405, "method_not_allowed"),
        ("HEAD", "/v1/models", None, {}, 405, None),
        ("POST", "/v1/chat/completions", None, {"Content-Type": "application/json"}, 400, "missing_required_parameter"),
        ("POST", "/v1/chat/completions", b"{}", {}, 400, "missing_required_parameter"),
        ("POST", "/v1/chat/completions", b"{", {}, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b'{"model": "a", "model": "b"}', {}, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b'{"temperature": NaN}', {}, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b'{"model": "\\ud800"}', {}, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b'{"model": "\\u0000"}', {}, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", CHAT, {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (
            "POST", "/v1/chat/completions", CHAT, {"Content-Type": "application/json; charset=latin-1"},
            415, "unsupported_media_type",
        ),
        ("POST", "/v1/chat/completions", CHAT, {"Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
        ("POST", "/v1/chat/completions", {**CHAT, "n": "2"}, {}, 400, "invalid_value"),
        ("POST", "/v1/chat/completions", {**CHAT, "seed": 2**70}, {}, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", {**CHAT, "messages": ["hi"]}, {}, 400, "invalid_messages"),
        ("POST", "/v1/chat/completions", {**CHAT, "tools": [{}]}, {}, 400, "invalid_messages"),
        ("POST", "/v1/chat/completions", {**CHAT, "response_format": {"type": "xml"}}, {}, 400, "invalid_value"),
        ("POST", "/v1/chat/completions", {**CHAT, "response_format": BARE_SCHEMA}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"model": "support", "prompt": []}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"model": "support", "prompt": ["a", "b"]}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"model": "support", "prompt": "a", "echo": True}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"model": "support", "prompt": [1, "b"]}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"model": "support", "prompt": [1, True]}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"model": "support", "prompt": [1, 2]}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {**SCORED, "max_tokens": 2}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {**SCORED, "prompt_logprobs": 129}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {**SCORED, "n": 2}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {**SCORED, "stream": True}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"model": "s", "prompt": "a", "logprobs": 1}, {}, 400, "unknown_parameter"),
        ("POST", "/v1/embeddings", {"model": "vectors", "input": ""}, {}, 400, "invalid_value"),
        ("POST", "/v1/embeddings", {"model": "vectors", "input": [[1, 2]]}, {}, 400, "invalid_value"),
        ("POST", "/v1/embeddings", {"model": "support", "input": "a"}, {}, 400, "wrong_route"),
        ("POST", "/v1/embeddings", {**VECTORS, "dimensions": 0}, {}, 400, "invalid_value"),
        ("POST", "/v1/embeddings", {**VECTORS, "input_type": "text"}, {}, 400, "invalid_value"),
        ("POST", "/v1/fine_tuning/jobs", CHAT, {}, 404, "not_found"),
    ],
)  # fmt: skip
def test_refused_in_one_shape(
    server: Running, *, method: str, path: str, body: object, headers: dict[str, str], status: int, code: str | None
) -> None:
    found, answer, head = server.ask(method, path, body, headers=headers)
    assert found == status, answer
    assert "x-request-id: " in head
    if code is None:
        return
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert (answer["error"]["code"], answer["error"]["type"]) == (code, "invalid_request_error")
    assert server.engine.open == 0


def test_a_parameter_that_is_null_is_not_there(server: Running) -> None:
    unused = dict.fromkeys(("audio", "functions", "reasoning_effort", "store"))
    assert server.ask("POST", "/v1/chat/completions", {**CHAT, **unused})[0] == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({**CHAT, "messages": [{"from": "human", "value": "hi"}]}, "messages[0].role"),
        ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "names no image."),
        (b" ", "The body: missing."),
        (b"[" * 65, "The body cannot be read as JSON: it nests deeper than 64."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_words_of_a_request(server: Running, body: object, said: str) -> None:
    status, answer, _ = server.ask("POST", "/v1/chat/completions", body)
    assert (status, said in answer["error"]["message"]) == (400, True), answer


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("best_of", True, "should be a valid integer"), ("best_of", 2, "should be 1."), ("store", 0, "a valid boolean"),
        ("n", True, "should be a valid integer"), ("store", True, "should be false."), ("echo", 0, "a valid boolean"),
        ("parallel_tool_calls", 1, "a valid boolean"), ("parallel_tool_calls", False, "should be true."),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_not_the_one_that_is_taken(
    server: Running, name: str, value: Any, said: str
) -> None:
    status, answer, _ = server.ask("POST", "/v1/chat/completions", {**CHAT, name: value})
    assert (status, said in answer["error"]["message"]) == (400, True), answer


def test_everything_wrong_is_said_at_once(server: Running) -> None:
    asked = {**CHAT, "temperature": 3, "n": 0, "top_p": "x"}
    message = server.ask("POST", "/v1/chat/completions", asked)[1]["error"]["message"]
    assert all(name in message for name in ("temperature", "n:", "top_p"))
    asked = {**CHAT, "temprature": 1, "best_off": 2}
    error = server.ask("POST", "/v1/chat/completions", asked)[1]["error"]
    assert error["param"] == "temprature"
    hints = (
        "temprature: unknown parameter. Did you mean temperature?",
        "best_off: unknown parameter. Did you mean best_of?",
    )
    assert error["message"] == " ".join(hints)


def test_parameters_of_other_models_have_their_way_out(server: Running) -> None:
    message = server.ask("POST", "/v1/chat/completions", {**CHAT, "reasoning_effort": "low"})[1]["error"]["message"]
    assert message == "reasoning_effort: unknown parameter. Models here have no levels of reasoning. Leave it out."


def test_unknown_names_are_compared_with_few_names_of_their_place(server: Running) -> None:
    asked = {**CHAT, "max_token": 9, "response_format": {"type": "text", "json_scheme": 1}, "training_fil": 1}
    message = server.ask("POST", "/v1/chat/completions", asked)[1]["error"]["message"]
    assert "max_token: unknown parameter. Did you mean max_tokens?" in message
    assert "response_format.json_scheme: unknown parameter. Did you mean json_schema?" in message
    assert "training_fil: unknown parameter." in message
    assert "training_file" not in message
    many = {**CHAT, **{f"max_token{i:05} {'x' * 20}": 1 for i in range(20_000)}, "max_token" + "s" * 90_000: 1}
    since = time.monotonic()
    message = server.ask("POST", "/v1/chat/completions", many)[1]["error"]["message"]
    assert message.endswith("and 19991 more")
    assert time.monotonic() - since < 3


def test_a_text_with_braces_in_a_name_is_only_text(server: Running) -> None:
    """Messages are filled in by a library that reads {names}."""
    error = server.ask("POST", "/v1/chat/completions", {**CHAT, "{code}{0}": 1})[1]["error"]
    assert error["message"].startswith("{code}{0}: unknown parameter")


def test_an_error_that_nobody_expected_says_nothing_of_what_was_asked(server: Running) -> None:
    asked = {**CHAT, "messages": [{"role": "user", "content": "FAULT"}]}
    status, answer, _ = server.ask("POST", "/v1/chat/completions", asked)
    server.wait_until_idle()
    [told] = server.answered
    assert status == 500
    assert told.id in answer["error"]["message"]
    assert told.fault.startswith("RuntimeError at fake.py:")
    assert "secret" not in json.dumps(answer) + told.fault


def test_one_line_can_be_told_of_each_request(server: Running) -> None:
    server.ask("POST", "/v1/chat/completions", CHAT)
    server.ask("GET", "/v1/models/nobody")
    server.wait_until_idle()
    first, second = server.answered
    assert (first.method, first.path, first.route, first.status) == (
        "POST", "/v1/chat/completions", "/v1/chat/completions", 200,
    )  # fmt: skip
    assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (4, 2)
    assert (second.route, second.status) == ("/v1/models/{name:path}", 404)


def test_every_parameter_is_on_its_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "http.md").read_text("utf-8")
    taken = {*ChatBody.model_fields, *CompletionBody.model_fields, *ClassifyBody.model_fields}
    for name in taken:
        assert f"`{name}" in page or f'"{name}"' in page, name


def test_every_route_is_described(server: Running) -> None:
    status, described, _ = server.ask("GET", "/openapi.json")
    assert status == 200
    assert set(described["paths"]) == {
        "/v1/models", "/v1/models/{name}", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank",
        "/v1/classify", "/health", "/metrics",
    }  # fmt: skip
    assert described["components"]["schemas"]["ChatBody"]["additionalProperties"] is False


class Queued(FakeEngine):
    """Says nothing, as an engine without a free place."""

    async def read(self, model: str, texts: Sequence[object], **how: object) -> object:
        return [event async for event in self.generate(GenerationRequest(model))]

    async def generate(self, ask: GenerationRequest) -> AsyncGenerator[StreamEvent, None]:
        self.open += 1
        try:
            await asyncio.sleep(60)
            yield Started(1)
        finally:
            self.open -= 1


@pytest.mark.parametrize(
    ("route", "asked"),
    [
        ("chat/completions", {**CHAT, "stream": True}), ("chat/completions", CHAT), ("embeddings", VECTORS),
        ("classify", {"model": "mood", "input": "a"}),
    ],
)  # fmt: skip
def test_a_client_that_goes_away_leaves_the_queue(
    route: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.serve.app.LEFT_CHECK_S", 0.05)
    body = json.dumps(asked).encode()
    head = f"POST /v1/{route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with running(engine=Queued()) as server:
        with socket.create_connection((server.bound.host, server.bound.port)) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            wait_for(lambda: server.engine.open == 1)
        server.wait_until_idle()
        assert [one.status for one in server.answered] == [499]


def test_no_part_of_an_answer_waits_for_a_word_about_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer on a connection that is kept came 40 ms late."""
    made, at_once = http.BoundedConnection.connection_made, list[int]()

    def seen(connection: http.BoundedConnection, transport: asyncio.Transport) -> None:
        made(connection, transport)
        at_once.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(http.BoundedConnection, "connection_made", seen)
    with running() as server:
        assert server.ask("GET", "/v1/models")[0] == 200
    assert at_once
    assert all(at_once)


@pytest.mark.parametrize("prompt", ["", [""]])
def test_an_empty_text_can_be_continued(server: Running, prompt: Any) -> None:
    assert server.ask("POST", "/v1/completions", {"model": "support", "prompt": prompt})[0] == 200
    assert server.engine.asks[-1].prompt == ""
