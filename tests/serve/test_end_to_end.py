"""A run is trained, `tunesmith serve` is a process with a real model in its child, and the openai package asks it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.request import urlopen

import numpy as np
import openai
import pytest

import fresh
from serve.running import wait_for
from tiny_run import tiny_recipe
from tunesmith.generation import padded
from tunesmith.inference.load import load_base, load_run
from tunesmith.models.fused_loss import find_output_layer
from tunesmith.recipe.distillation import Distil
from tunesmith.runs.folder import Run
from tunesmith.training.local_teacher import LocalTeacher
from tunesmith.training.served_teacher import ServedTeacher
from tunesmith.training.trainer import train
from tunesmith.types import Part, Row, Source

QUESTIONS = ("the quick brown fox", "what is tallest", "hello", "a lazy dog on Earth please jumps over yes")
NUM_TOKENS = 12


@dataclass
class Live:
    """The process, where it is asked, and the run that it serves."""

    popen: fresh.Process
    url: str
    run: Run

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def ask(self, text: str, **how: object) -> openai.types.chat.ChatCompletion:
        asked = {"model": self.run.path.name, "temperature": 0, "max_tokens": NUM_TOKENS, **how}
        return self.client.chat.completions.create(messages=[{"role": "user", "content": text}], **asked)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("served")
    recipe = tiny_recipe(folder, train={"epochs": 1}, data={"max_tokens": 256, "too_long": "error"})
    return train(recipe, root=folder / "runs", out=folder / "runs" / "support", offline=True)


@pytest.fixture(scope="module")
def live(run: Run) -> Iterator[Live]:
    words = ["-m", "tunesmith", "serve", str(run.path), "--port", "0", "--quiet", "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FRESH_PYTHON": str(fresh.python())}
    popen = fresh.Process(*words, env=environment)
    assert popen.stdout is not None
    url = popen.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:"), "it did not start"
    yield Live(popen, url, run)
    if popen.poll() is None:
        popen.send_signal(signal.SIGKILL)
        popen.wait()


def offline_answers(run: Run) -> tuple[list[str], list[str]]:
    """What `tunesmith chat` says to the questions, tuned and untouched, without a server."""
    found = []
    for speaker in (load_run(run, offline=True), load_base(run, offline=True)):
        parts = [[Part("user", text, trained=False)] for text in QUESTIONS]
        prompts = [speaker.renderer.prompt_ids(part) for part in parts]
        given = [padded.generate(speaker.model, speaker.renderer, [prompt], NUM_TOKENS) for prompt in prompts]
        found.append([one.text for [one] in given])
    return found[0], found[1]


def test_answers_are_those_without_a_server(live: Live, run: Run) -> None:
    tuned, base = offline_answers(run)
    assert tuned != base, "a run that changes nothing would prove nothing"
    names = [model.id for model in live.client.models.list()]
    assert names[0] == run.path.name
    answers: dict[tuple[str, str], str] = {}

    def ask(name: str, text: str) -> None:
        answers[name, text] = str(live.ask(text, model=name).choices[0].message.content)

    asking = [threading.Thread(target=ask, args=(name, text)) for name in names for text in QUESTIONS]
    for thread in asking:  # all at once, so that tuned and untouched share a batch
        thread.start()
    for thread in asking:
        thread.join()
    assert [answers[names[0], text] for text in QUESTIONS] == tuned
    assert [answers[names[1], text] for text in QUESTIONS] == base


def test_every_way_of_asking(live: Live, run: Run) -> None:
    text, name, client = QUESTIONS[0], run.path.name, live.client
    whole = live.ask(text, logprobs=True, top_logprobs=3)
    said = str(whole.choices[0].message.content)
    stream = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=NUM_TOKENS, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
    assert last.usage == whole.usage
    listed = whole.choices[0].logprobs.content or []
    assert len(listed) == whole.usage.completion_tokens
    assert all(one.logprob == one.top_logprobs[0].logprob for one in listed), "greedy takes the likeliest"
    drawn = [live.ask(text, temperature=1, seed=5, n=2) for _ in range(2)]
    first, second = ([choice.message.content for choice in one.choices] for one in drawn)
    assert first == second
    assert first[0] != first[1]
    middle = said[len(said) // 2]
    stopped = live.ask(text, stop=[middle]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (said[: said.index(middle)].strip(), "stop")
    gone_on = client.completions.create(model=name, prompt="the quick", temperature=0, max_tokens=5)
    assert gone_on.usage.completion_tokens == 5


def test_what_it_says_of_prompts_teaches_as_the_run_itself(live: Live) -> None:
    """Two Tunesmiths: one serves the teacher of the other."""
    name, loaded = live.run.path.name, load_run(live.run, offline=True)
    tokenizer = loaded.renderer.tokenizer
    options = Distil(teacher=f"{live.url}/v1", model=name, top=9)
    rows = [
        Row(np.arange(20 + start, 20 + start + num, dtype=np.int32), np.arange(num) >= 3, Source("rows", start))
        for start, num in ((1, 9), (2, 40), (3, 300))  # the last one is read in two parts
    ]
    here = LocalTeacher(options, tokenizer, {}, "cpu", loaded, find_output_layer(loaded.model))
    lists, asked = dict(here.lists(rows)), dict(ServedTeacher(options, tokenizer).lists(rows))
    for i in range(len(rows)):
        assert (lists[i][:, :9] == asked[i][:, :9]).all()
        np.testing.assert_allclose(asked[i][:, 9:], lists[i][:, 9:], atol=2e-5)
    whole = live.client.completions.create(
        model=name, prompt="the quick", temperature=0, max_tokens=1, extra_body={"prompt_logprobs": 2}
    )
    ids = tokenizer("the quick").input_ids
    [choice] = whole.model_dump()["choices"]
    assert choice["prompt_logprobs"][0] is None
    assert all(str(token) in entry for token, entry in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True))
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(ids)


def test_what_is_under_way_is_answered_after_sigterm(live: Live) -> None:
    """The last test here: the process has ended."""
    answered: list[int] = []

    def ask() -> None:
        usage = live.ask(QUESTIONS[0], max_tokens=400, temperature=2, seed=1).usage
        answered.append(usage.completion_tokens if usage is not None else 0)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: answered or '"running":1' in urlopen(f"{live.url}/health").read().decode())
    live.popen.send_signal(signal.SIGTERM)
    assert live.popen.wait(timeout=30) == 0
    asking.join()
    assert len(answered) == 1
