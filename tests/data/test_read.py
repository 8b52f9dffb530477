"""Rows are read byte for byte, whatever the file is called and however it arrives."""

import gzip
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.rows_of import WRITERS, comma_separated, json_lines, parquet, put, rows_in, said
from tunesmith.data.read import read
from tunesmith.data.read_json import BadRow, loads
from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataFile, Limits

PAIR = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
# Surrogates are no text, and NUL is refused by name.
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))
ROWS = st.lists(st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}), min_size=1, max_size=5)
TYPED_TEXT = ("NA", "null", "", "007", "1e5", "2024-01-01", "12:30", "true", "+1", " x ", "1,5", "None", "-0", "NaN")


def read_texts(path: Path) -> list[Any]:
    rows, problems = rows_in(path)
    assert problems == []
    return [record for _, record in rows]


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_any_text_comes_back_byte_for_byte(name: str, rows: list[dict[str, str]], tmp_path: Path):
    assert read_texts(put(tmp_path, name, WRITERS[name](rows))) == rows


def keeps_what_looks_typed(read_csv: Callable[[Path], list[Any]], text: str, path: Path) -> None:
    rows = [{"prompt": text, "completion": "x"}, {"prompt": text, "completion": "y"}]
    path.write_bytes(comma_separated(rows))
    assert read_csv(path) == rows


@pytest.mark.parametrize("text", TYPED_TEXT)
def test_text_that_looks_like_something_else_stays_text(text: str, tmp_path: Path):  # trap: T15
    keeps_what_looks_typed(read_texts, text, tmp_path / "t.csv")


@pytest.mark.parametrize("text", ["NA", "007", "1e5", "2024-01-01", "12:30", "true"])
def test_a_reader_that_guesses_types_would_be_caught(text: str, tmp_path: Path):  # trap: T15, planted
    def guessing(path: Path) -> list[Any]:
        quotes_say_nothing = pyarrow.csv.ConvertOptions(strings_can_be_null=True)
        return list(pyarrow.csv.read_csv(path, convert_options=quotes_say_nothing).to_pylist())

    with pytest.raises(AssertionError):
        keeps_what_looks_typed(guessing, text, tmp_path / "t.csv")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_types_stay_what_they_are(name: str, tmp_path: Path):  # trap: T15
    rows = [{"a": 1, "b": "1", "c": True, "d": None, "e": [1, "1"], "f": {"g": "2024-01-01"}, "h": 1.5, "i": 2**63}]
    path = put(tmp_path, name, WRITERS[name](rows))
    assert json.dumps(rows_in(path)[0][0][1]) == json.dumps(rows[0])


def test_mark_at_the_start_and_windows_line_ends_change_nothing(tmp_path: Path):
    for name in ("rows.jsonl", "rows.csv", "rows.json"):
        plain = WRITERS[name]([PAIR, PAIR])
        windows = b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n")
        assert read_texts(put(tmp_path, name, windows)) == [PAIR, PAIR]


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path):
    row = {"prompt": "a\u2028b\u2029c\u0085d\x0be\x0cf\x1c", "completion": "\ufeff"}
    for name, write in WRITERS.items():
        assert read_texts(put(tmp_path, name, write([row, row]))) == [row, row]


def test_csv_rows_carry_the_line_on_which_they_begin(tmp_path: Path):
    payload = b'prompt,completion\n\n"a\n\nb",c\r\n\n"d ""e""",f'
    rows, _ = rows_in(put(tmp_path, "t.csv", payload))
    assert rows == [(3, {"prompt": "a\n\nb", "completion": "c"}), (7, {"prompt": 'd "e"', "completion": "f"})]


@pytest.mark.parametrize(
    ("header", "delimiter"), [(b"prompt,completion", ","), (b"prompt\tcompletion", "\t"), (b"prompt;completion", ";")]
)
def test_separator_is_found_in_the_header(header: bytes, delimiter: str, tmp_path: Path):
    payload = header + b"\n" + delimiter.join(["a", "b"]).encode()
    name = "t.tsv" if delimiter == "\t" else "t.csv"
    assert read_texts(put(tmp_path, name, payload)) == [PAIR]


@pytest.mark.parametrize(
    ("name", "real"),
    [
        ("rows.csv", "rows.jsonl"),
        ("rows.jsonl", "rows.csv"),
        ("rows.jsonl", "rows.parquet"),
        ("rows.parquet", "rows.json"),
        ("rows.csv", "rows.tsv"),
        ("rows.jsonl", "rows.jsonl.gz"),
        ("rows.jsonl.gz", "rows.jsonl"),
        ("rows.jsonl", "rows.json"),
    ],
)
def test_content_counts_more_than_the_name(name: str, real: str, tmp_path: Path):
    rows, problems = rows_in(put(tmp_path, name, WRITERS[real]([PAIR])))
    assert [record for _, record in rows] == [PAIR]
    assert problems == []


def test_reading_goes_on_after_a_bad_row(tmp_path: Path):
    good = json_lines([PAIR])
    rows, problems = rows_in(put(tmp_path, "rows.jsonl", good + b"{\n" + good + b'{"a": 1, "a": 2}\n' + good))
    assert [line for line, _ in rows] == [1, 3, 5]
    assert said(problems) == [("truncated_json", 2), ("duplicate_key", 4)]


@pytest.mark.parametrize(("name", "around"), [("rows.jsonl", 33), ("rows.csv", 6), ("rows.parquet", 1)])
def test_a_row_may_have_the_longest_size_and_not_a_byte_more(name: str, around: int, tmp_path: Path):
    # `around`: bytes of {"prompt": "", "completion": "b"}, of "","b" and, in Parquet, of the texts alone.
    fitting, longer = ({"prompt": "x" * (500 - around + more), "completion": "b"} for more in (0, 1))
    path = put(tmp_path, name, WRITERS[name]([PAIR, fitting, longer, PAIR]))
    rows, problems = rows_in(path, limits=Limits(line_bytes=500))
    assert [record for _, record in rows] == ([PAIR, fitting] if name == "rows.csv" else [PAIR, fitting, PAIR])
    assert [problem.code for problem in problems] == ["line_too_long"]


def test_an_element_that_is_too_long_does_not_hide_the_next(tmp_path: Path):
    rows = [PAIR, {"prompt": "[{\\" * 1000, "completion": '"]}' * 1000}, PAIR]
    found, problems = rows_in(put(tmp_path, "rows.json", WRITERS["rows.json"](rows)), limits=Limits(line_bytes=200))
    assert [line for line, _ in found] == [1, 3]
    assert said(problems) == [("line_too_long", 2)]


@pytest.mark.parametrize(
    ("text", "way"),
    [
        ('[{"a": 1},]', "Remove the comma."),
        ('[{"a": 1},, {"a": 2}]', "Remove the comma."),
        ('[{"a": 1,}]', "Remove the comma."),
        ('[{"a": 1}, {"a": "b', "Copy or export the file again."),
        ("[" + "[" * 100_000, "Flatten the row."),
    ],
)
def test_an_array_that_breaks_off_says_what_to_do(text: str, way: str, tmp_path: Path):
    _, problems = rows_in(put(tmp_path, "rows.json", text.encode()))
    assert way in problems[-1].fix


def test_bytes_are_counted_in_the_line_that_is_named(tmp_path: Path):
    payload = b"\xef\xbb\xbf" + json_lines([{"prompt": "ä", "completion": "b"}]) + b'{"prompt": "caf\xe9"}\n'
    _, (problem,) = rows_in(put(tmp_path, "rows.jsonl", payload))
    assert problem.code == "invalid_utf8"
    assert "(byte 16 of the line)" in problem.message
    assert "café" in problem.fix
    assert "--set data.encoding=cp1252" in problem.fix


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.dictionaries(TEXT, st.recursive(TEXT | st.integers(-(2**63), 2**63), st.lists, max_leaves=6)),
        min_size=1,
    ),
)
def test_any_array_is_cut_where_its_rows_end(rows: list[Any], tmp_path: Path):
    assert read_texts(put(tmp_path, "rows.json", json.dumps(rows).encode())) == rows


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    payload=st.binary(max_size=60),
    start=st.sampled_from([b"", b"{", b"[", b'[{"a": "', b'{"a":1}\n', b"a,b\n1,", b'a,b\n"']),
)
def test_no_bytes_end_in_anything_but_a_finding(payload: bytes, start: bytes, tmp_path: Path):
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        rows, problems = rows_in(put(tmp_path, name, start + payload))
        assert rows or problems


def test_nested_nulls_of_parquet_are_the_same_as_nothing(tmp_path: Path):
    # A column of messages gives every message the keys of all.
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
        {"messages": [{"role": "user", "content": "c", "name": "Ann"}, {"role": "assistant", "content": None}]},
    ]
    found, _ = rows_in(put(tmp_path, "t.parquet", parquet(rows)))
    assert found[0][1] == rows[0]
    assert found[1][1]["messages"] == [{"role": "user", "content": "c", "name": "Ann"}, {"role": "assistant"}]


def test_parquet_rows_cross_row_groups(tmp_path: Path):
    rows = [{"prompt": f"{i}", "completion": "x"} for i in range(5000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=700)
    found, _ = rows_in(tmp_path / "t.parquet")
    assert [record for _, record in found] == rows
    assert [line for line, _ in found] == list(range(1, 5001))


def test_a_link_to_what_is_not_there_is_said_to_be_that(tmp_path: Path):
    (tmp_path / "dangling.jsonl").symlink_to("gone.jsonl")
    [problem] = rows_in(tmp_path / "dangling.jsonl")[1]
    assert problem.message == "this is a link to 'gone.jsonl', which is not there."
    assert "Did you mean" not in problem.fix


@pytest.mark.parametrize("name", ["rows.jsonl", "it's.json", "rows.json.gz"])
def test_one_indented_object_is_one_error_with_a_way_out(name: str, tmp_path: Path):
    rows = [{"prompt": "ä", "completion": "b"}, PAIR]
    pack = gzip.compress if name.endswith(".gz") else bytes
    for whole, which, converted in (({"version": 1, "data": rows}, "its list 'data'", rows), (CHAT, "one row", [CHAT])):
        path = put(tmp_path, name, pack(json.dumps(whole, indent=2, ensure_ascii=False).encode()))
        found, problems = rows_in(path)
        assert not found
        assert [(one.code, one.message) for one in problems] == [
            ("indented_object", "this is one indented object, not JSON lines.")
        ]
        assert which in problems[0].fix
        line = problems[0].fix.partition(": python ")[2]
        subprocess.run(f"{shlex.quote(sys.executable)} {line}", shell=True, cwd=tmp_path, check=True)
        assert read_texts(next(tmp_path.glob("*-rows.jsonl"))) == converted
    cut = put(tmp_path, "cut.jsonl", b'{"prompt": "a",\n' + json_lines([PAIR]))
    assert said(rows_in(cut)[1]) == [("truncated_json", 1)]


def test_files_are_named_together_when_they_cannot_be_opened(tmp_path: Path):
    good = put(tmp_path, "rows.jsonl", json_lines([PAIR]))
    files = [tmp_path / "gone.jsonl", good, tmp_path / "folder", put(tmp_path, "empty.jsonl", b"")]
    files[2].mkdir()
    with pytest.raises(DataError) as refused:
        list(read([DataFile(path=str(file)) for file in files], limits=Limits(), on_problem=lambda problem: None))
    assert [problem.code for problem in refused.value.problems] == ["no_such_file", "is_folder", "empty_dataset"]
    assert str(refused.value).count("\n") == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path):
    os.mkfifo(tmp_path / "rows.jsonl")
    assert said(rows_in(tmp_path / "rows.jsonl")[1]) == [("not_a_file", 0)]


def test_nanoseconds_beside_the_text_do_not_stand_in_its_way(tmp_path: Path):
    columns = {
        "at": pa.array([1], pa.timestamp("ns", "UTC")),
        "took": pa.array([1], pa.duration("ns")),
        "clock": pa.array([1], pa.time64("ns")),
    }
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"], **columns}), tmp_path / "t.parquet")
    rows, problems = rows_in(tmp_path / "t.parquet")
    assert problems == []
    assert rows[0][1].items() >= PAIR.items()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"NaN", "NaN is not a number in JSON"),
        (b"-Infinity", "-Infinity is not a number in JSON"),
        (b"1e999", "1e999 is too large a number"),
    ],
)
def test_what_is_no_number_is_named_without_the_rest_of_its_line(value: bytes, message: str):
    with pytest.raises(BadRow) as bad:
        loads(b'{"a": ' + value + b', "private": "text"}', depth=9)
    assert (bad.value.code, bad.value.message) == ("not_a_number", message)
