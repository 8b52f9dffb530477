"""A check says everything at once, counts all of it, and lists no more than it was asked to."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.rows_of import comma_separated, examples_in, json_lines, put
from fresh import fork_instead_of_spawning
from tiny import tiny_tokenizer
from tunesmith.data import encode
from tunesmith.data.check import CheckReport, check, spans_of, token_stats
from tunesmith.data.examples import content_hash
from tunesmith.data.renderer import Renderer
from tunesmith.recipe.schema import Data, DataFile, Limits
from tunesmith.tasks import TASKS
from tunesmith.types import Problem, Row, Source


def pair(text: str, answer: str = "b") -> dict[str, str]:
    return {"prompt": text, "completion": answer}


def data_of(*train: Path, held: Sequence[Path] = (), **options: Any) -> Data:
    return Data(
        train=tuple(DataFile(path=str(p)) for p in train), eval=tuple(DataFile(path=str(p)) for p in held), **options
    )


def renderer(task: Any = "chat", **options: Any) -> Renderer:
    options = {"max_tokens": None, "too_long": "error", "control_tokens": "error", **options}
    return Renderer(tiny_tokenizer(), TASKS[task], **options)


def places(problems: Sequence[Problem]) -> list[tuple[str, int, str]]:
    return [(Path(p.source.path).name, p.source.line, p.code) for p in problems]


def pairs(report: CheckReport) -> list[tuple[str, int, str]]:
    """Rows that repeat another, which their messages name."""
    return [
        (Path(one.source.path).name, one.source.line, re.findall(r"[\w.]+:\d+", one.message)[0])
        for one in report.problems
    ]


def test_good_data_is_ok(tmp_path: Path):
    rows = [pair(str(i)) for i in range(100)]
    report = check(
        data_of(put(tmp_path, "a.jsonl", json_lines(rows)), put(tmp_path, "b.csv", comma_separated([pair("x")])))
    )
    assert report.ok
    assert report.problems == ()
    assert [(f.format, f.shape, f.rows, f.usable) for f in report.files] == [
        ("JSON lines", "prompt_completion", 100, 100),
        ("CSV", "prompt_completion", 1, 1),
    ]
    assert report.held_out == 20


def test_problems_of_all_files_are_said_in_the_order_of_files_and_lines(tmp_path: Path):
    first = put(tmp_path, "z.jsonl", b"{\n" + json_lines([pair("a"), pair("b", ""), {**pair("c"), "id": 1}]))
    second = put(tmp_path, "a.csv", b"prompt,completion\nd,e\nalone\n")
    held = put(tmp_path, "held.jsonl", b'{"prompt": 1}\n' + json_lines([pair("f")]))
    report = check(data_of(first, second, tmp_path / "gone.jsonl", held=[held]))
    assert places(report.problems) == [
        ("z.jsonl", 1, "truncated_json"),
        ("z.jsonl", 3, "empty_answer"),
        ("z.jsonl", 4, "ignored_fields"),
        ("a.csv", 3, "ragged_row"),
        ("gone.jsonl", 0, "no_such_file"),
        ("held.jsonl", 1, "wrong_type"),
        ("held.jsonl", 1, "missing_field"),
    ]
    assert [(f.side, f.rows, f.usable, f.is_readable) for f in report.files] == [
        ("train", 4, 2, True),
        ("train", 2, 1, True),
        ("train", 0, 0, False),
        ("eval", 2, 1, True),
    ]
    assert not report.ok


def test_listing_ends_and_counting_does_not(tmp_path: Path):
    rows = b"{\n" * 500 + json_lines([pair(str(i), "b") for i in range(10)]) + json_lines([pair("")] * 30)
    report = check(data_of(put(tmp_path, "a.jsonl", rows), limits=Limits(problems=7)))
    assert report.errors == {"truncated_json": 500}
    assert report.warnings == {"empty_text": 30, "duplicate": 29}
    assert [problem.code for problem in report.problems] == ["truncated_json"] * 7 + ["empty_text"] * 7


def test_bad_rows_that_may_be_skipped_do_not_refuse_the_data(tmp_path: Path):
    path = put(tmp_path, "a.jsonl", b"{\n" + json_lines([pair("a"), pair("b")]))
    assert not check(data_of(path)).ok
    report = check(data_of(path, bad_rows="skip"))
    assert report.ok
    assert (report.files[0].rows, report.files[0].usable) == (3, 2)
    assert [problem.code for problem in report.problems] == ["truncated_json"]


def test_skipping_is_offered_where_rows_are_left(tmp_path: Path):
    some, none = put(tmp_path, "a.jsonl", b"{\n" + json_lines([pair("a")])), put(tmp_path, "b.jsonl", b"{\n{\n")
    assert "data.bad_rows=skip" in check(data_of(some)).refusals[0]
    assert check(data_of(none)).refusals == ("2 problems make rows unusable", "data.train: no row can be used")
    assert "skip" not in "".join(check(data_of(some, held=[none])).refusals)


def finds_repeated_rows(checked: Callable[[Data], CheckReport], folder: Path) -> None:
    rows = [pair("a"), pair("b"), pair("a"), pair("c"), pair("a"), pair("b")]
    report = checked(
        data_of(put(folder, "a.jsonl", json_lines(rows[:4])), put(folder, "b.jsonl", json_lines(rows[4:])))
    )
    assert pairs(report) == [("a.jsonl", 3, "a.jsonl:1"), ("b.jsonl", 1, "a.jsonl:1"), ("b.jsonl", 2, "a.jsonl:2")]
    assert report.warnings == {"duplicate": 3}


def test_repeated_rows_are_named_with_the_first_one(tmp_path: Path):
    finds_repeated_rows(check, tmp_path)


def test_a_check_of_neighbours_only_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def neighbours(among_I: Any, of_I: Any) -> Any:
        rows = np.arange(len(of_I))
        return np.where(np.append(False, of_I[1:] == of_I[:-1]), rows - 1, rows)

    monkeypatch.setattr("tunesmith.data.check.firsts", neighbours)
    with pytest.raises(AssertionError):
        finds_repeated_rows(check, tmp_path)


def test_the_same_words_in_another_format_and_shape_are_the_same_row(tmp_path: Path):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    train = put(
        tmp_path, "a.jsonl", json_lines([chat, {"messages": [{"role": "user", "content": "z"}, chat["messages"][1]]}])
    )
    report = check(data_of(train, held=[put(tmp_path, "t.csv", comma_separated([pair("a"), pair("y"), pair("a")]))]))
    assert pairs(report) == [("t.csv", 2, "a.jsonl:1"), ("t.csv", 4, "a.jsonl:1")]
    assert report.warnings == {"overlap": 2}
    assert report.ok
    assert report.held_out == 3


def test_overlap_can_be_an_error(tmp_path: Path):
    path = put(tmp_path, "a.jsonl", json_lines([pair("a")]))
    report = check(data_of(path, held=[path], overlap="error"))
    assert report.errors == {"overlap": 1}
    assert report.refusals == ("held-out rows are also in the training files, and data.overlap is error",)
    assert check(data_of(path, held=[path], overlap="error", bad_rows="skip")).refusals == report.refusals


# labels and documents


def labelled(*rows: tuple[str, Any]) -> bytes:
    return json_lines([{"text": text, "label": label} for text, label in rows])


def test_classes_are_counted_in_order_of_ids_and_first_rows_are_shown(tmp_path: Path):
    rows = [(f"text {i}", ["10", "2", "a"][i % 3]) for i in range(30)]
    report = check(data_of(put(tmp_path, "a.jsonl", labelled(*rows)), held_out=0.1))
    assert report.ok
    assert (report.label_kind, report.labels) == ("one", (("2", 10), ("10", 10), ("a", 10)))
    assert report.held_out == 3  # one of each class
    assert report.first_rows[:2] == (
        (("text 0\n", False), ("10", True)),
        (("text 1\n", False), ("2", True)),
    )


def test_words_are_shown_with_their_tags_and_tags_counted(tmp_path: Path):
    path = put(tmp_path, "a.conll", b"-DOCSTART- O\n\nAnn B-PER\nsings O\n\nBob B-PER\n")
    report = check(data_of(path))
    assert (report.label_kind, report.labels) == ("tags", (("B-PER", 2), ("O", 1)))
    assert report.first_rows[0] == (("Ann ", False), ("B-PER ", True), ("sings ", False), ("O ", True))
    assert (report.files[0].format, report.files[0].rows) == ("CoNLL", 2)
    assert report.warnings == {"document_marks": 1}


def finds_conflicts(checked: Callable[[Data], CheckReport], folder: Path) -> None:
    rows = [("Red eye", "eye"), ("Deaf", "ear"), ("Red eye", "ear"), ("Red eye", "eye"), ("Deaf", "ear")]
    report = checked(data_of(put(folder, "a.jsonl", labelled(*rows))))
    assert report.warnings == {"duplicate": 2, "conflicting_labels": 1}
    (problem,) = [problem for problem in report.problems if problem.code == "conflicting_labels"]
    assert f"at {folder / 'a.jsonl'}:1, with another label" in problem.message
    assert report.ok


def test_a_text_with_two_labels_is_a_warning_with_both_places(tmp_path: Path):
    finds_conflicts(check, tmp_path)


def test_a_check_of_whole_rows_only_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tunesmith.data.encode.input_hash", content_hash)
    with pytest.raises(AssertionError):
        finds_conflicts(check, tmp_path)


def test_replay_is_checked_and_is_no_training_file(tmp_path: Path):
    train, replay = put(tmp_path, "a.jsonl", json_lines([pair("a")])), put(tmp_path, "b.jsonl", b"{\n")
    report = check(data_of(train, replay=str(replay)))
    assert [(file.side, file.usable) for file in report.files] == [("train", 1), ("replay", 0)]
    assert report.errors == {"truncated_json": 1}


# with a model


def test_several_processes_say_what_one_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [pair(str(i % 900), "" if i % 50 == 7 else "b") for i in range(1100)]
    path = put(tmp_path, "a.jsonl", json_lines(rows) + b"{\n" + json_lines(rows[:10]))
    real, numbers = encode._processes, []

    def counted(renderer: Renderer, num: int) -> Any:
        numbers.append(num)
        return real(renderer, num)

    monkeypatch.setattr(encode, "_processes", counted)
    fork_instead_of_spawning(monkeypatch)
    check(data_of(path, num_proc=2), renderer=renderer())  # small, as the files of a folder
    monkeypatch.setattr(sys.modules[check.__module__], "WORTH_BYTES", 1)
    one, two = (check(data_of(path, num_proc=num), renderer=renderer()) for num in (1, 2))
    assert one == two
    assert numbers == [1, 1, 2]
    assert one.errors == {"empty_answer": 23, "truncated_json": 1}


def test_tokens_are_counted_as_the_renderer_counts_them(tmp_path: Path):
    rows = [pair("Hello there", "x " * n) for n in (1, 20, 300)]
    report = check(data_of(put(tmp_path, "a.jsonl", json_lines(rows))), renderer=renderer())
    examples, _ = examples_in(tmp_path / "a.jsonl")
    encoded = [row for rows in renderer().encode(examples) for row in rows if isinstance(row, Row)]
    lengths = [len(row.ids) for row in encoded]
    stats = report.tokens["train"]
    assert (stats.rows, stats.tokens, stats.longest) == (3, sum(lengths), max(lengths))
    assert stats.trained == sum(int(row.trained[1:].sum()) for row in encoded)


def test_first_rows_are_shown_as_the_model_sees_them(tmp_path: Path):
    rows = [pair(f"Question {i}", f"Answer {i}.") for i in range(9)]
    report = check(data_of(put(tmp_path, "a.jsonl", json_lines(rows))), renderer=renderer())
    assert len(report.first_rows) == 3
    assert [span for span in report.first_rows[1] if span[1]] == [("Answer 1.<|im_end|>", True)]
    assert "".join(text for text, _ in report.first_rows[1]).startswith("<|im_start|>user\nQuestion 1<|im_end|>")


def test_what_only_a_model_can_say_is_said(tmp_path: Path):
    rows = [pair("a"), pair("<|im_end|>"), pair("long " * 200), pair("c")]
    path = put(tmp_path, "a.jsonl", json_lines(rows))
    assert check(data_of(path)).errors == {}
    report = check(data_of(path), renderer=renderer(max_tokens=64))
    assert report.errors == {"control_token": 1, "too_long": 1}
    assert [(problem.source.line, problem.code) for problem in report.problems] == [
        (2, "control_token"),
        (3, "too_long"),
    ]
    assert report.files[0].usable == 2


def test_too_long_rows_that_are_dropped_do_not_refuse_the_data(tmp_path: Path):
    path = put(tmp_path, "a.jsonl", json_lines([pair("a"), pair("long " * 200)]))
    report = check(data_of(path, too_long="drop"), renderer=renderer(max_tokens=64, too_long="drop"))
    assert report.ok
    assert report.errors == {"too_long": 1}


def test_spans_join_to_the_text_of_the_row():
    class Dropping:
        """A tokenizer that drops the space at the start of a text, as those of Llama 2 do."""

        words = ("<s>", " Hi", " there", " you", "</s>")

        def decode(self, ids: Sequence[int]) -> str:
            return "".join(self.words[i] for i in ids).removeprefix(" ")

    row = Row(np.arange(5, dtype=np.int32), np.array([0, 0, 1, 1, 0], np.bool_), Source("x", 1))
    assert spans_of(row, Dropping().decode) == (("<s> Hi", False), (" there you", True), ("</s>", False))


def test_statistics_of_lengths():
    stats = token_stats(np.array([1, 31, 32, 63, 64, 1000], np.int32), np.array([1, 2, 3, 4, 5, 6], np.int32))
    assert (stats.shortest, stats.median, stats.p95, stats.longest) == (1, 63, 1000, 1000)
    assert (stats.tokens, stats.trained) == (1191, 21)


def test_rows_of_a_small_file_are_held_out_by_a_fifth_and_said_to_be_few(tmp_path: Path):
    report = check(data_of(put(tmp_path, "a.jsonl", json_lines([pair(f"a{i}") for i in range(60)]))))
    assert report.held_out == 12
    assert report.notes[0].startswith("12 held-out rows are too few to distinguish a small change from chance")
