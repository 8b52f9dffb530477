"""Rows encoded by processes are those of one process: rows, problems, counts, errors and the bytes of the store."""

import gc
import json
import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from data import other_processes
from data.families import bert_like
from data.other_processes import Hungry
from data.test_chat_template import is_there, wait_until
from tiny import CHATML, chat, tiny_tokenizer
from tunesmith.data import chat_template
from tunesmith.data import encode as encode_module
from tunesmith.data.dataset import RowStore, arrow_path, build
from tunesmith.data.renderer import Renderer
from tunesmith.environment import for_child, num_cpus
from tunesmith.errors import DataError, ModelError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.tasks import TASKS
from tunesmith.types import Problem

CHATS: dict[str, Any] = {"max_tokens": 60, "too_long": "cut", "control_tokens": "error"}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "CHUNK_EXAMPLES", 3)
    monkeypatch.setattr(encode_module, "BATCH_ROWS", 10)


def chats(num: int) -> list[str]:
    """Rows of all kinds: good ones, some that are cut, with a control token, no JSON, or without an answer."""
    lines = []
    for i in range(num):
        said = "word " * 80 if i % 7 == 3 else "<|im_end|>" if i % 11 == 5 else f"answer {i}"
        messages = [{"role": "user", "content": f"question {i} 山"}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"messages": messages if i % 13 != 6 else messages[:1], "topic": i}))
    lines[num // 2] = "{not JSON"
    return lines


def stores(
    folder: Path, renderer: Renderer, *names: str, num_proc: int = 2
) -> tuple[tuple[RowStore, list[Problem]], tuple[RowStore, list[Problem]]]:
    """By one process, and by several."""

    def made(num: int) -> tuple[RowStore, list[Problem]]:
        heard: list[Problem] = []
        files = [DataFile(path=str(folder / name)) for name in names]
        rows = folder / f"rows{num}"
        return build(rows, data=Data(num_proc=num), files=files, renderer=renderer, on_problem=heard.append), heard

    return made(1), made(num_proc)


def built(folder: Path, renderer: Renderer, to: str = "rows", **more: Any) -> RowStore:
    """`a.jsonl` by two processes."""
    files = [DataFile(path=str(folder / "a.jsonl"))]
    return build(
        folder / to, data=Data(num_proc=2), files=files, renderer=renderer, on_problem=lambda problem: None, **more
    )


def same(folder: Path, renderer: Renderer, *names: str, num_proc: int = 2) -> RowStore:
    (one, heard), (several, also_heard) = stores(folder, renderer, *names, num_proc=num_proc)
    assert also_heard == heard
    assert several.summary == one.summary
    files = [arrow_path(folder / f"rows{num}", one.key).read_bytes() for num in (1, num_proc)]
    assert files[0] == files[1]
    assert one.notes == ()
    return several


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Processes of every pool that was closed."""
    found: dict[int, Any] = {}
    close = encode_module._Pool.close

    def noting(self: Any) -> None:
        found.update({process.pid: process for process, _ in self.workers})
        close(self)

    monkeypatch.setattr(encode_module._Pool, "close", noting)
    return found


def test_chats_are_the_same_and_processes_end_with_the_work(tmp_path: Path, started: dict[int, Any]) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n".join(chats(40)), "utf-8")
    store = same(tmp_path, Renderer(tiny_tokenizer(), TASKS["chat"], **CHATS), "a.jsonl", "b.jsonl")
    assert len(store) > 50
    assert {"cut", "ignored_fields"} <= store.summary.warnings.keys()
    assert {"control_token", "no_answer", "bad_json"} <= store.summary.errors.keys()
    assert store.notes == ("rows are encoded by 2 processes (data.num_proc)",)
    assert len(started) == 2
    assert not any(is_there(pid) for pid in started)


@pytest.mark.slow
def test_labelled_rows_are_the_same(tmp_path: Path) -> None:
    labels = ["late", "early", "never", "always", "some,times"]
    rows = [f'"text {i} of it","{labels[3 * i % 5]}"' for i in range(50)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(rows), "utf-8")
    renderer = Renderer(
        bert_like(), TASKS["classify"], kind="encoder", max_tokens=12, too_long="cut", control_tokens="error"
    )
    store = same(tmp_path, renderer, "rows.csv")
    assert store.vocabulary == ("late", "always", "early", "some,times", "never")


def test_documents_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for i in range(8):
        (tmp_path / "books" / f"{i}.txt").write_text(f"Chapter {i}. " + "The fox jumps over 山. " * 30 * i, "utf-8")
    renderer = Renderer(
        tiny_tokenizer(), TASKS["text"], max_tokens=50, too_long="error", control_tokens="error", stride=20
    )
    assert len(same(tmp_path, renderer, "books")) > 100


def test_a_file_that_breaks_off_says_the_same_where(tmp_path: Path) -> None:
    """The rows before it were heard of first, as when one process reads and encodes in turn."""
    rows = [f"text {i},a" for i in range(30)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join([*rows, 'x,"open', *rows]), "utf-8")
    renderer = Renderer(
        bert_like(), TASKS["classify"], kind="encoder", max_tokens=12, too_long="cut", control_tokens="error"
    )
    found = []
    for num in (1, 2):
        heard: list[Problem] = []
        files = [DataFile(path=str(tmp_path / "rows.csv"))]
        with pytest.raises(DataError, match=r"rows\.csv:32") as caught:
            build(tmp_path / "rows", data=Data(num_proc=num), files=files, renderer=renderer, on_problem=heard.append)
        found.append((str(caught.value), heard))
    assert found[0] == found[1]


@pytest.mark.slow
def test_an_error_comes_back_from_a_process_as_it_is(tmp_path: Path) -> None:
    """A template that exceeds a limit ends the run, also where a process meets it."""
    eats = "{% if 'question 9' in messages[0].content %}{{ 'a' * 3000000000 }}{% endif %}"
    (tmp_path / "a.jsonl").write_text("\n".join(chats(20)), "utf-8")
    renderer = Renderer(tiny_tokenizer(eats + CHATML), TASKS["chat"], **CHATS)
    with pytest.raises(ModelError, match=r"chat template took more than 1,024 MiB of memory\. Give another"):
        built(tmp_path, renderer)
    assert list((tmp_path / "rows").iterdir()) == []


def test_rows_of_a_process_that_dies_are_encoded_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(chats(60)), "utf-8")
    send = encode_module._Pool._send
    sent = []

    def killing(self: Any, number: int, chunk: Any) -> int:
        sent.append(send(self, number, chunk))
        if len(sent) == 8:
            os.kill(self.workers[0][0].pid, signal.SIGKILL)
        return sent[-1]

    monkeypatch.setattr(encode_module._Pool, "_send", killing)
    store = same(tmp_path, Renderer(tiny_tokenizer(), TASKS["chat"], **CHATS), "a.jsonl")
    assert store.notes[1:] == (encode_module.ENDED,)


def test_half_a_result_is_the_end_of_its_process() -> None:
    """A process can be killed in the middle of writing one: nobody waits for the rest."""
    pool = encode_module._Pool(Renderer(tiny_tokenizer(), TASKS["chat"], **CHATS), 0)
    ours, theirs = multiprocessing.Pipe()
    os.write(theirs.fileno(), struct.pack("!i", 10_000_000) + b"half of it")
    theirs.close()
    pool.workers = [(None, ours)]
    read = encode_module._Read([], (), 0)
    assert pool._result(read, 0) == (read, None)
    assert pool.note == encode_module.ENDED


def test_closing_waits_for_no_result_and_ends_processes(tmp_path: Path, started: dict[int, Any]) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(chats(60)), "utf-8")

    def stop(rows: int, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, Renderer(tiny_tokenizer(), TASKS["chat"], **CHATS), progress=stop)
    assert len(started) == 2
    assert not any(is_there(pid) for pid in started)
    assert list((tmp_path / "rows").iterdir()) == []


def test_a_template_that_hangs_in_a_process_ends_it_and_is_named_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "RENDER_S", 0.5)
    hangs = "{% if 'question 9' in messages[0].content %}{{ 9**(9**9) }}{% endif %}"
    (tmp_path / "a.jsonl").write_text("\n".join(chats(20)), "utf-8")
    monkeypatch.setattr(encode_module, "_work", other_processes.work_soon)
    with pytest.raises(ModelError, match=r"chat template did not finish one row, or 64 together, in 0\.5 s"):
        built(tmp_path, Renderer(tiny_tokenizer(hangs + CHATML), TASKS["chat"], **CHATS))


def test_rows_that_a_process_has_no_memory_for_are_encoded_here(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(chats(40)), "utf-8")
    store = same(tmp_path, Hungry(tiny_tokenizer(), TASKS["chat"], **CHATS), "a.jsonl")
    assert store.notes[1:] == ("rows that a process did not encode are encoded by this one: MemoryError:",)


@pytest.mark.parametrize("error", [pickle.PicklingError, OSError])
def test_where_no_process_starts_rows_are_encoded_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """An encoder of the program's main module cannot be pickled; a system can be full of processes."""

    def refuse(self: Any) -> Any:
        raise error("cannot")

    monkeypatch.setattr(Renderer, "__reduce__", refuse)
    (tmp_path / "a.jsonl").write_text("\n".join(chats(40)), "utf-8")
    store = same(tmp_path, Renderer(tiny_tokenizer(), TASKS["chat"], **CHATS), "a.jsonl")
    assert store.notes[1:] == (f"no process starts to encode rows, which one process does: {error.__name__}: cannot",)


def test_the_garbage_collector_is_as_before_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(chats(12)), "utf-8")
    before = gc.get_threshold()
    during = []
    files = [DataFile(path=str(tmp_path / "a.jsonl"))]
    renderer = Renderer(tiny_tokenizer(), TASKS["chat"], **CHATS)
    build(
        tmp_path / "rows",
        data=Data(num_proc=1),
        files=files,
        renderer=renderer,
        on_problem=lambda problem: None,
        progress=lambda *_: during.append(gc.get_threshold()),
    )
    assert {threshold[0] for threshold in during} == {encode_module.COLLECT_AFTER}
    assert gc.get_threshold() == before


SCRIPT = """
import pickle, sys, time
from pathlib import Path
from tunesmith.data import encode
from tunesmith.data.dataset import build
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Part

encode.CHUNK_EXAMPLES = 3
renderer = pickle.loads(Path(sys.argv[1], "renderer").read_bytes())
renderer.prompt_ids([Part("user", "Hi", False)])  # which starts a process that renders
wait = lambda *_: (print("encoding", flush=True), time.sleep(float(sys.argv[2])))
store = build(Path(sys.argv[1], "rows"), data=Data(num_proc=2), files=[DataFile(path=sys.argv[1] + "/a.jsonl")],
              renderer=renderer, on_problem=lambda _: None, progress=wait)
"""


def script(folder: Path, seconds: float) -> subprocess.Popen[str]:
    (folder / "a.jsonl").write_text("\n".join(chats(60)), "utf-8")
    (folder / "script.py").write_text(SCRIPT, "utf-8")
    (folder / "renderer").write_bytes(pickle.dumps(Renderer(tiny_tokenizer(), TASKS["chat"], **CHATS)))
    words = [sys.executable, str(folder / "script.py"), str(folder), str(seconds)]
    return subprocess.Popen(words, env=for_child(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_a_script_needs_no_main_guard_and_processes_end_with_it_however_that_ends(tmp_path: Path) -> None:
    with script(tmp_path, 60) as process:
        assert "encoding\n" in iter(process.stdout.readline, "")
        listed = Path(f"/proc/{process.pid}/task")
        children = [int(pid) for path in listed.glob("*/children") for pid in path.read_text().split()]
        assert len(children) >= 3  # two that encode and one that renders
        process.kill()
    wait_until(lambda: not any(is_there(pid) for pid in children), seconds=60)


def test_a_process_never_imports_torch(tmp_path: Path) -> None:
    """Two hundred megabytes and seconds for nothing."""
    (tmp_path / "renderer").write_bytes(pickle.dumps(Renderer(tiny_tokenizer(), TASKS["chat"], **CHATS)))
    code = (
        "import pickle, sys, tunesmith.data.encode\n"
        f"assert pickle.load(open({str(tmp_path / 'renderer')!r}, 'rb')).stop_ids\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=for_child(), capture_output=True, check=True)
    assert done.stdout.strip() == b"False"


def test_processes_are_started_for_large_files_only() -> None:
    large = encode_module.WORTH_BYTES
    assert encode_module.num_processes(None, num_bytes=large - 1) == 1
    assert encode_module.num_processes(None, num_bytes=large) == min(num_cpus(), encode_module.MOST_PROCESSES)
    assert encode_module.num_processes(5, num_bytes=1) == 5


def test_reading_is_at_most_a_few_chunks_ahead() -> None:
    """What waits is memory."""
    read = []

    def reads() -> Iterator[Any]:
        for i in range(40):
            read.append(i)
            yield encode_module._Read([(0, chat(("user", f"{i}"), ("assistant", "a")))], (), i)

    with closing(encode_module._Pool(Renderer(tiny_tokenizer(), TASKS["chat"], **CHATS), 2)) as pool:
        for i, (found, encoded) in enumerate(pool.in_order(reads())):
            assert (found.done_bytes, encoded is None) == (i, False)
            assert len(read) <= i + 5
    assert len(read) == 40
