"""The engine: a child process that holds the models, its limits, its end and its next life."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

import fresh
from serve.engines import OPTIONS, Asked, engine_over, heard, says, two_runs, until
from tiny_tasks import encoder_folder
from tunesmith.errors import InputError
from tunesmith.generation import padded
from tunesmith.generation.padded import GeneratedAnswer
from tunesmith.inference import load as loading
from tunesmith.models.forward import hidden_at_targets
from tunesmith.runs.folder import Run
from tunesmith.serve import engine, served_model
from tunesmith.serve.protocol import (
    Delta,
    Finished,
    GenerationRequest,
    ModelCard,
    RequestError,
    Started,
    pack,
    unpack,
)
from tunesmith.serve.registry import open_registry
from tunesmith.serve.worker import Worker
from tunesmith.types import Part

QUESTIONS = ("What is the tallest mountain?", "hello", "the quick brown fox jumps over a lazy dog please")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    two_runs(folder)
    return folder / "runs"


@pytest.fixture(scope="module")
def asked(root: Path) -> Iterator[Asked]:
    with engine_over(["first", "second"], root) as made:
        yield made


def offline(root: Path, model: str, text: str, tokens: int) -> GeneratedAnswer:
    """What `tunesmith predict` would answer."""
    if model == "model-llama":
        speaker = loading.load_model(str(root.parent / model), offline=True)
    else:
        speaker = loading.load_run(Run.open(model, root), offline=True)
    prompt = speaker.renderer.prompt_ids([Part("user", text, trained=False)])
    return padded.generate(speaker.model, speaker.renderer, [prompt], tokens)[0]


def test_runs_and_their_base_are_served(asked: Asked) -> None:
    served = {one.name: one for one in asked.engine.served}
    assert list(served) == ["first", "second", "model-llama"]
    assert [one.is_base for one in served.values()] == [False, False, True]
    assert {one.answers for one in served.values()} == {"text"}
    assert {one.task for one in served.values()} == {"chat"}
    assert all(one.max_tokens == 512 and one.created > 1e9 for one in served.values())


def test_greedy_answers_at_once_are_those_of_generation(asked: Asked, root: Path) -> None:
    models = ("first", "second", "model-llama")
    cases = [(model, text, tokens) for model in models for text in QUESTIONS for tokens in (3, 12)]

    async def all_at_once() -> list[Any]:
        asks = [says(model, text, max_tokens=tokens) for model, text, tokens in cases]
        gate = asyncio.Semaphore(8)  # as many as may wait

        async def one(ask: GenerationRequest) -> Any:
            async with gate:
                return await heard(asked.engine.generate(ask))

        return await asyncio.gather(*map(one, asks))

    found = asked.run(all_at_once())
    answers = [offline(root, *case) for case in cases]
    assert [one.answer() for one in found] == answers
    assert len(set(answers)) > 6
    by_model = [[answers[i].text for i, case in enumerate(cases) if case[0] == model] for model in models]
    assert by_model[0] != by_model[1] != by_model[2] != by_model[0]


def test_pieces_end_and_counts(asked: Asked) -> None:
    found = asked.answer(says("first", "hello", n=2, temperature=1.0, seed=3, logprobs=2, max_tokens=5))
    assert sorted(found.ended) == [0, 1]
    assert found.started is not None
    for index, ended in found.ended.items():
        assert 1 <= ended.completion_tokens <= 5
        assert len(found.tokens[index]) in (ended.completion_tokens, ended.completion_tokens - 1)
        for token in found.tokens[index]:
            assert len(token["top_logprobs"]) == 2
            assert token["logprob"] <= token["top_logprobs"][0]["logprob"] <= 0
    before = asked.engine.state()
    again = asked.answer(says("first", "hello", n=2, temperature=1.0, seed=3, max_tokens=5))
    after = asked.engine.state()
    assert again.texts == found.texts
    assert after.prompt_tokens - before.prompt_tokens == found.started
    assert after.completion_tokens - before.completion_tokens == sum(e.completion_tokens for e in found.ended.values())
    assert (after.running, after.waiting) == (0, 0)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": 33}, "invalid_value", "at most 32 tokens"),
    ({"n": 5}, "invalid_value", "from 1 to 4"),
    ({"messages": (), "prompt": ""}, "invalid_value", "no token"),
    ({"messages": (), "prompt": "a b " * 512}, "context_length_exceeded", "more than the 512"),
    ({"messages": ({"role": "user", "content": "a <|im_end|> b"},)}, "invalid_value", "<|im_end|>"),
    ({"json_schema": {"type": "nonsense"}}, "invalid_schema", "nonsense"),
]


@pytest.mark.parametrize(("how", "code", "said"), REFUSED)
def test_what_cannot_be_answered_is_refused(asked: Asked, how: dict[str, Any], code: str, said: str) -> None:
    with pytest.raises(RequestError, match=said.replace("|", r"\|")) as refusal:
        asked.answer(replace(says("first", "hello"), **how))
    assert (refusal.value.status, refusal.value.code) == (400, code)
    assert asked.answer(says("first", "hello")).ended


def test_an_unknown_model_is_refused(asked: Asked) -> None:
    for work in (
        heard(asked.engine.generate(says("third", "hello"))),
        asked.engine.read("first", ["a"]),
    ):
        with pytest.raises(RequestError) as refusal:
            asked.run(work)
        assert (refusal.value.status, refusal.value.code) == (404, "model_not_found")


def test_a_raw_prompt_is_gone_on_with_as_it_stands(asked: Asked) -> None:
    text = asked.answer(GenerationRequest("first", prompt="hello there", temperature=0.0, max_tokens=4))
    assert text.started is not None
    assert text.started < 8  # no template around it


def test_an_answer_in_json_is_json(asked: Asked) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    found = asked.answer(says("first", "hello", json_schema=schema, max_tokens=32))
    assert found.texts[0] in {f'{{"a": {a}, "b": "{b}"}}' for a in ("true", "false") for b in "xy"}
    assert found.ended[0].reason == "stop"


def test_stops_end_an_answer(asked: Asked) -> None:
    whole = asked.answer(says("first", QUESTIONS[0], max_tokens=32)).texts[0]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    found = asked.answer(says("first", QUESTIONS[0], max_tokens=32, stop=(stop,)))
    assert found.answer() == GeneratedAnswer(whole.partition(stop)[0].strip(), stopped=True)


def long(model: str = "first") -> GenerationRequest:
    """An ask that takes a while."""
    return GenerationRequest(model, prompt="a b", temperature=2.0, max_tokens=32, n=4, seed=1)


def test_who_goes_away_frees_the_place_at_once(asked: Asked) -> None:
    async def scene() -> None:
        for _ in range(10):
            told = asked.engine.generate(long())
            await told.__anext__()
            await told.aclose()
        assert asked.engine.state().running == 0
        await heard(asked.engine.generate(long()))

    asked.run(scene())


def test_answers_go_on_while_a_huge_prompt_is_read(asked: Asked) -> None:
    """A megabyte of text takes its tokenizer as long as many steps of a model take."""

    async def scene() -> int:
        num = 0
        told = asked.engine.generate(GenerationRequest("first", prompt="a b", temperature=2.0, max_tokens=32, seed=1))
        assert await told.__anext__()
        refusing = asyncio.ensure_future(heard(asked.engine.generate(says("first", "x" * 900_000))))
        async for _ in told:
            num += not refusing.done()
        with pytest.raises(RequestError, match="more than the 512"):
            await refusing
        return num

    assert asked.run(scene()) > 10  # of 32: with one thread for both there would be two or three


def test_who_goes_away_before_the_prompt_is_read_is_forgotten(asked: Asked) -> None:
    async def scene() -> None:
        huge = asyncio.ensure_future(heard(asked.engine.generate(says("first", "x" * 900_000))))
        waiting = asyncio.ensure_future(heard(asked.engine.generate(long())))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(RequestError):
            await huge
        await heard(asked.engine.generate(says("first", "hello")))
        assert (asked.engine.state().running, asked.engine.state().waiting) == (0, 0)

    before = asked.engine.state().completion_tokens
    asked.run(scene())
    assert asked.engine.state().completion_tokens - before <= 12, "nothing of the one that went away was written"


def test_reading_ends_after_the_batch_in_which_the_client_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, texts = encoder_folder(tmp_path / "encoder"), ["red apple " * 20] * 300
    sent: list[Any] = []
    read: list[Any] = []
    wanted = {0, 1}

    def counted(model: Any, batch: Any) -> Any:
        read.append(batch)
        if len(read) == 2:
            wanted.discard(1)
        return hidden_at_targets(model, batch)

    monkeypatch.setattr(served_model, "hidden_at_targets", counted)
    registry = open_registry([str(folder)], root=Path("runs"), options=OPTIONS, note=lambda text: None)
    worker = Worker(registry, OPTIONS, SimpleQueue(), sent.append, wanted, limit=1 << 40)
    worker.take(0, "read", "encoder", texts, {})
    assert len(read) > 3
    read.clear()
    wanted.add(1)
    worker.take(1, "read", "encoder", texts, {})
    assert len(read) == 2
    worker.take(1, "read", "encoder", texts, {})  # cancelled before it is taken
    assert len(read) == 2
    assert [type(answer) for [(_, answer)] in sent] == [tuple, RequestError, RequestError]
    assert wanted == set()


def test_a_full_queue_is_said(asked: Asked) -> None:
    async def scene() -> list[Any]:
        return await asyncio.gather(*(heard(asked.engine.generate(long())) for _ in range(12)), return_exceptions=True)

    found = asked.run(scene())
    refused = [one for one in found if isinstance(one, RequestError)]
    assert len(refused) == 4  # 8 may wait, and none has begun when all are sent
    assert {(one.status, one.code) for one in refused} == {(429, "queue_full")}


def test_a_crash_fails_what_was_under_way_and_the_next_life_answers(asked: Asked) -> None:
    expected = asked.answer(says("second", "hello")).texts
    process = asked.engine._worker.process

    async def scene() -> list[Any]:
        work = [asyncio.ensure_future(heard(asked.engine.generate(long()))) for _ in range(3)]
        await until(lambda: asked.engine.state().running > 0)
        os.kill(process.pid, signal.SIGKILL)
        return await asyncio.gather(*work, return_exceptions=True)

    found = asked.run(scene())
    assert all(isinstance(one, RequestError) for one in found)
    assert (found[0].status, found[0].code) == (500, "engine_crashed")
    assert "SIGKILL" in str(found[0])
    assert {one.status for one in found[1:]} <= {500, 503}  # 503: it had not begun
    with pytest.raises(RequestError) as refusal:
        asked.answer(says("second", "hello"))
    assert (refusal.value.status, refusal.value.code) == (503, "engine_unavailable")
    asked.run(until(lambda: asked.engine.state().alive))
    assert asked.answer(says("second", "hello")).texts == expected
    assert asked.engine.state().restarts == 1


MESSAGES = (
    "a note",
    (3, "answer", GenerationRequest("m", [{"role": "user", "content": "a\nb"}], tools=[{"": ["Path", "x"]}])),
    (3, "attach", "ft:m", "runs/one"),
    (3, "read", "m", ["a", "b"], {"dimensions": None, "is_query": True}),
    ((3, Delta(0, "a", [{"token": "a", "logprob": -0.5, "bytes": [97]}])), (4, Finished(0, "stop", 2))),
    ((3, [{"label": "tuple", "scores": [0.25]}]), (4, None), (5, Started(7))),
    (ModelCard("m", "chat", "text", 64, True, 0),),
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: str(message)[:30])
def test_a_message_is_read_as_it_was_sent(message: Any) -> None:
    content = pack(message)
    assert content.find(b"\n") == len(content) - 1
    read = unpack(content)
    assert repr(read).replace("[]", "()") == repr(message).replace("[]", "()")


def test_an_error_is_read_as_it_was_sent() -> None:
    sent = RequestError("no", status=429, code="queue_full", param="n", headers={"retry-after": "1"})
    found = unpack(pack(((1, sent), (2, InputError("bad")))))
    assert (str(found[0][1]), vars(found[0][1])) == ("no", vars(sent))
    assert (type(found[1][1]), str(found[1][1])) == (InputError, "bad")


async def worker_that(code: str, python: str = sys.executable) -> engine.WorkerProcess:
    words = [python, "-c", f"import sys; from tunesmith.serve.protocol import pack; {code}"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, stderr=pipe)
    return engine.WorkerProcess(process)


def test_the_end_of_a_worker_has_a_reason() -> None:
    async def scene() -> str:
        worker = await worker_that("sys.stdout.buffer.write(pack(5)); sys.exit('no more')")
        assert (await worker.receive(), await worker.receive()) == (5, None)
        return await asyncio.wait_for(worker.ended(), 60)

    assert asyncio.run(scene()) == "exit code 1: no more"


def test_a_worker_that_sends_what_cannot_be_read_is_started_again() -> None:
    notes: list[str] = []
    made = engine.WorkerEngine([], root=Path(), options=OPTIONS, on_note=notes.append)
    made._new_worker = lambda: worker_that("sys.stdin.read()")  # type: ignore[method-assign]

    async def scene() -> None:
        made._worker = await worker_that("sys.stdout.buffer.write(pack(5)); sys.stdout.flush(); sys.stdin.read()")
        made._supervisor = asyncio.create_task(made._supervise())
        await until(lambda: made.state().restarts == 1 and made.state().alive)
        await made.close(0.0)

    asyncio.run(scene())
    assert "a message of the engine cannot be read: TypeError" in notes[0]
    assert "exit code 0" in notes[1]


BEATS = """import time
while True:
    sys.stdout.buffer.write(pack(()))
    sys.stdout.flush()
    time.sleep(0.02)
"""


# trap: S27
def test_an_engine_without_a_sign_of_life_is_down_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LATE_S", 0.3)
    monkeypatch.setattr(engine, "SILENT_S", 1.0)
    monkeypatch.setattr(engine, "END_TIMEOUT_S", 0.1)  # what only beats does not see that its input has ended
    notes: list[str] = []
    made = engine.WorkerEngine([], root=Path(), options=OPTIONS, on_note=notes.append)
    made._new_worker = lambda: worker_that(BEATS)  # type: ignore[method-assign]

    async def scene() -> None:
        made._worker = await worker_that(BEATS)
        made._supervisor = asyncio.create_task(made._supervise())
        await asyncio.sleep(1.2)  # longer than any silence that is allowed
        assert made.state().alive
        assert made.state().restarts == 0
        call = engine._Call(1, has_started=True)
        made._calls[0] = call
        os.kill(made._worker.process.pid, signal.SIGSTOP)  # frozen; it closes nothing
        await until(lambda: not made.state().alive, seconds=0.9)
        assert made._worker.is_alive
        await until(lambda: made.state().restarts == 1 and made.state().alive, seconds=20)
        assert call.events.get_nowait().status == 500
        await made.close(0.0)

    asyncio.run(scene())
    assert notes == ["the engine ended (ended by SIGKILL after 1 s without a sign of life) and is started again"]


def test_a_server_that_only_waits_for_its_engine_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug."""
    monkeypatch.setattr(engine, "SILENT_S", 0.2)
    monkeypatch.setattr(engine.WorkerProcess, "next", engine.WorkerProcess.receive)
    made = engine.WorkerEngine([], root=Path(), options=OPTIONS)

    async def scene() -> None:
        made._worker = await worker_that("sys.stdin.read()")  # it says nothing
        made._supervisor = asyncio.create_task(made._supervise())
        with pytest.raises(AssertionError):
            await until(lambda: made.state().restarts == 1, seconds=0.6)
        await made.close(0.0)

    asyncio.run(scene())


def test_a_server_that_was_stopped_itself_ends_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SILENT_S", 0.6)

    async def scene() -> None:
        worker = await worker_that(BEATS)
        assert await worker.next() == ()
        for _ in range(2):
            time.sleep(0.8)  # as SIGSTOP or a machine that sleeps: its timers are over before it reads
            assert await worker.next() == ()
        worker.process.kill()
        await worker.process.wait()

    asyncio.run(scene())


def test_an_engine_that_is_stuck_in_one_operation_ends_itself() -> None:
    """Its server may be killed: nothing else would end it."""
    stuck = """
import threading, time
from tunesmith.serve import worker
worker.STUCK_S, worker.BEAT_S = 1.0, 0.1
threading.Thread(target=worker._beat, args=(print,), daemon=True).start()
time.sleep(1.5)  # well: it lives longer than STUCK_S
print("well", flush=True)
7 ** 9 ** 8  # minutes in C, with Python's lock
"""
    process = fresh.Process("-c", stuck)
    said, errors = process.communicate()
    assert "well" in said
    assert (process.returncode, "Timeout" in errors) == (1, True)


def test_whatever_a_crash_interrupts_gets_500_and_what_waits_503() -> None:
    made = engine.WorkerEngine([], root=Path(), options=OPTIONS)
    waiting, started, reading = calls = engine._Call(1), engine._Call(1, has_started=True), engine._Call()
    made._calls = dict(enumerate(calls))
    made._fail_all("it ended", status=500, code="engine_crashed")
    assert [call.events.get_nowait().status for call in (waiting, started, reading)] == [503, 500, 500]


def test_closing_finishes_what_is_under_way(root: Path) -> None:
    with engine_over(["first"], root) as asked:
        pid = asked.engine._worker.process.pid

        async def closing() -> Any:
            work = asyncio.ensure_future(heard(asked.engine.generate(long())))
            await until(lambda: asked.engine.state().running > 0)
            closing = asyncio.ensure_future(asked.engine.close(60.0))
            await asyncio.sleep(0)
            with pytest.raises(RequestError) as refusal:
                await heard(asked.engine.generate(long()))
            assert (refusal.value.status, refusal.value.code) == (503, "shutting_down")
            await closing
            return await work

        assert len(asked.run(closing()).ended) == 4
        assert not Path(f"/proc/{pid}").exists()


def test_a_child_over_its_memory_is_ended_before_it_is_ready(root: Path) -> None:
    with pytest.raises(Exception, match=r"it held \d+ MiB of memory, more than the 100 it may"):
        Asked(["first"], root, replace(OPTIONS, memory_limit_bytes=100 * 1024**2))


def test_a_child_that_loads_ends_when_its_input_does() -> None:
    slow = "def load(*a, **k): print('loads', file=sys.stderr, flush=True); time.sleep(300)"
    code = f"import sys, time\nfrom tunesmith.serve import worker\n{slow}\nworker.open_registry = load\nworker.main()"

    async def scene() -> int:
        pipe = asyncio.subprocess.PIPE
        words = (str(fresh.python()), "-c", code)
        child = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, stderr=pipe)
        assert child.stdin is not None
        assert child.stderr is not None
        child.stdin.write(pack(([], ".", OPTIONS, {})))
        while await child.stderr.readline() != b"loads\n":
            pass
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(child.wait(), 0.3)
        child.stdin.close()
        return await asyncio.wait_for(child.wait(), 10)

    assert asyncio.run(scene()) == 0


def test_a_child_that_cannot_load_says_why() -> None:
    code = """
import runpy, tunesmith.serve.registry as registry
def load(*args, **how):
    raise RuntimeError("no room for it")
registry.open_registry = load
runpy.run_module("tunesmith.serve.worker", run_name="__main__")
"""

    async def scene() -> str:
        worker = await worker_that(code, str(fresh.python()))
        worker.send(([], ".", OPTIONS, {}))
        assert await worker.receive() is None
        return await worker.ended()

    assert asyncio.run(scene()) == "exit code 1: RuntimeError: no room for it"


def test_the_child_ends_with_its_parent_which_holds_no_torch(root: Path) -> None:
    code = f"""
import asyncio, os, pathlib, sys
from tunesmith.serve import engine as module
from tunesmith.serve.protocol import EngineOptions
module.python_words = lambda module: [{str(fresh.python())!r}, "-m", module]
async def main():
    options = EngineOptions(offline=True, threads=1)
    engine = module.WorkerEngine(["first"], root=pathlib.Path({str(root)!r}), options=options)
    await engine.start()
    heavy = [name for name in ("torch", "transformers", "numpy") if name in sys.modules]
    print(engine._worker.process.pid, *heavy, flush=True)
    os._exit(1)
asyncio.run(main())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    pid = int(done.stdout)

    def is_gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    asyncio.run(until(is_gone, seconds=10))


def test_an_engine_ends_though_a_message_swallows_its_first_cancellation() -> None:
    """As `asyncio.wait_for` does before Python 3.12, where its answer comes at the same moment."""

    class Busy:
        is_alive, has_swallowed = True, False

        async def next(self) -> list[object]:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if self.has_swallowed:
                    raise
                self.has_swallowed = True
            return []

        async def end(self) -> None: ...

    async def scene() -> None:
        ending = engine.WorkerEngine([], root=Path(), options=OPTIONS)
        ending._worker = Busy()  # type: ignore[assignment]
        ending._supervisor = asyncio.create_task(ending._supervise())
        await asyncio.sleep(0)
        closing = asyncio.create_task(ending.close(0))
        done, _ = await asyncio.wait((closing,), timeout=3)
        assert done, "the engine never ends"

    asyncio.run(scene())
