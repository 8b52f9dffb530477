"""`python -m benchmarks.data`: every row is another, encoded once and then found."""

import itertools
import json
from pathlib import Path

import pytest
from benchmarks.data import encode, mix_rows, write_rows

from tiny_run import model_folder


def test_rows_are_encoded_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "rows.jsonl", 40)
    lines = (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()
    assert len(set(lines)) == 40
    model = str(model_folder(tmp_path / "model"))
    for num_proc in ("2", "1"):
        encode(model, str(tmp_path / "rows.jsonl"), str(tmp_path / "encoded"), num_proc)
    first, again = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["rows"] == again["rows"] == 40
    assert first["tokens"] == again["tokens"]
    assert first["peak"] > 50 * 2**20  # more than an interpreter
    assert len(list((tmp_path / "encoded").glob("*.arrow"))) == 1


def test_turns_of_a_file_make_many_different_rows(tmp_path: Path) -> None:
    """Each question meets each answer once, and neighbours differ in both: what recurs more often is encoded faster."""
    chats = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i % 6}"}]}
        for i in range(11)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)), "utf-8")
    mix_rows(tmp_path / "rows.jsonl", 55, chats=str(tmp_path / "chats.jsonl"))
    rows = [json.loads(line)["messages"] for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    turns = [tuple(message["content"] for message in row) for row in rows]
    assert len(set(turns)) == 55
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in itertools.pairwise(turns))
    mix_rows(tmp_path / "rows.jsonl", 200, chats=str(tmp_path / "chats.jsonl"))
    lines = (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()
    assert len(set(lines)) == 200
    assert "(4)" in lines[-1]
