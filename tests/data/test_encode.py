"""Data files become record batches, the same by any number of processes: problems, errors, nothing left behind."""

import json
import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data.families import bert_like
from fresh import fork_instead_of_spawning
from tiny import CHATML, tiny_tokenizer
from tunesmith.data import encode as encode_module
from tunesmith.data.dataset import RowStore, arrow_path, build
from tunesmith.data.renderer import Renderer
from tunesmith.environment.children import for_child
from tunesmith.errors import DataError, ModelError, TunesmithError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.tasks import TASKS
from tunesmith.types import Problem


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_instead_of_spawning(monkeypatch)  # spawned as for a user: the script below
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


def built(
    path: Path, *, num_proc: int = 1, heard: list[Problem] | None = None, template: str = CHATML, **more: Any
) -> RowStore:
    renderer = Renderer(tiny_tokenizer(template), TASKS["chat"], max_tokens=60, too_long="cut", control_tokens="error")
    files = [DataFile(path=str(path))]
    on_problem = ([] if heard is None else heard).append
    folder = path.parent / f"rows{num_proc}"
    return build(folder, data=Data(num_proc=num_proc), files=files, renderer=renderer, on_problem=on_problem, **more)


def test_problems_come_in_the_order_of_rows_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(chats(40)), "utf-8")
    heard: list[Problem] = []
    store = built(tmp_path / "a.jsonl", heard=heard)
    several = built(tmp_path / "a.jsonl", num_proc=2)
    assert arrow_path(several.folder, several.key).read_bytes() == arrow_path(store.folder, store.key).read_bytes()
    assert (several.summary.errors, several.summary.warnings) == (store.summary.errors, store.summary.warnings)
    errors = [problem for problem in heard if problem.severity == "error"]
    assert {"cut", "ignored_fields"} <= store.summary.warnings.keys()
    assert {"control_token", "no_answer", "bad_json"} <= store.summary.errors.keys()
    assert len(store) + store.skipped == 40
    assert store.skipped == len({problem.source.line for problem in errors})
    assert sorted(store.lines.tolist()) == store.lines.tolist()
    chunks = [(problem.source.line - 1) // 3 for problem in heard if problem.source.line and problem.code == "cut"]
    assert chunks == sorted(chunks)


def test_a_file_that_breaks_off_is_refused_after_the_problems_before(tmp_path: Path) -> None:
    rows = [f"text {i},a" for i in range(30)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join([*rows, ",b", 'x,"open', *rows]), "utf-8")
    renderer = Renderer(
        bert_like(), TASKS["classify"], kind="encoder", max_tokens=12, too_long="cut", control_tokens="error"
    )
    files = [DataFile(path=str(tmp_path / "rows.csv"))]
    for num_proc in (1, 2):
        heard: list[Problem] = []
        data = Data(num_proc=num_proc)
        with pytest.raises(DataError, match=r"rows\.csv:33"):
            build(tmp_path / "rows", data=data, files=files, renderer=renderer, on_problem=heard.append)
        assert [(problem.source.line, problem.code) for problem in heard] == [(32, "empty_text"), (32, "empty")]


def test_a_build_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    """A template that never ends is not waited for."""
    endless = json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "endless"}]})
    (tmp_path / "a.jsonl").write_text("\n".join([*chats(6), *[endless] * 6, *chats(60)]), "utf-8")
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    text = "{% for m in messages %}{% if m.content == 'endless' %}" + loop + "{% endif %}{% endfor %}" + CHATML

    def stop(rows: int, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "a.jsonl", num_proc=2, template=text, progress=stop)
    assert multiprocessing.active_children() == []
    assert list((tmp_path / "rows2").iterdir()) == []


def test_what_a_process_fails_at_is_an_error(tmp_path: Path) -> None:
    deep = (
        "{% macro again() %}{{ again() }}{% endmacro %}{% if messages[0].content[:10] == 'question 9' %}{{ again() }}"
    )
    (tmp_path / "a.jsonl").write_text("\n".join(chats(40)), "utf-8")
    for num_proc in (1, 2):
        with pytest.raises(ModelError, match="more deeply than Python can follow"):
            built(tmp_path / "a.jsonl", num_proc=num_proc, template=deep + "{% endif %}" + CHATML)


def test_a_process_that_is_killed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(chats(60)), "utf-8")

    def kill(rows: int, done: int, total: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(TunesmithError, match=r"a process that encodes rows ended.*data\.num_proc: 1"):
        built(tmp_path / "a.jsonl", num_proc=2, progress=kill)


def test_a_process_that_is_killed_while_it_sends_is_an_error() -> None:
    ours, theirs = multiprocessing.Pipe()
    os.write(theirs.fileno(), struct.pack("!i", 1000) + b"the beginning of a thousand bytes")
    theirs.close()
    with pytest.raises(TunesmithError, match=r"a process that encodes rows ended.*data\.num_proc: 1"):
        encode_module._rows_from(ours)


SCRIPT = """
import pickle, sys, time
from pathlib import Path
from tunesmith.data import encode
from tunesmith.data.dataset import build
from tunesmith.recipe.schema import Data, DataFile

encode.CHUNK_EXAMPLES = 3
renderer = pickle.loads(Path(sys.argv[1], "renderer").read_bytes())
wait = lambda *_: (print("torch" in sys.modules, flush=True), time.sleep(60))
build(Path(sys.argv[1], "rows"), data=Data(num_proc=2), files=[DataFile(path=sys.argv[1] + "/a.jsonl")],
      renderer=renderer, on_problem=lambda _: None, progress=wait)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_a_script_needs_no_main_guard_nor_torch_and_processes_end_with_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(chats(60)), "utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, "utf-8")
    renderer = Renderer(tiny_tokenizer(), TASKS["chat"], max_tokens=60, too_long="cut", control_tokens="error")
    (tmp_path / "renderer").write_bytes(pickle.dumps(renderer))
    words = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    with subprocess.Popen(words, env=for_child(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "False\n"
        listed = Path(f"/proc/{process.pid}/task")
        children = [int(pid) for path in listed.glob("*/children") for pid in path.read_text().split()]
        assert sum(blocks_interrupts(pid) for pid in children) == 2  # Ctrl-C is for the process that began them
        process.kill()
    until = time.monotonic() + 60
    while any(is_there(pid) for pid in children):
        assert time.monotonic() < until
        time.sleep(0.05)


def is_there(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text() and os.kill(pid, 0) is None
    except (ProcessLookupError, FileNotFoundError):
        return False


def blocks_interrupts(pid: int) -> bool:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigBlk"], 16) >> (signal.SIGINT - 1) & 1)
