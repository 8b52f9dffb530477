"""The verb: what is said at the start, for each request and at the end, and what is refused before all of it."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import openai
import pytest
from rich.console import Console
from typer.testing import CliRunner

from serve.fake import MODELS
from tunesmith.cli.app import app
from tunesmith.cli.serve import ServerOutput
from tunesmith.errors import InputError
from tunesmith.serve.http import bind
from tunesmith.serve.protocol import ModelCard
from tunesmith.serve.request_schemas import RerankBody

FAKE = Path(__file__).with_name("fake_verb.py")
PATHS = os.pathsep.join([str(FAKE.parents[1]), str(FAKE.parents[2] / "src")])
KEY = "k-0123456789abcdef-0123456789abcdef"


class Process:
    """`tunesmith serve`, its lines as they come, and its address."""

    def __init__(self, *words: str, **environment: str) -> None:
        command = [sys.executable, str(FAKE), "serve", *words]
        self.popen = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": PATHS, **environment},
        )
        self.lines: list[str] = []

    def until(self, pattern: str) -> re.Match[str]:
        while line := self.popen.stdout.readline():
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        pytest.fail(f"it ended without {pattern}:\n{''.join(self.lines)}")

    def end(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        return self.rest()

    def rest(self) -> int:
        self.lines += self.popen.stdout.readlines()
        return self.popen.wait(timeout=20)

    @property
    def said(self) -> str:
        return "".join(self.lines)


@contextmanager
def serving(*words: str, **environment: str) -> Iterator[tuple[Process, str]]:
    process = Process(*words, "--port", "0", **environment)
    try:
        url = process.until(r"(http://127\.0\.0\.1:\d+)")[1]
        yield process, url
    finally:
        process.popen.kill()
        process.popen.wait()


def ask(url: str, text: str = "hello there", key: str = "none") -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    answer = client.chat.completions.create(model="support", messages=[{"role": "user", "content": text}])
    return str(answer.choices[0].message.content)


def test_the_start_says_what_is_served_and_how_to_try_it() -> None:
    with serving("support") as (process, _):
        process.until("  curl ")
        assert "support     chat, tuned, answers with text, 512 tokens at most" in process.said
        assert "owner/base  chat, the untouched base" in process.said
        assert "from this machine only, without a key" in process.said
        [curl] = [line for line in process.lines if line.startswith("  curl ")]
        if shutil.which("curl"):
            answer = subprocess.run([*shlex.split(curl), "-s"], capture_output=True, check=True)
            assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "Hello"
        process.until("Give a temperature")
        assert process.end() == 0
    assert process.said.endswith("ended\n")


def test_the_line_to_try_can_be_copied_at_any_width() -> None:
    bound = bind("127.0.0.1", 0)
    screen = Console(file=io.StringIO(), force_terminal=True, width=60, no_color=True)
    with bound.socket:
        ServerOutput(screen, quiet=False, as_json=False).serving(bound, MODELS, has_key=True)
    said = screen.file.getvalue()  # type: ignore[attr-defined]
    [curl] = [line for line in said.splitlines() if line.startswith("  curl ")]
    assert json.loads(shlex.split(curl)[-1])["messages"]


def test_a_reranker_ranks_and_the_line_to_try_does_so_too() -> None:
    card = ModelCard("order", "rank", "labels", 64, is_base=False, created=1_700_000_002)
    bound = bind("127.0.0.1", 0)
    screen = Console(file=io.StringIO(), width=200, no_color=True)
    with bound.socket:
        ServerOutput(screen, quiet=False, as_json=False).serving(bound, [card], has_key=False)
    said = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "order  rank, tuned, ranks documents, 64 tokens at most" in said
    [curl] = [line for line in said.splitlines() if line.startswith("  curl ")]
    assert "/v1/rerank " in curl
    body = json.loads(shlex.split(curl)[-1])
    assert RerankBody.model_validate(body).model == "order"


# trap: S8


def wrong_lines(told: str) -> list[str]:
    return [line for line in told.splitlines() if "secret" in line or "\x1b" in line]


def log_of(**environment: str) -> str:
    """What is said of a secret that was answered, one that went wrong, and a path with a control character."""
    with serving("support", **environment) as (process, url):
        assert ask(url, "my secret word") == "my secret word"
        with pytest.raises(openai.InternalServerError):
            ask(url, "FAULT secret")
        with pytest.raises(OSError, match="404"):
            urlopen(Request(f"{url}/v1/x%1b%5b2Jy"))
        assert process.end() == 0
    return process.said


def test_a_line_a_request_and_nothing_of_what_was_asked() -> None:
    told = log_of()
    assert re.search(r"^POST /v1/chat/completions 200 \d+ ms, 5 \+ 3 tokens$", told, re.MULTILINE)
    assert re.search(r"^GET /v1/x␛\[2Jy 404 ", told, re.MULTILINE)
    assert re.search(r"^[0-9a-f]{16}: RuntimeError at fake.py:\d+ generate", told, re.MULTILINE)
    assert wrong_lines(told) == []


def test_the_test_sees_what_should_not_be_said() -> None:
    planted = "faults tell what was asked; control characters are written; answers are written"
    wrong = wrong_lines(log_of(PLANTED=planted))
    with pytest.raises(AssertionError):
        assert wrong == []
    for bug in (r"RuntimeError at .*secret", r"^GET .*\x1b", r"^POST .*secret"):
        assert any(re.search(bug, line) for line in wrong), bug


def test_machines_read_json_lines() -> None:
    with serving("support", "--json") as (process, url):
        ask(url)
        assert process.end(signal.SIGINT) == 0
    lines = [json.loads(line) for line in process.lines]
    assert [line["kind"] for line in lines[:3]] == ["note", "note", "serving"]
    [request] = [line for line in lines[3:] if line["kind"] == "request"]
    assert lines[2]["url"] == url
    assert [model["name"] for model in lines[2]["models"]] == ["support", "owner/base", "mood", "vectors"]
    assert (request["status"], request["prompt_tokens"], request["completion_tokens"]) == (200, 4, 2)


def test_a_second_signal_leaves_at_once() -> None:
    with serving("support") as (process, url):
        failed: list[Exception] = []

        def give_up() -> None:
            try:
                ask(url, "SLOW " + "x " * 2000)
            except openai.APIConnectionError as error:
                failed.append(error)

        asking = threading.Thread(target=give_up)
        asking.start()
        while '"running":1' not in urlopen(f"{url}/health").read().decode():
            pass
        process.popen.send_signal(signal.SIGTERM)
        process.until("stopping")
        assert process.end() == -signal.SIGTERM
        asking.join()
    assert len(failed) == 1


def test_with_a_key_nobody_asks_without(tmp_path: Path) -> None:
    """From a file; from the environment: test_security."""
    (tmp_path / "keys").write_text(KEY)
    with serving("support", "--host", "0.0.0.0", "--key-file", str(tmp_path / "keys")) as (process, url):
        with pytest.raises(openai.AuthenticationError):
            ask(url)
        assert ask(url, key=KEY) == "hello there"
        assert process.end() == 0
    assert KEY not in process.said
    assert "from every machine that reaches this address, with a key" in process.said
    assert "$TUNESMITH_API_KEY" in process.said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["support", "--host", "0.0.0.0"], "other machines can reach that address, so it needs an API key"),
        (["support", "--host", "nowhere.invalid"], "nowhere.invalid:0: "),
        (["support", "--key-file", "none.txt"], "none.txt: no key can be read"),
        (["broken"], "broken: its prompts are not those of training"),
        ([], "name a RUN or MODEL to serve"),
        (["--jobs"], "serve: --jobs: name the model that jobs tune, `tunesmith serve --jobs MODEL`"),
        (["support", "--bases", "b.yaml"], "give --jobs too"),
        (["support", "other", "--jobs"], "--jobs takes one MODEL, no run"),
        (["--jobs", "--bases", "none.yaml"], "none.yaml: cannot be read"),
    ],
)
def test_refused_before_anything_is_served(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(engine: object) -> None:
        raise InputError("broken: its prompts are not those of training.")

    monkeypatch.setattr("tunesmith.serve.engine.WorkerEngine.start", start)
    monkeypatch.setattr("tunesmith.cli.serve.refuse_missing", lambda *target, **how: None)  # `broken` is no folder
    assert said in refused(*words, "--port", "0")


def refused(*words: str) -> str:
    """What is said, on one line."""
    result = CliRunner().invoke(app, ["serve", *words])
    assert result.exit_code == 2, result.output
    assert "http://" not in result.output
    return " ".join(result.output.split())


def test_a_port_in_use_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = refused("support", "--port", str(taken.getsockname()[1]))
    assert "ddress already in use" in said
    assert "loading" not in said


def test_what_is_missing_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "tunesmith.serve.http", raising=False)
    monkeypatch.delattr("tunesmith.serve.http", raising=False)
    said = refused("support")
    assert "serve needs the package uvicorn" in said
    assert f"Run {sys.executable} -m pip install 'fastapi>=" in said
