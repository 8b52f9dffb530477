"""Rows encoded by processes are those of one process: rows, problems, counts, errors and the bytes of the store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from data.families import bert_like
from tiny import chat, tiny_tokenizer
from tunesmith.data import encoders
from tunesmith.data import encoding as encoding_module
from tunesmith.data.chunks import chunk_bytes, chunk_of, encode, encoded_bytes, encoded_of
from tunesmith.data.render import Renderer
from tunesmith.data.store import RowStore, build
from tunesmith.data.store_files import arrow_path
from tunesmith.environment import for_child
from tunesmith.errors import DataError, ModelError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Part, Problem

CHATS: dict[str, Any] = {"max_tokens": 60, "too_long": "cut", "control_tokens": "error"}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_module, "CHUNK_EXAMPLES", 3)
    monkeypatch.setattr(encoding_module, "BATCH_ROWS", 10)


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


def same(folder: Path, renderer: Renderer, *names: str, num_proc: int = 2) -> RowStore:
    (one, heard), (several, also_heard) = stores(folder, renderer, *names, num_proc=num_proc)
    assert also_heard == heard
    assert several.summary == one.summary
    files = [arrow_path(folder / f"rows{num}", one.key).read_bytes() for num in (1, num_proc)]
    assert files[0] == files[1]
    assert one.notes == ()
    return several


def test_chats_are_the_same(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n".join(chats(40)), "utf-8")
    store = same(tmp_path, Renderer(tiny_tokenizer(), "chat", **CHATS), "a.jsonl", "b.jsonl", num_proc=3)
    assert len(store) > 50
    assert {"cut", "ignored_fields"} <= store.summary.warnings.keys()
    assert {"control_token", "no_answer", "bad_json"} <= store.summary.errors.keys()
    assert store.notes == ("rows are encoded by 3 processes (data.num_proc)",)


def test_labelled_rows_are_the_same(tmp_path: Path) -> None:
    labels = ["late", "early", "never", "always", "some,times"]
    rows = [f'"text {i} of it","{labels[3 * i % 5]}"' for i in range(50)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(rows), "utf-8")
    renderer = Renderer(bert_like(), "classify", kind="encoder", max_tokens=12, too_long="cut", control_tokens="error")
    store = same(tmp_path, renderer, "rows.csv")
    assert store.vocabulary == ("late", "always", "early", "some,times", "never")


def test_documents_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for i in range(8):
        (tmp_path / "books" / f"{i}.txt").write_text(f"Chapter {i}. " + "The fox jumps over 山. " * 30 * i, "utf-8")
    renderer = Renderer(tiny_tokenizer(), "text", max_tokens=50, too_long="error", control_tokens="error", stride=20)
    assert len(same(tmp_path, renderer, "books")) > 100


def test_a_file_that_breaks_off_says_the_same_where(tmp_path: Path) -> None:
    """The rows before it were heard of first, as when one process reads and encodes in turn."""
    rows = [f"text {i},a" for i in range(30)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join([*rows, 'x,"open', *rows]), "utf-8")
    renderer = Renderer(bert_like(), "classify", kind="encoder", max_tokens=12, too_long="cut", control_tokens="error")
    found = []
    for num in (1, 2):
        heard: list[Problem] = []
        files = [DataFile(path=str(tmp_path / "rows.csv"))]
        with pytest.raises(DataError, match=r"rows\.csv:32") as caught:
            build(tmp_path / "rows", data=Data(num_proc=num), files=files, renderer=renderer, on_problem=heard.append)
        found.append((str(caught.value), heard))
    assert found[0] == found[1]


def test_an_error_of_the_renderer_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that does not come to an end ends the run, also where a process meets it."""
    monkeypatch.setattr("tunesmith.data.template.RENDER_S", 0.5)
    (tmp_path / "a.jsonl").write_text("\n".join(chats(4)[:3]), "utf-8")
    renderer = Renderer(tiny_tokenizer(), "chat", **CHATS)

    def broken(self: Any, chunk: Any) -> Any:
        raise OSError("gone")

    monkeypatch.setattr(encoders._Process, "encode", broken)
    monkeypatch.setattr(renderer, "encode", lambda *_, **__: (_ for _ in ()).throw(ModelError("does not finish")))
    files = [DataFile(path=str(tmp_path / "a.jsonl"))]
    with pytest.raises(ModelError, match="does not finish"):
        build(tmp_path / "rows", data=Data(num_proc=2), files=files, renderer=renderer, on_problem=lambda problem: None)


def test_rows_of_a_process_that_dies_are_encoded_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(chats(60)), "utf-8")
    begun = encoders._Process.encode
    asked = []

    def killed(self: Any, chunk: Any) -> Any:
        asked.append(self)
        if len(asked) > 4:
            os.kill(self._process.pid, signal.SIGKILL)
        return begun(self, chunk)

    monkeypatch.setattr(encoders._Process, "encode", killed)
    store = same(tmp_path, Renderer(tiny_tokenizer(), "chat", **CHATS), "a.jsonl")
    assert store.notes[1] == "a process that encodes rows ended (code -9): its rows are encoded without it"
    assert len(store.notes) == 3


def test_a_process_that_reads_the_tokenizer_otherwise_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(chats(20)), "utf-8")
    monkeypatch.setattr(encoders, "identity", lambda renderer: "another")
    store = same(tmp_path, Renderer(tiny_tokenizer(), "chat", **CHATS), "a.jsonl")
    assert store.notes[1:] == ("a process that encodes rows reads the saved tokenizer otherwise: its rows are "
                               "encoded without it",) * 2  # fmt: skip


def test_processes_end_with_the_work_and_with_what_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(chats(60)), "utf-8")
    begun: list[subprocess.Popen[bytes]] = []
    make = encoders._Process.__init__

    def noted(self: Any, *given: Any) -> None:
        make(self, *given)
        begun.append(self._process)

    monkeypatch.setattr(encoders._Process, "__init__", noted)
    same(tmp_path, Renderer(tiny_tokenizer(), "chat", **CHATS), "a.jsonl")

    def stop(rows: int, done: int, total: int) -> None:
        raise KeyboardInterrupt

    files = [DataFile(path=str(tmp_path / "a.jsonl"))]
    with pytest.raises(KeyboardInterrupt):
        build(
            tmp_path / "stopped",
            data=Data(num_proc=2),
            files=files,
            renderer=Renderer(tiny_tokenizer(), "chat", **CHATS),
            on_problem=lambda problem: None,
            progress=stop,
        )
    assert len(begun) == 4
    assert all(process.poll() is not None for process in begun)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tunesmith-encoder")]
    assert list((tmp_path / "stopped").iterdir()) == []


def test_a_process_ends_with_the_one_that_began_it() -> None:
    """However that ends: its input is closed then."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith.data.encoder_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=for_child(),
    )
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0


def test_a_process_never_imports_torch() -> None:
    """Two hundred megabytes and seconds for nothing."""
    code = "import sys, tunesmith.data.encoder_process as p; p.PreTrainedTokenizerFast; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=for_child(), capture_output=True, check=True)
    assert done.stdout.strip() == b"False"


def test_examples_and_rows_come_through_as_they_are() -> None:
    deep: Any = 1
    for _ in range(249):  # as deep as rows may be
        deep = [deep]
    turn = ("assistant", "b", {"tool_calls": deep, "number": 2**63, "real": 0.1})
    plain = chat(("user", "a\x00é😀", {"name": "x"}), turn, tools=({"function": {"name": "f"}}, {"name": "g"}))
    chunk = [(2, plain), (0, chat(("user", "q"), ("assistant", "a"), line=7))]
    again = chunk_of(chunk_bytes(chunk))
    assert again == chunk
    assert isinstance(again[0][1].parts[0], Part)
    encoded = encode(Renderer(tiny_tokenizer(), "chat", **CHATS), chunk[1:])
    back = encoded_of(encoded_bytes(encoded))
    assert back.rows.equals(encoded.rows, check_metadata=True)
    assert (back.problems, back.classes, back.many) == (encoded.problems, encoded.classes, encoded.many)
    assert orjson.loads(chunk_bytes([]))["files"] == []


def test_processes_are_begun_for_large_files_only() -> None:
    large = encoders.WORTH_BYTES
    assert encoders.how_many(None, num_bytes=large - 1) == 1
    assert encoders.how_many(None, num_bytes=large) == min(encoders.num_cpus(), encoders.MOST)
    assert encoders.how_many(5, num_bytes=1) == 5


def test_reading_goes_no_further_ahead_than_a_few_chunks(tmp_path: Path) -> None:
    """What waits is memory."""
    read = []

    class Read:
        def __init__(self, i: int) -> None:
            self.chunk = [(0, chat(("user", f"{i}"), ("assistant", "a")))]

    def reads() -> Iterator[Read]:
        for i in range(40):
            read.append(i)
            yield Read(i)

    renderer = Renderer(tiny_tokenizer(), "chat", **CHATS)
    for i, _ in enumerate(encoders.encode_all(reads(), renderer, num_proc=2, on_note=lambda note: None)):
        assert len(read) <= i + 6
        time.sleep(0.001)
    assert len(read) == 40
