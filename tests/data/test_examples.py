"""Files to examples: shapes found and held to, fields renamed, and a split that depends on what rows say alone."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.rows_of import WRITERS, comma_separated, examples_in, json_lines, put, said
from tunesmith.data.examples import content_hash, examples, explain, input_hash
from tunesmith.data.hold_out import choose_share, few_note, held_out_mask
from tunesmith.errors import RecipeError
from tunesmith.phrases import nearest
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Example, Part, Problem, Source, TaskName

PAIR = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
HASHES = st.lists(st.integers(0, 2**64 - 1), min_size=1).map(lambda values: np.array(values, np.uint64))
SHARES = st.floats(0, 1, exclude_max=True)


def errors(problems: list[Any]) -> list[tuple[str, int]]:
    return said([problem for problem in problems if problem.severity == "error"])


def test_shape_is_that_of_the_first_good_row(tmp_path: Path):
    rows = [{"prompt": "no answer"}, CHAT, PAIR, CHAT]
    found, problems = examples_in(put(tmp_path, "rows.jsonl", json_lines(rows)))
    assert [(example.shape, example.source.line) for example in found] == [("messages", 2), ("messages", 4)]
    assert errors(problems) == [("missing_field", 1), ("other_shape", 3)]


def test_fields_that_nobody_reads_are_named_once(tmp_path: Path):
    rows = [PAIR, {**PAIR, "id": 1, "topic": "x"}, {**PAIR, "id": 2}]
    _, problems = examples_in(put(tmp_path, "rows.jsonl", json_lines(rows)))
    (problem,) = problems
    assert (problem.code, problem.source.line, problem.severity) == ("ignored_fields", 2, "warning")
    assert "'id'" in problem.message
    assert "'topic'" in problem.message


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"mesages": CHAT["messages"], "topic": "x"}, "{messages: mesages}"),
        ({"prompt": "a", "completon": "b"}, "{completion: completon}"),
        ({"promt": "a", "completon": "b"}, "{prompt: promt, completion: completon}"),
        ({"question": "a", "answer": "b"}, "{prompt: question, completion: answer}"),
    ],
)
def test_a_field_that_is_likely_misspelt_is_named_first(row: dict[str, Any], columns: str, tmp_path: Path):
    _, (problem,) = examples_in(put(tmp_path, "rows.jsonl", json_lines([row])))
    assert problem.fix.endswith(f"--set 'data.columns={columns}'.")
    assert ("Did you mean messages? Correct the name, or add " in problem.fix) == ("mesages" in row)


def test_example_rows_of_the_project_have_no_problem():
    paths = sorted((Path(__file__).parents[2] / "examples" / "data").glob("*.jsonl"))
    assert {path.name: examples_in(path)[1] for path in paths} == {path.name: [] for path in paths}
    assert len(paths) >= 2


@pytest.mark.parametrize("name", WRITERS)
def test_columns_rename_fields(name: str, tmp_path: Path):
    rows = [{"question": "a", "answer": "b", "n": "1"}]
    columns = {"prompt": "question", "completion": "answer"}
    (found,), problems = examples_in(put(tmp_path, name, WRITERS[name](rows)), columns=columns)
    assert [part.text for part in found.parts] == ["a", "b"]
    assert [problem.code for problem in problems] == ["ignored_fields"]


def test_a_mapped_field_that_is_missing_is_a_finding(tmp_path: Path):
    columns = {"prompt": "question", "completion": "answer"}
    rows = [{"question": "a", "answer": "b"}, {"question": "a"}]
    found, problems = examples_in(put(tmp_path, "rows.jsonl", json_lines(rows)), columns=columns)
    assert len(found) == 1
    assert said(problems) == [("missing_column", 2)]
    _, problems = examples_in(
        put(tmp_path, "t.csv", comma_separated([{"question": "a", "reply": "b"}])), columns=columns
    )
    assert said(problems) == [("missing_column", 1)]  # of a table once, not once a row


def test_a_file_without_any_mapped_field_is_read_as_it_is_and_that_is_said(tmp_path: Path):
    path = put(tmp_path, "rows.jsonl", json_lines([CHAT]))
    found, problems = examples_in(path, columns={"prompt": "question", "completion": "answer"})
    assert len(found) == 1
    assert said(problems) == [("columns_unused", 0)]


def test_a_file_to_predict_needs_no_column_of_answers(tmp_path: Path):
    columns, problems = {"text": "comment", "label": "sentiment"}, list[Problem]()
    path = put(tmp_path, "new.csv", comma_separated([{"comment": "good"}]))
    how: dict[str, Any] = {"task": "classify", "answered": False}
    found = list(examples([DataFile(path=str(path))], Data(columns=columns), problems.append, **how))
    assert [example.parts[0].text for _, example in found] == ["good"]
    assert not problems
    other = put(tmp_path, "other.csv", comma_separated([{"text": "good"}]))
    assert list(examples([DataFile(path=str(other))], Data(columns=columns), problems.append, **how))
    assert said(problems) == [("columns_unused", 0)]


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        ({"promt": "question"}, "Did you mean prompt?"),
        ({"question": "prompt"}, "Did you mean {prompt: question}?"),
        ({"zzz": "q"}, "no shape of rows has such a field. One of "),
        ({"prompt": "text", "completion": "text"}, "text is named for two fields"),
    ],
)
def test_columns_that_no_shape_has_are_refused(columns: dict[str, str], hint: str, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"data\.columns") as refused:
        examples_in(put(tmp_path, "rows.jsonl", json_lines([PAIR])), columns=columns)
    assert hint in str(refused.value)


@pytest.mark.parametrize(("task", "ours"), [("classify", ("text", "label")), (None, ("prompt", "completion"))])
def test_unknown_names_are_in_the_line_to_copy(task: TaskName | None, ours: tuple[str, str], tmp_path: Path) -> None:
    _, (problem,) = examples_in(put(tmp_path, "rows.jsonl", json_lines([{"uno": "a", "dos": "b"}])), task=task)
    assert f"'data.columns={{{ours[0]}: uno, {ours[1]}: dos}}'." in problem.fix


def test_the_fields_of_dolly_are_all_in_the_line_to_copy(tmp_path: Path) -> None:
    row = {"instruction": "a", "context": "b", "response": "c", "category": "qa"}
    _, (problem,) = examples_in(put(tmp_path, "rows.jsonl", json_lines([row])), task="chat")
    assert "data.columns={instruction: instruction, input: context, output: response}" in problem.fix


@pytest.mark.parametrize(
    ("row", "task", "fix"),
    [
        ({"text": "a", "label": "b"}, "chat", "Give --task classify."),
        (PAIR, "classify", "Give --task chat."),
        ({"text": "a"}, "classify", "Give --task text."),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chat", "Give --task prefer."),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "generate", "Give --task prefer."),
    ],
)
def test_rows_of_another_task_are_said_to_be_that(row: dict[str, Any], task: TaskName, fix: str, tmp_path: Path):
    _, (problem,) = examples_in(put(tmp_path, "rows.jsonl", json_lines([row])), task=task)
    assert problem.code == "other_task"
    assert problem.fix.startswith(fix)


@pytest.mark.parametrize(
    ("row", "task", "texts"),
    [
        ({"text": "a", "label": ""}, "classify", ["a"]),
        ({"text": "a"}, "classify", ["a"]),
        ({"document": "a"}, "summarize", ["a"]),
        ({"tokens": ["a", "b"]}, "tag", ["a", "b"]),
        ({"prompt": "a"}, "generate", ["a"]),
        ({"prompt": [{"role": "user", "content": "a"}]}, "chat", ["a"]),
        ({"instruction": "a", "input": "b"}, "chat", ["a\n\nb"]),
        ({"instruction": "a", "output": "b"}, "chat", ["a"]),
        (CHAT, "chat", ["a"]),
        ({"messages": CHAT["messages"][:1]}, "chat", ["a"]),
        ({"conversations": [{"from": "human", "value": "a"}]}, "chat", ["a"]),
        ({"text": ""}, "text", [""]),
    ],
)
def test_without_answers_an_example_is_what_a_prediction_is_made_from(
    row: dict[str, Any], task: TaskName, texts: list[str], tmp_path: Path
):
    path = put(tmp_path, "rows.jsonl", json_lines([row]))
    (example,), problems = examples_in(path, task=task, answered=False)
    assert [part.text for part in example.parts] == texts
    assert (example.labels, example.many) == ((), False)
    assert errors(problems) == []


def an_example(*parts: Part, tools: tuple[Any, ...] = (), line: int = 1) -> Example:
    return Example(parts, Source("x.jsonl", line), "messages", tools)


BASE = (Part("user", "a", False, {"name": "n", "x": {"p": 1, "q": 2}}), Part("assistant", "b", True))


def test_hash_is_the_one_it_has_always_been():
    # Written down: another value would move rows between the two sides of every data set split before.
    assert content_hash(an_example(Part("user", "Hi", False), Part("assistant", "Hello.", True))) == 965125519442618462


def test_hash_follows_what_a_row_says():
    user, answer = BASE
    others = [
        an_example(Part("system", "a", False, user.fields), answer),
        an_example(Part("user", "a ", False, user.fields), answer),
        an_example(Part("user", "a", False), answer),
        an_example(user, Part("assistant", "b", False)),
        an_example(user, answer, tools=({"name": "f"},)),
        an_example(answer, user),
        an_example(user),
    ]
    assert len({content_hash(example) for example in [an_example(*BASE), *others]}) == len(others) + 1


def test_hash_does_not_follow_where_a_row_stands():
    swapped = Part("user", "a", False, {"x": {"q": 2, "p": 1}, "name": "n"}), BASE[1]
    moved = Example(swapped, Source("other.csv", 99), "sharegpt")
    assert content_hash(moved) == content_hash(an_example(*BASE))


def test_hash_follows_labels_and_stays_the_same_without():
    text = (Part("text", "a", False),)
    some = [((), False), (("b",), False), (("c",), False), ((), True), (("b",), True), (("b", "c"), True)]
    hashes = [
        content_hash(Example(text, Source("x", 1), "text_label", labels=names, many=many)) for names, many in some
    ]
    assert len(set(hashes)) == len(some)
    assert hashes[0] == content_hash(an_example(*text))  # the hash of rows that have none
    turned = Example(text, Source("x", 1), "text_label", labels=("c", "b"), many=True)
    assert content_hash(turned) == hashes[-1]  # classes of one row have no order
    tags = [Example(text * 2, Source("x", 1), "tokens_tags", labels=tags) for tags in (("b", "c"), ("c", "b"))]
    assert content_hash(tags[0]) != content_hash(tags[1])


def stays_when_rows_are_added(held_out: Callable[[list[str]], dict[str, bool]]) -> None:
    rows = [f"row {i}" for i in range(300)]
    before, after = held_out(rows), held_out(["new", *rows[:100], "newer", *rows[100:]])
    assert sum(after[row] != before[row] for row in rows) <= 2


def by_content(rows: list[str]) -> dict[str, bool]:
    hashes = np.array([content_hash(an_example(Part("assistant", row, True))) for row in rows], np.uint64)
    return dict(zip(rows, held_out_mask(hashes, 0.1).tolist(), strict=True))


def test_rows_that_are_added_move_no_more_others_than_they_are():
    stays_when_rows_are_added(by_content)


def test_a_split_by_chance_would_be_caught():
    def by_chance(rows: list[str]) -> dict[str, bool]:
        draw = random.Random(0)
        return {row: draw.random() < 0.1 for row in rows}

    with pytest.raises(AssertionError):
        stays_when_rows_are_added(by_chance)


@pytest.mark.parametrize(
    ("num_rows", "num_held"),
    [(2, 0), (15, 3), (60, 12), (100, 20), (250, 50), (500, 50), (600, 60), (1000, 100), (2000, 100), (10_000, 500)],
)
def test_the_share_by_itself_is_enough_to_measure_on(num_rows: int, num_held: int):
    choice = choose_share(num_rows)
    assert round(choice.value * num_rows) == num_held
    assert f"about {max(1, num_held):,} of {num_rows:,} rows" in choice.reason


def test_too_few_held_out_rows_are_said_to_be_that():
    assert few_note(0) is None
    assert few_note(30) is None
    assert few_note(1).startswith("1 held-out row is too few")
    assert "uncertain by up to 22 points" in few_note(20)


@given(hashes_I=HASHES, share=SHARES)
def test_split_leaves_no_side_empty_and_keeps_equal_rows_together(hashes_I: np.ndarray, share: float):
    mask_I = held_out_mask(hashes_I, share)
    for value in np.unique(hashes_I):
        assert len(set(mask_I[hashes_I == value].tolist())) == 1
    if share == 0 or len(np.unique(hashes_I)) == 1:
        assert not mask_I.any()
    else:
        assert mask_I.any()
        assert not mask_I.all()


@given(hashes_I=HASHES, shares=st.tuples(SHARES, SHARES))
def test_a_larger_share_holds_out_the_same_rows_and_more(hashes_I: np.ndarray, shares: tuple[float, float]):
    less, more = (held_out_mask(hashes_I, share) for share in sorted(shares))
    assert not (less & ~more).any()


def test_conversations_with_one_first_turn_have_one_input():
    question, greeting = Part("user", "What is DNA?", False), Part("system", "Be short.", False)
    answers = [Part("assistant", text, True) for text in ("A molecule.", "The code of life.")]
    again = (Part("user", "Thanks", False), Part("assistant", "Welcome.", True))
    rows = [
        an_example(question, answers[0]),
        an_example(question, answers[1]),
        an_example(question, answers[0], *again),
    ]
    assert len({input_hash(row) for row in rows}) == 1
    assert len({content_hash(row) for row in rows}) == 3
    assert input_hash(an_example(greeting, question, answers[0])) != input_hash(rows[0])


def test_a_row_of_many_fields_is_explained_at_once() -> None:
    """difflib takes 0.1 ms for each name."""
    record = {f"column {num}": "1" for num in range(90_000)}
    started = time.monotonic()
    code, message, _ = explain(record, None, "", {})
    assert (code, "and 89,980 more" in message) == ("unknown_shape", True)
    assert nearest("promt", ["prompt", *record], 0.8) == "prompt"
    assert nearest("a" * 10**6, ["a" * 10**6, "b"], 0.8) is None
    assert time.monotonic() - started < 2
