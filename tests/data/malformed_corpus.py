"""Files that are wrong, each with the code and line of what has to be said about it."""

import gzip
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True, slots=True)
class Case:
    """One file, and the finding about it."""

    name: str
    filename: str
    payload: bytes
    code: str
    line: int
    """0: the whole file."""

    @property
    def place(self) -> str:
        return f"{self.filename}:{self.line}" if self.line else self.filename


GOOD = b'{"prompt": "What is 2 + 2?", "completion": "4"}'
GOOD_CHAT = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}'
CASES: list[Case] = []


OF_A_FILE = ("empty_dataset", "archive", "binary", "wrong_encoding", "unknown_format")
"""What is wrong with a whole file has no line, except in a document, whose text is a row."""


def _case(name: str, filename: str, payload: bytes, code: str, line: int) -> None:
    CASES.append(Case(name, filename, payload, code, 0 if code in OF_A_FILE and ".txt" not in filename else line))


def _as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _lines(name: str, row: bytes, code: str) -> None:
    """A bad row as the second of three lines, as the last line without its end, and gzipped behind a blank line."""
    _case(f"{name}, second line", "rows.jsonl", GOOD + b"\n" + row + b"\n" + GOOD + b"\n", code, 2)
    _case(f"{name}, last line", "rows.jsonl", GOOD + b"\n" + GOOD + b"\n" + row, code, 3)
    _case(f"{name}, gzipped", "rows.jsonl.gz", gzip.compress(GOOD + b"\n\n" + row + b"\r\n", mtime=0), code, 3)


def _text_that_is_not_json() -> None:
    for name, row, code in (
        ("no quotes", b"{prompt: 1}", "bad_json"),
        ("Python's None", b'{"prompt": None, "completion": "b"}', "bad_json"),
        ("trailing comma", b'{"prompt": "a", "completion": "b",}', "bad_json"),
        ("two objects", GOOD + GOOD, "bad_json"),
        ("bad escape", rb'{"prompt": "C:\data", "completion": "b"}', "bad_json"),
        ("raw tab in text", b'{"prompt": "a\tb", "completion": "b"}', "bad_json"),
        ("mark inside the file", b"\xef\xbb\xbf" + GOOD, "bad_json"),
        ("cut in text", GOOD[:25], "truncated_json"),
        ("NaN", b'{"prompt": NaN, "completion": "b"}', "not_a_number"),
        ("too large a float", b'{"prompt": "a", "completion": "b", "score": 1e999}', "not_a_number"),
        ("key twice", b'{"prompt": "a", "prompt": "b", "completion": "c"}', "duplicate_key"),
        ("key twice, one escaped", rb'{"prompt": "a", "\u0070rompt": "b", "completion": "c"}', "duplicate_key"),
        ("lone high surrogate", rb'{"prompt": "\ud83d", "completion": "b"}', "lone_surrogate"),
        ("Latin-1", b'{"prompt": "caf\xe9", "completion": "b"}', "invalid_utf8"),
        ("surrogate as bytes", b'{"prompt": "\xed\xa0\xbd", "completion": "b"}', "invalid_utf8"),
        ("NUL byte", b'{"prompt": "a\x00b", "completion": "b"}', "nul_character"),
        ("NUL escaped", rb'{"prompt": "a\u0000b", "completion": "b"}', "nul_character"),
        ("deep array", b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}", "too_deep"),
        ("very deep array, open", b'{"prompt": ' + b"[" * 100_000, "too_deep"),
        ("a number", b"42", "not_an_object"),
        ("a list", b'["a", "b"]', "not_an_object"),
    ):
        _lines(name, row, code)


def _rows_of_no_use() -> None:
    """Rows that are JSON, but not what their shape asks for; each in a file of good rows of that shape."""
    for name, row, code in (
        ("no completion", {"prompt": "a"}, "missing_field"),
        ("no prompt", {"completion": "a"}, "missing_field"),
        ("number as completion", {"prompt": "a", "completion": 4}, "wrong_type"),
        ("list as prompt", {"prompt": ["a"], "completion": "b"}, "wrong_type"),
        ("empty completion", {"prompt": "a", "completion": ""}, "empty_answer"),
        ("another shape", {"instruction": "a", "output": "b"}, "other_shape"),
        ("no field at all", {}, "missing_field"),
        ("messages on one side only", {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "wrong_type"),
    ):
        _case(f"pair: {name}", "pairs.jsonl", GOOD + b"\n" + _as_json(row) + b"\n" + GOOD, code, 2)
    for name, messages, code in _bad_chats():
        payload = GOOD_CHAT + b"\n" + _as_json({"messages": messages}) + b"\n" + GOOD_CHAT
        _case(f"chat: {name}", "chats.jsonl", payload, code, 2)
    good = _as_json({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]})
    for name, turns, code in _bad_conversations():
        payload = good + b"\n" + _as_json({"conversations": turns}) + b"\n" + good
        _case(f"ShareGPT: {name}", "chats.jsonl", payload, code, 2)
    good = _as_json({"instruction": "Add.", "input": "1, 2", "output": "3"})
    for name, row, code in (
        ("no output", {"instruction": "a"}, "missing_field"),
        ("empty output", {"instruction": "a", "output": ""}, "empty_answer"),
        ("number as input", {"instruction": "a", "input": 3, "output": "b"}, "wrong_type"),
        ("list as output", {"instruction": "a", "output": ["b"]}, "wrong_type"),
        ("history of texts", {"instruction": "a", "output": "b", "history": ["x", "y"]}, "wrong_type"),
        ("history without answer", {"instruction": "a", "output": "b", "history": [["x", ""]]}, "empty_answer"),
    ):
        _case(f"Alpaca: {name}", "tasks.jsonl", good + b"\n" + _as_json(row) + b"\n" + good, code, 2)


def _bad_chats() -> list[tuple[str, Any, str]]:
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    result = {"role": "tool", "content": "3"}
    call = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
    return [
        ("null", None, "missing_field"),
        ("a text", "Hi", "wrong_type"),
        ("empty", [], "no_answer"),
        ("nobody answers", [user], "no_answer"),
        ("texts", ["Hi", "Hello."], "wrong_type"),
        ("no role", [{"content": "Hi"}, answer], "missing_field"),
        ("unknown role", [{"role": "customer", "content": "Hi"}, answer], "unknown_role"),
        ("no content", [user, {"role": "assistant"}], "missing_field"),
        ("number as content", [{"role": "user", "content": 5}, answer], "wrong_type"),
        ("empty answer", [user, {"role": "assistant", "content": ""}], "empty_answer"),
        ("system in the middle", [user, {"role": "system", "content": "Be nice."}, answer], "roles_out_of_order"),
        ("answer first", [answer, user, answer], "roles_out_of_order"),
        ("tool after user", [user, result, answer], "roles_out_of_order"),
        ("every weight 0", [user, {**answer, "weight": 0}], "no_target"),
        ("weight one half", [user, {**answer, "weight": 0.5}], "bad_weight"),
        ("weight of the user", [{**user, "weight": 1}, answer], "bad_weight"),
        ("texts as content", [user_says(["Hi"]), answer], "wrong_type"),
        ("calls as text", [user, {"role": "assistant", "content": "", "tool_calls": "f()"}], "wrong_type"),
        ("call without name", [user, {"role": "assistant", "tool_calls": [{"function": {}}]}], "bad_tool_call"),
        (
            "arguments not JSON",
            [user, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}],
            "bad_tool_call",
        ),
        (
            "arguments a list",
            [user, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}],
            "bad_tool_call",
        ),
        ("user calls", [{**user, "tool_calls": call["tool_calls"]}, answer], "bad_tool_call"),
        ("1001 messages", [user, answer] * 500 + [user], "too_many_messages"),
        (
            "argument beyond 64 bits",
            [user, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"n": 10**20}}}]}],
            "number_too_large",
        ),
    ]  # fmt: skip


def user_says(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _bad_conversations() -> list[tuple[str, Any, str]]:
    user, answer = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}
    return [
        ("null", None, "missing_field"),
        ("a text", "Hi", "wrong_type"),
        ("no speaker", [{"value": "Hi"}, answer], "missing_field"),
        ("unknown speaker", [{"from": "alien", "value": "Hi"}, answer], "unknown_role"),
        ("number as speaker", [{"from": 1, "value": "Hi"}, answer], "wrong_type"),
        ("empty answer", [user, {"from": "gpt", "value": ""}], "empty_answer"),
        ("answer first", [answer, user, answer], "roles_out_of_order"),
        ("call that is no JSON", [user, {"from": "function_call", "value": "f()"}, answer], "bad_tool_call"),
        ("call without name", [user, {"from": "function_call", "value": "{}"}, answer], "bad_tool_call"),
        ("result without call", [{"from": "observation", "value": "3"}, answer], "roles_out_of_order"),
    ]


def _tables() -> None:
    head = b"prompt,completion\na,b\n"
    for name, filename, payload, code, line in (
        ("short row", "t.csv", head + b"alone\nc,d\n", "ragged_row", 3),
        ("short row after a long text", "t.csv", head + b'"a\n\nb",c\nalone\n', "ragged_row", 6),
        ("quote never closed", "t.csv", head + b'"a,b\nc,d\n', "unclosed_quote", 3),
        ("text after a quote", "t.csv", head + b'"a" b,c\n', "bad_csv", 3),
        ("backslash before a quote", "t.csv", head + rb'"say \"hi\"",b' + b"\n", "bad_csv", 3),
        ("carriage return alone", "t.csv", head + b"a\rb,c\n", "bad_csv", 3),
        ("column twice", "t.csv", b"prompt,completion,prompt\na,b,c\n", "duplicate_column", 1),
        ("unknown columns", "t.csv", b"query,reply\na,b\n", "unknown_shape", 1),
        ("no header", "t.csv", b"What is it?,A bird.\nWho?,Me.\n", "unknown_shape", 1),
        ("header only", "t.csv", b"prompt,completion\n", "empty_dataset", 1),
        ("header and blank lines", "t.csv", b"prompt,completion\n\n  \n\n", "empty_dataset", 1),
        ("Latin-1", "t.csv", head + "café,b\n".encode("latin-1"), "invalid_utf8", 3),
        ("Latin-1 in a long text", "t.csv", head + b'"a\n\xe9\nb",c\n', "invalid_utf8", 3),
        ("Latin-1 in the header", "t.csv", b"prompt,completion,caf\xe9\na,b,c\n", "invalid_utf8", 1),
        ("NUL", "t.csv", head + b"a\0b,c\n", "nul_character", 3),
        ("empty answer", "t.csv", head + b"a,\n", "empty_answer", 3),
        ("messages in a cell", "t.csv", b'messages\n"[{""role"": ""user""}]"\n', "wrong_type", 2),
        ("TSV: short row", "t.tsv", b"prompt\tcompletion\na\tb\nalone\n", "ragged_row", 3),
        ("TSV: quote never closed", "t.tsv", b'prompt\tcompletion\na\t"b\n', "unclosed_quote", 2),
    ):
        _case(f"table: {name}", filename, payload, code, line)


def _arrays() -> None:
    for name, payload, code, line in (
        ("empty", b"[]", "empty_dataset", 1),
        ("blank", b" [ \n ] ", "empty_dataset", 1),
        ("never closed", b"[" + GOOD + b",\n" + GOOD, "truncated_json", 2),
        ("cut in text", b"[" + GOOD + b',\n{"prompt": "a', "truncated_json", 2),
        ("only opened", b"[", "truncated_json", 1),
        ("trailing comma", b"[" + GOOD + b",]", "bad_json", 2),
        ("two commas", b"[" + GOOD + b",," + GOOD + b"]", "bad_json", 2),
        ("missing comma", b"[" + GOOD + b"\n" + GOOD + b"]", "bad_json", 1),
        ("brackets crossed", b"[" + GOOD + b', {"prompt": "a"], {}]', "bad_json", 2),
        ("bad row", b"[" + GOOD + b", {prompt: 1}]", "bad_json", 2),
        ("a number", b"[" + GOOD + b", 7]", "not_an_object", 2),
        ("a list", b"[" + GOOD + b", [1, 2]]", "not_an_object", 2),
        ("key twice", b"[" + GOOD + b', {"prompt": "a", "prompt": "a", "completion": "b"}]', "duplicate_key", 2),
        ("NaN", b"[" + GOOD + b', {"prompt": NaN}]', "not_a_number", 2),
        ("Latin-1", b"[" + GOOD + b', {"prompt": "\xe9", "completion": "b"}]', "invalid_utf8", 2),
        ("text after it", b"[" + GOOD + b"] and more", "trailing_data", 2),
        ("two arrays", b"[" + GOOD + b"]\n[" + GOOD + b"]", "trailing_data", 2),
        ("deep", b"[" + GOOD + b"," + b"[" * 3000 + b"]" * 3000 + b"]", "too_deep", 2),
        ("very deep, open", b"[" + b"[" * 100_000, "too_deep", 1),
        ("bad row of its shape", b"[" + GOOD + b', {"prompt": "a"}]', "missing_field", 2),
    ):
        _case(f"array: {name}", "rows.json", payload, code, line)


def _parquet(columns: dict[str, Any], **types: pa.DataType) -> bytes:
    fields = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    sink = io.BytesIO()
    pq.write_table(pa.table(fields), sink)
    return sink.getvalue()


def _tables_with_types() -> None:
    good = _parquet({"prompt": ["a", "b"], "completion": ["c", "d"]})
    day = datetime(2024, 1, 1)
    bad_utf8 = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": pa.array(["a", "b"]), "completion": bad_utf8}), sink)
    none = _parquet({"prompt": [], "completion": []}, prompt=pa.string(), completion=pa.string())
    for name, payload, code, line in (
        ("numbers", _parquet({"prompt": ["a", "b"], "completion": [1, 2]}), "wrong_type", 1),
        ("dates", _parquet({"prompt": ["a"], "completion": [day]}), "wrong_type", 1),
        ("bytes", _parquet({"prompt": ["a"], "completion": [b"x"]}), "wrong_type", 1),
        ("null", _parquet({"prompt": ["a", "b"], "completion": ["c", None]}), "missing_field", 2),
        ("NUL", _parquet({"prompt": ["a", "b"], "completion": ["c", "d\0"]}), "nul_character", 2),
        ("not UTF-8", sink.getvalue(), "invalid_utf8", 2),
        ("no rows", none, "empty_dataset", 1),
        ("unknown columns", _parquet({"q": ["a"], "a": ["b"]}), "unknown_shape", 1),
        ("messages as text", _parquet({"messages": ["[]"]}), "wrong_type", 1),
        ("cut off", good[:-20], "damaged_parquet", 1),
        ("footer overwritten", good[:-40] + b"\xff" * 32 + good[-8:], "damaged_parquet", 1),
        ("pages overwritten", good[:20] + b"\xff" * 40 + good[60:], "damaged_parquet", 1),
    ):  # fmt: skip
        _case(f"Parquet: {name}", "rows.parquet", payload, code, line)


def _files_of_no_use() -> None:
    packed = gzip.compress((GOOD + b"\n") * 2000, mtime=0)
    for name, filename, payload, code in (
        ("empty", "rows.jsonl", b"", "empty_dataset"),
        ("empty, gzipped", "rows.jsonl.gz", gzip.compress(b"", mtime=0), "empty_dataset"),
        ("only blank lines", "rows.jsonl", b"\n \n\t\n\r\n", "empty_dataset"),
        ("only a mark", "rows.jsonl", b"\xef\xbb\xbf", "empty_dataset"),
        ("zip", "rows.jsonl", b"PK\x03\x04" + b"\0" * 30, "archive"),
        ("Excel", "rows.xlsx", b"PK\x03\x04\x14\0\x06\0", "archive"),
        ("zstd", "rows.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "archive"),
        ("gzipped twice", "rows.jsonl.gz", gzip.compress(gzip.compress(GOOD, mtime=0), mtime=0), "archive"),
        ("a GGUF model", "model.gguf", b"GGUF\x03\0\0\0", "binary"),
        ("a PDF", "rows.pdf", b"%PDF-1.7\n", "binary"),
        ("noise", "rows.bin", bytes(range(256)) * 8, "binary"),
        ("zeros", "rows.jsonl", b"\0" * 4096, "binary"),
        ("half of a UTF-16 character", "rows.jsonl", GOOD.decode().encode("utf-16")[:-1], "wrong_encoding"),
        ("UTF-16 without a mark", "rows.jsonl", GOOD.decode().encode("utf-16-le"), "wrong_encoding"),
        ("prose", "book.html", b"It was a dark night.\nThe rain fell.\n", "unknown_format"),
        ("a web page", "page.html", b"<!doctype html>\n<p>Hi\n", "unknown_format"),
        ("gzip of noise", "rows.jsonl.gz", packed[:10] + b"\xff" * 50, "damaged_gzip"),
    ):
        _case(f"file: {name}", filename, payload, code, 1)
    _case(
        "file: pretty-printed JSON", "rows.json", json.dumps(json.loads(GOOD), indent=2).encode(), "indented_object", 0
    )
    _case("file: words named JSON lines", "rows.jsonl", b"Hello there\n" + GOOD, "bad_json", 1)
    _case("file: gzip cut off", "rows.jsonl.gz", _cut_gzip(300), "damaged_gzip", 101)
    _case("file: gzip with a wrong checksum", "rows.jsonl.gz", packed[:-8] + b"\0" * 8, "damaged_gzip", 2001)
    unknown = _as_json({"query": "a", "reply": "b"})
    _case("file: fields of no shape", "rows.jsonl", unknown + b"\n" + unknown, "unknown_shape", 1)
    long = b'{"prompt": "' + b"a" * (9 << 20) + b'", "completion": "b"}'
    _case(
        "file: a line of 9 MiB",
        "rows.jsonl.gz",
        gzip.compress(GOOD + b"\n" + long + b"\n" + GOOD, 1, mtime=0),
        "line_too_long",
        2,
    )
    _case(
        "file: an element of 9 MiB",
        "rows.json.gz",
        gzip.compress(b"[" + GOOD + b"," + long + b"," + GOOD + b"]", 1, mtime=0),
        "line_too_long",
        2,
    )
    _case(
        "file: a value of 9 MiB",
        "t.csv.gz",
        gzip.compress(b"prompt,completion\na,b\n" + b"a" * (9 << 20) + b",b\nc,d\n", 1, mtime=0),
        "line_too_long",
        3,
    )


def _labelled() -> None:
    """Rows of texts, summaries, classes and tags, each as the second of three lines."""
    good: dict[str, Any] = {"text": "Red eye", "label": "eye"}
    several: dict[str, Any] = {"text": "Red eye", "label": ["eye"]}
    summary: dict[str, Any] = {"document": "Long.", "summary": "Short."}
    words: dict[str, Any] = {"tokens": ["Ann", "sings"], "tags": ["B-PER", "O"]}
    for name, first, row, code in (
        ("no label", good, {"text": "a"}, "missing_field"),
        ("null label", good, {**good, "label": None}, "missing_field"),
        ("empty label", good, {**good, "label": ""}, "bad_label"),
        ("object as label", good, {**good, "label": {"name": "eye"}}, "wrong_type"),
        ("list among classes", good, {**good, "label": ["eye"]}, "mixed_labels"),
        ("class among lists", several, {**several, "label": "eye"}, "mixed_labels"),
        ("class twice", several, {**several, "label": ["eye", "eye"]}, "bad_label"),
        ("list in a list", several, {**several, "label": [["eye"]]}, "wrong_type"),
        ("number as text", good, {**good, "text": 5}, "wrong_type"),
        ("pair among labels", good, json.loads(GOOD), "other_shape"),
        ("no summary", summary, {"document": "a"}, "missing_field"),
        ("fewer tags than words", words, {**words, "tags": ["O"]}, "ragged_tags"),
        ("no words", words, {"tokens": [], "tags": []}, "no_text"),
        ("sentence as text", words, {"tokens": "Ann sings", "tags": ["O", "O"]}, "wrong_type"),
        ("number as word", words, {**words, "tokens": ["Ann", 5]}, "wrong_type"),
        ("null tag", words, {**words, "tags": ["O", None]}, "bad_label"),
        ("no tags", words, {"tokens": ["Ann"]}, "missing_field"),
        ("empty text", {"text": "a"}, {"text": " "}, "no_text"),
    ):
        _case(f"labelled: {name}", "rows.jsonl", b"\n".join(map(_as_json, (first, row, first))), code, 2)
    table = b"text,label\nRed eye,eye\n"
    _case("table: empty label", "t.csv", table + b"Deaf,\n", "bad_label", 3)
    _case("table: row without its label", "t.csv", table + b"Deaf\n", "ragged_row", 3)
    _case(
        "Parquet: label not a number", "t.parquet", _parquet({"text": ["a"], "label": [float("nan")]}), "bad_label", 1
    )
    _case(
        "Parquet: dates as labels",
        "t.parquet",
        _parquet({"text": ["a"], "label": [datetime(2024, 1, 1)]}),
        "wrong_type",
        1,
    )


def _documents() -> None:
    for name, filename, payload, code in (
        ("empty", "book.txt", b"", "no_text"),
        ("only a mark", "book.txt", b"\xef\xbb\xbf", "no_text"),
        ("Latin-1", "book.txt", "Un café.\n".encode("latin-1"), "invalid_utf8"),
        ("NUL", "book.txt", b"It was a dark\0 night.\n", "nul_character"),
        ("PDF", "book.txt", b"%PDF-1.7\n", "binary"),
        ("zip", "book.txt", b"PK\x03\x04" + b"\0" * 30, "archive"),
        ("noise", "book.txt", bytes(range(1, 64)) * 8, "binary"),
        ("9 MiB", "book.txt.gz", gzip.compress(b"It was a dark night.\n" * 450_000, 1, mtime=0), "line_too_long"),
        ("gzip cut off", "book.txt.gz", gzip.compress(b"It was a dark night.\n" * 99, mtime=0)[:-20], "damaged_gzip"),
    ):
        _case(f"document: {name}", filename, payload, code, 1)
    good = b"Ann B-PER\nsings O\n\n"
    for name, filename, payload, code, line in (
        ("word without tag", "t.conll", good + b"Ann B-PER\nsings\n\n" + good, "ragged_row", 4),
        ("another column", "t.conll", good + b"\nAnn NNP B-PER\n\n" + good, "ragged_row", 5),
        ("no tags", "t.conll", b"Ann\nsings\n", "ragged_tags", 1),
        ("Latin-1", "t.conll", good + b"Andr\xe9 B-PER\n", "invalid_utf8", 4),
        ("NUL", "t.conll", good + b"An\0n B-PER\n", "nul_character", 4),
        ("sentence that never ends", "t.conll.gz", gzip.compress(good + (b"A" * 999 + b" O\n") * 9500, 1, mtime=0),
         "line_too_long", 4),
        ("empty", "t.conll", b"", "empty_dataset", 1),
        ("found by its lines", "train.txt", good + b"Ann B-PER\n\nAnn B PER\n", "ragged_row", 6),
    ):  # fmt: skip
        _case(f"CoNLL: {name}", filename, payload, code, line)


def _cut_gzip(num_bytes: int) -> bytes:
    """A gzip file whose first 100 rows were flushed; then it ends."""
    packer = zlib.compressobj(wbits=31)
    whole = packer.compress((GOOD + b"\n") * 100) + packer.flush(zlib.Z_FULL_FLUSH)
    noise = bytes((i * 7919) % 251 + 1 for i in range(4096)).hex().encode()
    return whole + (packer.compress(noise) + packer.flush())[:num_bytes]


_BUILDERS: tuple[Callable[[], None], ...] = (
    _text_that_is_not_json, _rows_of_no_use, _tables, _arrays, _tables_with_types, _files_of_no_use, _labelled,
    _documents,
)  # fmt: skip
for _build in _BUILDERS:
    _build()
