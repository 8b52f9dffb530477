"""What `tunesmith check` prints: a cause that rows share once, a row of each form, and the verdict of training."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tunesmith.cli.app import app


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def checked(*words: str, code: int = 0) -> list[str]:
    result = CliRunner().invoke(app, ["check", *words])
    assert result.exit_code == code, result.output
    return result.output.splitlines()


def written(path: Path, row: dict[str, Any], num: int = 60) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for _ in range(num)))
    return str(path)


@pytest.mark.parametrize("num", [60, 1500])  # more than are listed
def test_what_all_rows_share_is_said_once(num: int, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"id": 1, "data": {"q": "a"}}, num)
    lines = checked(path, code=2)
    assert lines[0].startswith(
        f"{path}: all {num:,} rows: unknown_shape: no shape of rows has these fields: 'id', 'data'."
    )
    assert lines[1] == ""


def test_what_some_rows_share_is_said_once_with_the_first(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": "" if i % 3 == 1 else "ab"[i % 2]} for i in range(30)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert (
        checked(str(path), code=2)[0]
        == f"{path}:2, 5, 8 and 7 more: bad_label: label is empty. Write it, or remove the row."
    )


def test_bytes_of_another_encoding_are_said_once(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        "".join(["text,label\n", *(f"{'a' * i} café,{'ab'[i % 2]}\n" for i in range(30))]).encode("cp1252")
    )
    lines = checked(str(path), code=2)
    assert "all 30 rows: invalid_utf8" in lines[0]
    assert lines[0].endswith("add --set data.encoding=cp1252.")
    assert lines[1] == ""
    assert checked(str(path), "--set", "data.encoding=cp1252")[-1] == "can be trained on"


def test_a_row_of_each_form_is_shown(tmp_path: Path) -> None:
    chats = written(
        tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    )
    plain = written(tmp_path / "b.jsonl", {"instruction": "Say", "output": "So"})
    lines = checked(chats, plain)
    for wanted in (f"{chats}:1: messages", f"{plain}:1: alpaca", "user: Hi", "assistant: ⟦Ho⟧", "assistant: ⟦So⟧"):
        assert wanted in lines


def test_a_class_that_ends_in_a_space_is_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{'good' if i % 2 else 'good '}\n" for i in range(30)))
    assert "labels: 2 classes: good 15, 'good ' 15; one a row" in checked(str(path))


def test_rows_are_shown_as_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(4)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:3]) + '{"prompt": "q"}\n')
    lines = checked(str(path), "--rows", "2-4")
    assert [line for line in lines if line.startswith("line ")] == ["line 2", "line 3", "line 4"]
    assert any("⟦a1⟧" in line for line in lines)
    assert not any("⟦a0⟧" in line for line in lines)
    assert lines[-1].startswith("unknown_shape: ") or "completion" in lines[-1]
    assert "--rows: two: is no line" in "".join(checked(str(path), "--rows", "two", code=2))


@pytest.mark.parametrize("kind", ["plain", "gzip", "utf-16"])
def test_lines_far_down_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    lines = [f'{{"prompt": "q{i} {"x" * (i % 7)}", "completion": "a{i}"}}' for i in range(2_000)]
    lines[700], lines[701], lines[999] = "", '{"prompt": "é\U0001f600', '{"prompt": "' + "y" * 20_000 + '"'
    raw = "\r\n".join(lines).encode("utf-16" if kind == "utf-16" else "utf-8")  # the last line has no end
    path = tmp_path / ("rows.jsonl.gz" if kind == "gzip" else "rows.jsonl")
    path.write_bytes(gzip.compress(raw) if kind == "gzip" else raw)
    for first, last in ((1, 3), (2, 2), (700, 703), (1_000, 1_001), (1_999, 2_000), (2_001, 2_020)):
        [printed] = checked(str(path), "--rows", f"{first}-{last}", "--json")
        shown = {row["line"]: row for row in json.loads(printed)["rows"]}
        wanted = {number for number in range(first, min(last, 2_000) + 1) if number != 701}
        assert set(shown) == wanted
        for number in wanted - {702, 1_000}:
            assert [f"a{number - 1}", True] in shown[number]["spans"]
        for number in wanted & {702, 1_000}:
            assert shown[number]["problems"], number


@pytest.mark.parametrize("kind", ["plain", "gzip", "utf-16"])
def test_rows_of_a_table_far_down_are_those_that_a_whole_reading_finds(kind: str, tmp_path: Path) -> None:
    cells = ["plain words", 'a 5" screen', '"quoted, twice"', '"two\nlines"', '"said ""so"""', "y" * 20_000, ""]
    cells.append('"three\n\nlines, ""odd"""')
    rows = [f"q{i},{cells[(i * 5) % 8]}" for i in range(600)]
    raw = "\r\n".join(["prompt,completion", *rows]).encode("utf-16" if kind == "utf-16" else "utf-8")
    path = tmp_path / ("rows.csv.gz" if kind == "gzip" else "rows.csv")
    path.write_bytes(gzip.compress(raw) if kind == "gzip" else raw)
    num_lines = raw.decode("utf-16" if kind == "utf-16" else "utf-8").count("\n") + 1

    def shown(first: int, last: int) -> list[Any]:
        [printed] = checked(str(path), "--rows", f"{first}-{last}", "--json")
        return list(json.loads(printed)["rows"])

    whole = shown(1, num_lines)
    for first in (2, 40, 41, 42, 300, num_lines - 1, num_lines + 1):
        assert shown(first, first + 9) == [row for row in whole if first <= row["line"] < first + 10], first
