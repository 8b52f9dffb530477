from collections.abc import Callable, Sequence
from typing import Any

from tunesmith.inference.rows import Line, RowStream, as_row, input_fields, read_list, record_of
from tunesmith.recipe.schema import Data
from tunesmith.types import Example, Part, Problem, Source


def text(line: int, words: str = "some words") -> Example:
    return Example((Part("text", words, False),), Source("a.jsonl", line), "text_label", plain=True)


def problem(line: int, code: str = "bad_json", severity: Any = "error") -> Problem:
    return Problem(Source("a.jsonl", line), code, "no JSON.", "Mend it.", severity=severity)


class Model:
    """Answers with the length of the text, and refuses empty ones."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(
        self, examples: Sequence[Example], done: Callable[[int], None], warn: Callable[[Problem], None]
    ) -> list[Line | Problem]:
        self.asked.append(len(examples))
        done(len(examples))
        return [
            {"value": len(example.parts[0].text)}
            if example.parts[0].text
            else Problem(example.source, "no_target", "it is empty.")
            for example in examples
        ]


def lines_of(items: Sequence[Example | Problem], **options: Any) -> tuple[list[Line], RowStream, Model]:
    written: list[Line] = []
    model = Model()
    lines = RowStream(model, written.extend, **{"chunk_rows": 4, **options})
    for item in items:
        lines.add(item) if isinstance(item, Example) else lines.report(item)
    lines.flush()
    return written, lines, model


def test_every_row_has_one_line_in_its_place() -> None:
    items = [text(1), problem(2), problem(2, "other"), text(3, ""), problem(4), text(5, "abc")]
    written, lines, _ = lines_of(items, chunk_rows=2)
    assert written == [
        {"source": "a.jsonl:1", "text": "some words", "value": 10},
        {"source": "a.jsonl:2", "error": "bad_json: no JSON. Mend it."},
        {"source": "a.jsonl:3", "error": "no_target: it is empty."},
        {"source": "a.jsonl:4", "error": "bad_json: no JSON. Mend it."},
        {"source": "a.jsonl:5", "text": "abc", "value": 3},
    ]
    assert (lines.counts.answered, lines.counts.errors) == (2, 3)


def test_warnings_are_counted_and_write_nothing() -> None:
    noted = problem(7, "ignored_fields", "warning")
    written, lines, _ = lines_of([text(1), noted, noted, text(2)], bare=True)
    assert written == [{"source": "a.jsonl:1", "value": 10}, {"source": "a.jsonl:2", "value": 10}]
    assert lines.counts.notes() == ["a.jsonl:7: ignored_fields: no JSON. Mend it. (2 such notes in all)"]


def test_no_more_than_a_chunk_is_held() -> None:
    """By rows, and by characters; rows that cannot be read count too."""
    _, _, model = lines_of([text(n) for n in range(10)])
    assert model.asked == [4, 4, 2]
    _, _, model = lines_of([text(n, "x" * 3_000_000) for n in range(5)])
    assert model.asked == [2, 2, 1]
    written: list[int] = []
    lines = RowStream(Model(), lambda some: written.append(len(some)), chunk_rows=4)
    for n in range(100):
        lines.report(problem(n))
        assert sum(written) >= n - 3


def test_rows_that_were_answered_before_are_passed_over() -> None:
    items = [text(1), problem(2), problem(2, "other"), text(3), text(4)]
    whole, _, _ = lines_of(items)
    for skip in range(len(whole) + 1):
        rest, _, _ = lines_of(items, skip=skip)
        assert rest == whole[skip:]


def test_lines_can_be_read_as_rows_again() -> None:
    where = Source("a", 1)
    user, assistant = Part("user", "hi", False), Part("assistant", "yes", False)
    cases = [
        (Example((Part("text", "a", False), Part("text_pair", "b", False)), where, "text_label", plain=True),
         {"text": "a", "text_pair": "b"}),
        (Example((Part("document", "a", False),), where, "document_summary", plain=True),
         {"document": "a"}),
        (Example((Part("word", "a", False), Part("word", "b", False)), where, "tokens_tags", plain=True),
         {"tokens": ["a", "b"]}),
        (Example((Part("text", "a", True),), where, "text", plain=True), {"text": "a"}),
        (Example((user,), where, "prompt_completion", plain=True), {"prompt": "hi"}),
        (Example((user, assistant, user), where, "messages"),
         {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
                       {"role": "user", "content": "hi"}]}),
    ]  # fmt: skip
    for example, fields in cases:
        assert input_fields(example) == fields


def test_a_text_becomes_a_row_of_the_task() -> None:
    assert record_of("classify", "a", "b") == {"text": "a", "text_pair": "b"}
    assert record_of("tag", " New  York ") == {"tokens": ["New", "York"]}
    assert record_of("chat", "a") == {"messages": [{"role": "user", "content": "a"}]}
    assert [*record_of("generate", "a"), *record_of("summarize", "a"), *record_of("text", "a")] == [
        "prompt", "document", "text",
    ]  # fmt: skip


def test_a_text_that_is_embedded_keeps_the_name_of_its_field() -> None:
    anchor = Example((Part("anchor", "a text", False),), Source("a.jsonl", 1), "text_pairs")
    assert input_fields(anchor) == {"anchor": "a text"}


def test_an_answer_of_a_chat_to_a_prompt_is_its_completion() -> None:
    prompt = Example((Part("user", "Hi", False),), Source("a.jsonl", 1), "prompt_completion", plain=True)
    assert as_row(prompt, {"answer": "Hello"}) == {"prompt": "Hi", "completion": "Hello"}


def test_rows_at_hand_are_texts_or_have_names() -> None:
    written: list[Line] = []
    stream = RowStream(Model(), written.extend, chunk_rows=4)
    read_list(["a", {"text": "bb"}, {"words": "c"}], Data(), "classify", stream)
    stream.flush()
    assert [line.get("value") for line in written] == [1, 2, None]
    assert written[2]["source"] == "rows:3"
    assert "error" in written[2]
