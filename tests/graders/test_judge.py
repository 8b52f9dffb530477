"""A judge at an address: what is asked, what is read, and what happens where it is busy, down or silent."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tunesmith.errors import InputError
from tunesmith.graders import judge, schema
from tunesmith.graders.grade import Answer, GradeError
from tunesmith.graders.pool import Pool


class Stub(ThreadingHTTPServer):
    """Gives its `replies` in turn, the last one for ever: a text as the judge's message, or (status, headers, body)."""

    daemon_threads = True

    def __init__(self) -> None:
        self.replies: list[Any] = ['{"steps": [], "result": 0.75}']
        self.asked: list[tuple[dict[str, str], dict[str, Any]]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, *words: object) -> None: ...  # the grader did not wait for the answer

    def grader(self, **options: Any) -> schema.ScoreModel:
        return score_model(f"http://127.0.0.1:{self.server_address[1]}/v1", **options)


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((dict(self.headers), {"path": self.path, **body}))
        replies = self.server.replies
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if reply == "silence":
            time.sleep(3)
        if isinstance(reply, str):
            reply = (200, {}, {"choices": [{"message": {"content": reply}}]})
        status, headers, content = reply
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for byte in b" " * 40 if headers.get("X-Drips") else b"":
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)
        self.wfile.write(content.encode() if isinstance(content, str) else json.dumps(content).encode())

    def log_message(self, *words: object) -> None: ...


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def score_model(address: str, **options: Any) -> schema.ScoreModel:
    """As OpenAI's guide has it, with an address."""
    value = {
        "type": "score_model",
        "name": "my_score_model",
        "model": "judge-1",
        "input": [
            {"role": "system", "content": "You are an expert grader."},
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "{{item.reference}} | {{sample.output_text}}"}],
            },
        ],
        "sampling_params": {"max_completions_tokens": 64, "seed": 42},
        "address": address,
        **options,
    }
    found = schema.from_value(value)
    assert isinstance(found, schema.ScoreModel)
    return found


def ask(grader: schema.ScoreModel, waits: list[float] | None = None) -> float:
    sleep = (lambda seconds: None) if waits is None else waits.append
    return judge.ask(grader, Answer("four").as_sample(), {"reference": "4"}, sleep=sleep)


def test_a_judge_is_asked_as_openais_api_has_it(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    assert ask(stub.grader(key_env="JUDGE_KEY")) == 0.75
    [(headers, body)] = stub.asked
    assert headers["Authorization"] == "Bearer sk-1"
    assert body["path"] == "/v1/chat/completions"
    assert [one["content"] for one in body["messages"][:2]] == ["You are an expert grader.", "4 | four"]
    assert {key: body[key] for key in ("model", "temperature", "max_tokens", "seed")} == {
        "model": "judge-1", "temperature": 0.0, "max_tokens": 64, "seed": 42,
    }  # fmt: skip
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["steps", "result"]


@pytest.mark.parametrize(
    ("text", "reward"),
    [('{"result": 9}', 1), ('{"result": -2}', 0), ('```json\n{"steps": ["a"], "result": 0.5}\n```', 0.5)],
)
def test_its_number_is_kept_within_the_range(stub: Stub, text: str, reward: float) -> None:
    stub.replies = [text]
    assert ask(stub.grader()) == reward
    assert ask(stub.grader(range=[0, 10])) == max(0.0, json.loads(text.strip("`json\n"))["result"])


def test_a_busy_judge_is_asked_again_when_it_says(stub: Stub) -> None:
    waits: list[float] = []
    stub.replies = [(429, {"Retry-After": "7"}, ""), (503, {}, ""), '{"result": 1}']
    assert ask(stub.grader(), waits) == 1
    assert waits == [7, 2]


@pytest.mark.parametrize(
    ("reply", "kind", "times"),
    [
        ((429, {}, '{"error": {"message": "slow down"}}'), "unreachable", 3),
        ((429, {"Retry-After": "3600"}, ""), "unreachable", 1),
        ((500, {}, "oops"), "unreachable", 3),
        ((401, {}, '{"error": {"message": "no key"}}'), "unreachable", 1),
        ((200, {}, "not json"), "unreadable", 1),
        ((200, {}, "[" * 100_000), "unreadable", 1),
        ((500, {}, "[" * 100_000), "unreachable", 3),
        ((200, {}, {"choices": []}), "unreadable", 1),
        ("I would say 7 of 10", "unreadable", 1),
        ('{"result": "high"}', "unreadable", 1),
        ('{"result": NaN}', "unreadable", 1),
        ('{"result": true}', "unreadable", 1),
        ((200, {}, {"choices": [{"message": {"refusal": "I cannot.", "content": None}}]}), "refused", 1),
    ],
)
def test_what_is_no_number_is_no_reward(stub: Stub, reply: Any, kind: str, times: int) -> None:
    stub.replies = [reply]
    with pytest.raises(GradeError) as error:
        ask(stub.grader())
    assert (error.value.kind, len(stub.asked)) == (kind, times)


def test_a_judge_that_wants_to_be_left_alone_for_long_is_named(stub: Stub) -> None:
    stub.replies = [(429, {"Retry-After": "3600"}, "")]
    with pytest.raises(GradeError, match="after 1 try; it wants to be left for 3,600 s"):
        ask(stub.grader())


@pytest.mark.parametrize("status", [200, 500])
def test_a_reply_that_drips_ends_with_its_seconds(stub: Stub, status: int) -> None:
    stub.replies = [(status, {"X-Drips": "1"}, {"choices": [{"message": {"content": '{"result": 1}'}}]})]
    begun = time.monotonic()
    with pytest.raises(GradeError) as error:
        ask(stub.grader(seconds=0.3))
    assert (error.value.kind, time.monotonic() - begun < 1) == ("timeout", True)


def test_silence_and_a_closed_door_are_no_reward(stub: Stub) -> None:
    stub.replies = ["silence"]
    with pytest.raises(GradeError) as error:
        ask(stub.grader(seconds=0.3))
    assert error.value.kind == "timeout"
    with pytest.raises(GradeError) as error:
        ask(score_model("http://127.0.0.1:9/v1"))
    assert error.value.kind == "unreachable"


def test_answers_that_are_alike_are_judged_once(stub: Stub) -> None:
    with Pool(stub.grader()) as pool:
        found = [pool.submit(Answer("same"), {"reference": "4"}) for _ in range(5)]
        assert {one.result().reward for one in found} == {0.75}
    assert len(stub.asked) == 1


def test_a_key_that_is_not_there_is_an_error_before_anything_is_asked(stub: Stub) -> None:
    with pytest.raises(InputError, match="NO_SUCH_KEY"):
        Pool(stub.grader(key_env="NO_SUCH_KEY"))
    assert stub.asked == []
