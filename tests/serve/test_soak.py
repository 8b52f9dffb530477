"""`tunesmith serve` asked without end, by sixteen clients at once: right answers, no 500, and memory as it was."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.engines import two_runs
from serve.running import wait_for
from serve.soak import CLIENTS, Case, Watch, cases

RUNS, BASE = ("first", "second"), "model-llama"
SOURCE = str(Path(__file__).parents[2] / "src")
CHAT = "/v1/chat/completions"
KINDS = {"answered": 55, "streamed": 15, "completed": 6, "sampled": 4, "cancelled": 8, "malformed": 8, "huge": 4}
"""What clients do, and in a hundred requests how often."""


def asked(**changes: Any) -> bytes:
    return json.dumps({"model": "first", "messages": [{"role": "user", "content": "hello"}], **changes}).encode()


MALFORMED: list[tuple[str, bytes, set[int]]] = [
    (CHAT, b"", {400}),
    (CHAT, b"{", {400}),
    (CHAT, b'{"model": "first", "model": "second"}', {400}),
    (CHAT, b"\xff\xfe", {400}),
    (CHAT, b"[" * 500, {400}),
    (CHAT, asked(messages=[]), {400}),
    (CHAT, asked(messages=[{"role": "user", "content": {"a": 1}}]), {400}),
    (CHAT, asked(messages=[{"role": "nobody", "content": "hello"}]), {400}),
    (CHAT, asked(messages=[{"role": "user", "content": "<|im_end|>"}]), {400}),
    (CHAT, asked(temperature="hot"), {400}),
    (CHAT, asked(max_tokens=-1), {400}),
    (CHAT, asked(nonsense=True), {400}),
    (CHAT, asked(model="../../etc/passwd"), {404}),
    (CHAT, asked(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}), {400}),
    ("/v1/completions", json.dumps({"model": "first", "prompt": [999_999]}).encode(), {400}),
    ("/v1/embeddings", json.dumps({"model": "first", "input": "x"}).encode(), {400}),
    ("/v1/nothing", b"{}", {404}),
]
HUGE: list[tuple[str, bytes, set[int]]] = [
    (CHAT, asked(messages=[{"role": "user", "content": "please " * 600}]), {400}),  # more than the model's window
    (CHAT, asked(messages=[{"role": "user", "content": "x" * 300_000}]), {400}),
    (CHAT, asked(messages=[{"role": "user", "content": "hello"}] * 5_000), {400}),
    (CHAT, asked(user="x" * (3 << 20)), {413}),
    (CHAT, asked(max_tokens=10**9), {400}),
    (CHAT, asked(n=128), {400}),
    ("/v1/completions", json.dumps({"model": "first", "prompt": [5] * 100_000}).encode(), {400}),
]


@dataclass
class Live:
    """A process, where it is asked, and where its lines go."""

    popen: subprocess.Popen[str]
    url: str
    log: Path

    def child(self) -> int:
        children = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text("ascii").split()
        return int(children[-1])

    def health(self) -> Any:
        return httpx.get(f"{self.url}/health").json()["engine"]

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text("utf-8").splitlines()]


@contextmanager
def serving(root: Path, log: Path) -> Iterator[Live]:
    names = [str(root / name) for name in RUNS]
    words = [sys.executable, "-m", "tunesmith", "serve", *names, "--port", "0", "--json", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        popen = subprocess.Popen(words, stdout=out, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        live = Live(popen, "", log)
        wait_for(lambda: popen.poll() is not None or '"kind":"serving"' in log.read_text("utf-8"), timeout_s=600)
        live.url = next(line["url"] for line in live.lines() if line["kind"] == "serving")
        yield live
    finally:
        popen.kill()
        popen.wait()


class Client(threading.Thread):
    """Asks one thing after the other until nothing is left to do."""

    def __init__(self, url: str, known: list[Case], todo: Iterator[int], counts: Counter[str], watch: Watch) -> None:
        super().__init__()
        self._openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=1200)
        self._http = httpx.Client(base_url=url, timeout=1200)
        self._known, self._todo, self._counts, self._watch = known, todo, counts, watch
        self.wrong: list[str] = []

    def warm_up(self) -> None:
        """What takes the most memory for a moment: the allocator keeps it for the next time."""
        for path, body, _ in HUGE:
            self._http.post(path, content=body, headers={"Content-Type": "application/json"})

    def run(self) -> None:
        for number in self._todo:
            draw = random.Random(number)
            [kind] = draw.choices(list(KINDS), weights=list(KINDS.values()))
            try:
                getattr(self, f"_{kind}")(draw.choice(self._known), draw)
            except Exception as error:
                self.wrong.append(f"{kind} ({number}): {type(error).__name__}: {error}")
            self._counts[kind] += 1
            self._watch.look()

    def _create(self, case: Case, **how: Any) -> Any:
        messages = [{"role": "user", "content": case.text}]
        fields = {"model": case.model, "temperature": 0, "max_tokens": case.max_tokens, **how}
        return self._openai.chat.completions.create(messages=messages, **fields)  # type: ignore[call-overload]

    def _answered(self, case: Case, draw: random.Random) -> None:
        choice = self._create(case).choices[0]
        told = (choice.message.content, choice.finish_reason == "stop")
        assert told == (case.answer.text, case.answer.stopped), f"{case}: {told}"

    def _streamed(self, case: Case, draw: random.Random) -> None:
        chunks = list(self._create(case, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == case.answer.text, f"{case}: {text}"

    def _completed(self, case: Case, draw: random.Random) -> None:
        prompt = draw.choice(["the quick", ["red"]])
        made = self._openai.completions.create(model=case.model, prompt=prompt, max_tokens=4, n=2)
        assert len(made.choices) == 2

    def _sampled(self, case: Case, draw: random.Random) -> None:
        num = draw.randint(1, 3)
        assert len(self._create(case, temperature=1, n=num, logprobs=True, top_logprobs=2).choices) == num

    def _cancelled(self, case: Case, draw: random.Random) -> None:
        """Gone in the middle of a stream, or while a whole answer is waited for."""
        if draw.random() < 0.5:
            with self._create(case, max_tokens=200, stream=True) as stream:
                for _, _ in zip(range(draw.randint(0, 4)), stream, strict=False):
                    pass
        else:
            with suppress(openai.APITimeoutError):
                self._create(case, max_tokens=200, timeout=draw.uniform(0.001, 0.1))

    def _malformed(self, case: Case, draw: random.Random) -> None:
        self._refused(*draw.choice(MALFORMED))

    def _huge(self, case: Case, draw: random.Random) -> None:
        self._refused(*draw.choice(HUGE))

    def _refused(self, path: str, body: bytes, statuses: set[int]) -> None:
        answer = self._http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in statuses, f"{body[:80]!r}: {answer.status_code} {answer.text[:200]}"
        assert answer.json()["error"]["message"]


def soak(live: Live, known: list[Case], num: int) -> Counter[str]:
    """How many requests of which kind there were."""
    counts: Counter[str] = Counter()
    todo = iter(range(num))  # next() of it is one step of the interpreter: no number is taken twice
    watch = Watch({"the server": live.popen.pid, "the child": live.child()}, lambda: sum(counts.values()) / num)
    clients = [Client(live.url, known, todo, counts, watch) for _ in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(Client.warm_up, clients))
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    wrong = [line for client in clients for line in client.wrong]
    assert not wrong, f"{len(wrong)} of {num}: " + "\n".join(wrong[:10])
    wait_for(lambda: (live.health()["running"], live.health()["waiting"]) == (0, 0), timeout_s=300)
    assert live.health()["restarts"] == 0
    requests = [line for line in live.lines() if line["kind"] == "request"]
    print(Counter(line["status"] for line in requests))
    assert not [line for line in requests if line["status"] >= 500 or line["fault"]]
    watch.assert_flat()
    return counts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soak")
    two_runs(folder)
    return folder / "runs"


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of processes in /proc")


@needs_proc
@pytest.mark.slow
def test_some_requests(root: Path, tmp_path: Path) -> None:
    known = cases(root, RUNS, BASE, num_texts=9)
    with serving(root, tmp_path / "log") as live:
        assert set(soak(live, known, 150)) == set(KINDS)


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_requests(root: Path, tmp_path: Path) -> None:
    known = cases(root, RUNS, BASE, num_texts=40)
    with serving(root, tmp_path / "log") as live:
        print(soak(live, known, 10_000))
