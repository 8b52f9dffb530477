import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from tunesmith.errors import DataError
from tunesmith.inference.rows import Line, RowStream, read_list, read_pipe
from tunesmith.recipe.schema import Data
from tunesmith.types import Example


class Heard:
    """Lines that a model made of its rows, and what was said."""

    def __init__(self, chunk_rows: int = 100) -> None:
        self.written: list[Line] = []
        self.chunks: list[int] = []
        self.said: list[str] = []
        self.lines = RowStream(self._answers, self.written.extend, chunk_rows=chunk_rows)

    def _answers(self, examples: Sequence[Example], *rest: Any) -> list[Line]:
        self.chunks.append(len(examples))
        return [{"value": len(example.parts[0].text)} for example in examples]

    @property
    def texts(self) -> list[str]:
        return [str(line.get("text", line.get("error"))) for line in self.written]


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        os.close(ends[0])


def piped(content: bytes, data: Data | None = None) -> Heard:
    heard = Heard()
    with pipe() as (reading, writing):
        os.write(writing, content)
        os.close(writing)
        with open(reading, "rb", closefd=False) as source:
            read_pipe(source, data or Data(), "classify", heard.lines, heard.said.append)
    heard.lines.flush()
    return heard


def test_json_lines_of_a_pipe_are_rows() -> None:
    heard = piped('\ufeff{"text": "ä"}\n\n{"text": "b", "label": "x"}\n{"text": 1}\n[]\n{"text": "e"}'.encode())
    assert [line["source"] for line in heard.written] == [f"stdin:{n}" for n in (1, 3, 4, 5, 6)]
    assert heard.texts[:2] == ["ä", "b"]
    assert heard.texts[2].startswith("wrong_type: text is a number")
    assert heard.texts[3].startswith("not_an_object: the row is a list")
    assert heard.texts[4] == "e"
    assert heard.said == []


def test_plain_lines_of_a_pipe_are_texts_and_it_is_said() -> None:
    heard = piped(b"one text\r\n\nanother {text}\n\xff\nlast")
    assert heard.texts[:2] == ["one text", "another {text}"]
    assert heard.texts[2].startswith("wrong_encoding: ")
    assert heard.texts[3] == "last"
    assert [line["source"] for line in heard.written] == ["stdin:1", "stdin:3", "stdin:4", "stdin:5"]
    assert heard.said == ["stdin: its first line is no JSON object: each line is read as one text"]


@pytest.mark.parametrize("row", [b"x" * 200, b'{"text": "' + b"x" * 200 + b'"}'])
def test_a_line_over_the_limit_is_one_bad_row(row: bytes) -> None:
    first = b"short\n" if row.startswith(b"x") else b'{"text": "short"}\n'
    heard = piped(first + row + b"\n" + first, Data(limits={"line_bytes": 100}))  # type: ignore[arg-type]
    assert heard.texts[0] == heard.texts[2] == "short"
    assert heard.texts[1].startswith("line_too_long: ")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_pipe_without_rows_is_an_error(content: bytes) -> None:
    with pytest.raises(DataError, match="stdin: empty_dataset"):
        piped(content)


def test_rows_that_are_there_are_answered_before_waiting_for_more() -> None:
    """A writer that waits for the answer to its first rows before it writes the next gets it."""
    heard = Heard()
    with pipe() as (reading, writing):
        os.write(writing, b'{"text": "a"}\n{"text": "bb"}\n{"te')
        turns = iter([b'xt": "ccc"}\n', None])
        flush = heard.lines.flush

        def before_wait() -> None:
            flush()
            if heard.written and (more := next(turns, None)) is not None:
                os.write(writing, more)
            elif heard.written:
                os.close(writing)

        heard.lines.flush = before_wait  # type: ignore[method-assign]
        with open(reading, "rb", closefd=False) as source:
            read_pipe(source, Data(), "classify", heard.lines, heard.said.append)
        flush()
    assert heard.texts == ["a", "bb", "ccc"]
    assert heard.chunks == [2, 1]


def test_rows_at_hand_are_texts_or_have_names() -> None:
    heard = Heard()
    read_list(["a", {"text": "b"}, {"words": "c"}], Data(), "classify", heard.lines)
    heard.lines.flush()
    assert heard.texts[:2] == ["a", "b"]
    assert heard.written[2]["source"] == "rows:3"
    assert "error" in heard.written[2]
