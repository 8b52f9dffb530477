"""Data files become record batches: problems in the order of rows, errors where a file ends, nothing left behind."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.families import bert_like
from tiny import tiny_tokenizer
from tunesmith.data import encode as encode_module
from tunesmith.data.dataset import RowStore, build
from tunesmith.data.renderer import Renderer
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.tasks import TASKS
from tunesmith.types import Problem


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


def built(path: Path, *, heard: list[Problem] | None = None, **more: Any) -> RowStore:
    renderer = Renderer(tiny_tokenizer(), TASKS["chat"], max_tokens=60, too_long="cut", control_tokens="error")
    files = [DataFile(path=str(path))]
    problems = [] if heard is None else heard
    return build(path.parent / "rows", data=Data(), files=files, renderer=renderer, on_problem=problems.append, **more)


def test_problems_come_in_the_order_of_rows_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(chats(40)), "utf-8")
    heard: list[Problem] = []
    store = built(tmp_path / "a.jsonl", heard=heard)
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
    heard: list[Problem] = []
    files = [DataFile(path=str(tmp_path / "rows.csv"))]
    with pytest.raises(DataError, match=r"rows\.csv:33"):
        build(tmp_path / "rows", data=Data(), files=files, renderer=renderer, on_problem=heard.append)
    assert [(problem.source.line, problem.code) for problem in heard] == [(32, "empty_text"), (32, "empty")]


def test_a_build_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(chats(60)), "utf-8")

    def stop(rows: int, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "a.jsonl", progress=stop)
    assert list((tmp_path / "rows").iterdir()) == []
