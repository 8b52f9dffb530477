"""Files whose fields have other names: what is read without a word, and what each hint that is printed would teach."""

import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from data.rows_of import comma_separated, json_lines, put
from tunesmith.data.check import CheckReport, check, spans_of_texts
from tunesmith.data.columns import meanings, usual_meaning, values_of
from tunesmith.data.examples import examples
from tunesmith.recipe import load
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import TaskName

WORDS = re.findall(
    r"\w+", "the product arrived late and its box was broken but they helped once I called about it again"
)
DRAWN = random.Random(0)


def text(num: int = 12) -> str:
    return " ".join(DRAWN.choice(WORDS) for _ in range(num)) + "."


def one_of(*values: Any) -> Any:
    return lambda i: values[i % len(values)]


def table(num: int = 60, **columns: Any) -> list[dict[str, Any]]:
    return [{name: value(i) if callable(value) else value for name, value in columns.items()} for i in range(num)]


def words(num: int = 12) -> Any:
    return lambda i: text(num)


ODD: dict[str, tuple[list[dict[str, Any]], list[dict[str, str]]]] = {
    "a counter, a text, a class and dates": (
        table(
            ID=lambda i: i + 1, Bewertung=words(), Stimmung=one_of("gut", "schlecht"),
            Datum=lambda i: f"0{1 + i % 9}.03.24",
        ),
        [{"text": "Bewertung", "label": "Stimmung"}, {"text": "Bewertung"}],
    ),
    "parentheses": (
        table(id=lambda i: f"bbc{i}", **{"Rubrik (BBC)": one_of("sport", "tech")}, body=words(40)),
        [{"text": "body", "label": "Rubrik (BBC)"}, {"text": "body"}],
    ),
    "quotes and commas": (
        table(**{"Kunde's \"Text\"": words(), "Art, (neu) ": one_of("ja", "nein")}),
        [{"text": "Kunde's \"Text\"", "label": "Art, (neu) "}, {"text": "Kunde's \"Text\""}],
    ),
    "names that are values in YAML": (
        table(yes=words(), null=one_of("a", "b")),
        [{"text": "yes", "label": "null"}, {"text": "yes"}],
    ),
    "a dollar and a backquote": (
        table(**{"$HOME `id`": words(), "#2: x": one_of("a", "b")}),
        [{"text": "$HOME `id`", "label": "#2: x"}, {"text": "$HOME `id`"}],
    ),
    "two texts and a team": (
        table(Kunde=words(), Antwort=words(8), Team=one_of("A", "B")),
        [{"text": "Kunde", "label": "Team"}, {"prompt": "Kunde", "completion": "Antwort"}],
    ),
    "two texts": (
        table(Frage=words(), Antwort=words(8)),
        [{"prompt": "Frage", "completion": "Antwort"}, {"prompt": "Antwort", "completion": "Frage"}],
    ),
    "two texts in few rows": (
        table(3, Frage=words(), Antwort=words(8)),
        [{"prompt": "Frage", "completion": "Antwort"}, {"prompt": "Antwort", "completion": "Frage"}],
    ),
    "a question about a text": (
        table(context=words(40), question=words(8), answer=words(3)),
        [
            {"instruction": "question", "input": "context", "output": "answer"},
            {"prompt": "question", "completion": "answer"},
        ],
    ),
    "two classes": (
        table(Bericht=words(), Land=one_of("DE", "AT"), Sparte=one_of("x", "y", "z")),
        [{"text": "Bericht", "label": "Land"}, {"text": "Bericht", "label": "Sparte"}],
    ),
    "a price": (
        table(Inserat=words(), Preis=lambda i: f"{DRAWN.uniform(1, 99):.2f}"),
        [{"text": "Inserat", "label": "Preis"}, {"text": "Inserat"}],
    ),
    "stars and a user": (
        table(userId=lambda i: i % 7, opinion=words(), grade=one_of(1, 2, 3, 4, 5)),
        [{"text": "opinion", "label": "grade"}, {"text": "opinion"}],
    ),
    "one text": (table(opinion=words()), [{"text": "opinion"}]),
    "one text and its address": (
        table(opinion=words(), link=lambda i: f"https://a.b/{i}", at=lambda i: f"2024-01-0{1 + i % 9}"),
        [{"text": "opinion"}],
    ),
    "one constant": (table(opinion=words(), version="v1"), [{"text": "opinion"}]),
    "few rows": (
        table(3, opinion=words(), mood=one_of("good", "bad", "fair")),
        [{"text": "opinion", "label": "mood"}, {"prompt": "opinion", "completion": "mood"}],
    ),
    "phrases": (
        table(40, phrase=lambda i: f"term {chr(97 + i % 26)}{i}x", chapter=one_of("eye", "ear")),
        [{"text": "phrase", "label": "chapter"}, {"text": "phrase"}],
    ),
    "several classes a row": (
        table(opinion=words(), themes=one_of(["a"], ["a", "b"], ["c"])),
        [{"text": "opinion", "label": "themes"}, {"text": "opinion"}],
    ),
    "true and false": (
        table(opinion=words(), useful=one_of(True, False)),
        [{"text": "opinion", "label": "useful"}, {"text": "opinion"}],
    ),
    "ids alone": (table(id=lambda i: i, hash=lambda i: f"{i:032x}"), []),
    "objects": (table(data=lambda i: {"q": text(), "a": text()}), []),
}  # fmt: skip


def hints(said: str) -> list[list[str]]:
    """The settings of each hint, as a shell reads what is pasted."""
    return [shlex.split(line.rstrip(". ")) for line in re.findall(r"(?<=: )--set .*?(?=\. To learn |\.$|\.\n)", said)]


def of(path: Path, settings: list[str]) -> Data:
    data = load.load(None, settings[1::2]).data
    return data.model_copy(update={"train": (DataFile(path=str(path)),)})


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_each_hint_can_be_pasted_and_teaches_what_it_says(name: str, kind: str, tmp_path: Path) -> None:
    rows, expected = ODD[name]
    if kind == "csv" and any(isinstance(value, (list, dict)) for value in rows[0].values()):
        pytest.skip("a table has no lists")
    path = put(tmp_path, f"odd.{kind}", comma_separated(rows) if kind == "csv" else json_lines(rows))
    report = check(Data(train=(DataFile(path=str(path)),)))
    assert not report.ok
    said = report.problems[0].fix
    assert [of(path, hint).columns for hint in hints(said)] == expected
    for hint, columns in zip(hints(said), expected, strict=True):
        task = dict(word.split("=", 1) for word in hint[1::2]).get("task")
        data = of(path, hint)
        assert check(data, task=task).ok, hint
        _, example = next(iter(examples(data.train, data, lambda problem: None, task=task)))
        learnt = example.labels or [part.text for part in example.parts if part.trained]
        last = rows[0][list(columns.values())[-1]]
        spelt = str(last).lower() if isinstance(last, bool) and kind == "jsonl" else str(last)
        assert list(learnt) == (last if isinstance(last, list) else [spelt])


def assert_none_teaches_nonsense(rows: list[dict[str, Any]], suggested: list[dict[str, str]]) -> None:
    """What is read or learnt is neither a counter nor a date nor an id, and no class is a text."""
    kinds = values_of(rows)
    for columns in suggested:
        assert not [theirs for theirs in columns.values() if kinds[theirs] == "other"]
        assert "label" not in columns or kinds[columns["label"]] in ("label", "number", "name")
        assert "text" not in columns or kinds[columns["text"]] in ("text", "name")


# trap: T20
def test_hints_follow_values_and_not_places() -> None:
    for rows, _ in ODD.values():
        assert_none_teaches_nonsense(rows, [one.columns for one in meanings(rows, None)])

    def by_place(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
        return [dict(zip(("prompt", "completion"), rows[0], strict=False))]

    counted = ODD["a counter, a text, a class and dates"][0]
    with pytest.raises(AssertionError):
        assert_none_teaches_nonsense(counted, by_place(counted))


USUAL = [
    ({"question": words(), "answer": words(6)}, {"prompt": "question", "completion": "answer"}),
    ({"Question": words(), "Answer": words(1)}, {"prompt": "Question", "completion": "Answer"}),
    ({"user": words(), "assistant": words(6)}, {"instruction": "user", "output": "assistant"}),
    (
        {"system": words(4), "user": words(), "assistant": words(6)},
        {"instruction": "user", "output": "assistant", "system": "system"},
    ),
    (
        {"instruction": words(), "context": one_of("", text(30)), "response": words(9), "category": one_of("a", "b")},
        {"instruction": "instruction", "input": "context", "output": "response"},
    ),
    ({"comment": words(), "sentiment": one_of("good", "bad")}, {"text": "comment", "label": "sentiment"}),
    ({"Review Text": words(), "Rating": one_of("1", "2", "5")}, {"text": "Review Text", "label": "Rating"}),
    ({"id": lambda i: i, "tweet": words(), "intent": one_of("buy", "ask")}, {"text": "tweet", "label": "intent"}),
    ({"sentence": words(), "stars": one_of(1, 2, 3)}, {"text": "sentence", "label": "stars"}),
    ({"headline": words(4), "topic": one_of("a", "b")}, {"text": "headline", "label": "topic"}),
    (
        {"title": words(4), "body": words(30), "category": one_of("a", "b")},
        {"text": "title", "text_pair": "body", "label": "category"},
    ),
]  # fmt: skip


def checked(path: Path, task: TaskName | None = None) -> CheckReport:
    return check(Data(train=(DataFile(path=str(path)),)), task=task)


@pytest.mark.parametrize(("columns", "expected"), USUAL)
def test_usual_names_are_read_and_that_is_said(
    columns: dict[str, Any], expected: dict[str, str], tmp_path: Path
) -> None:
    rows = table(**columns)
    report = checked(put(tmp_path, "rows.csv", comma_separated(rows)))
    assert report.ok
    assert report.files[0].usable == 60
    renamed = [f"{theirs!r} is read as {ours}" for ours, theirs in expected.items() if ours != theirs]
    assert any(note.endswith(", ".join(renamed)) for note in report.notes)
    assert usual_meaning(rows, None).columns == expected  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "columns",
    [
        {"comment": words(), "reply": words()},  # two texts
        {"comment": words(), "reply": words(), "sentiment": one_of("a", "b")},  # which of them?
        {"comment": words(), "sentiment": words()},  # no class
        {"comment": words(), "sentiment": one_of("a", "b"), "topic": one_of("x", "y", "z")},  # which class?
        {"question": words(), "context": words(30), "answer": words()},
        {"question": words(), "answer": words(), "response": words()},
        {"question": lambda i: {"text": "a"}, "answer": words()},
        {"comment": words()},
        {"Comment": words(), "comment": words(), "sentiment": one_of("a", "b")},
        {"rating": one_of(1, 2), "sentiment": one_of("a", "b")},
    ],
)
def test_what_is_not_clear_is_not_read(columns: dict[str, Any]) -> None:
    assert usual_meaning(table(**columns), None) is None


def test_two_texts_in_few_rows_never_become_language_modelling(tmp_path: Path) -> None:
    for others in ({"urgency": one_of("high", "low"), "team": one_of("A", "B")}, {"reply": words()}):
        report = checked(put(tmp_path, "few.csv", comma_separated(table(2, text=words(), **others))))
        assert any("Is the text to be learnt, or its class?" in refusal for refusal in report.refusals)


def test_files_that_name_one_field_differently_are_not_guessed(tmp_path: Path) -> None:
    paths = [
        put(tmp_path, f"{i}.csv", comma_separated(table(**{name: words(), "sentiment": one_of("a", "b")})))
        for i, name in enumerate(("comment", "review"))
    ]
    report = check(Data(train=tuple(DataFile(path=str(path)) for path in paths)))
    assert [problem.code for problem in report.problems] == ["unknown_shape"] * 2


def test_values_say_what_a_column_holds() -> None:
    rows = table(
        n=lambda i: i, when=lambda i: f"2024-01-{1 + i % 28:02d}", url=lambda i: f"https://a.b/{i}",
        mail=lambda i: f"a{i}@b.de", uuid=lambda i: f"{i:08x}-0000-4000-8000-{i:012x}", code=lambda i: f"A-{i:04d}",
        one="x", none=None, user_id=one_of(1, 2), mood=one_of("good", "bad"), stars=one_of("1", "2", "3"),
        price=lambda i: f"{i / 7:.3f}", said=words(), who=lambda i: f"Ann {chr(97 + i % 26)}{i}q",
    )  # fmt: skip
    kinds = values_of(rows)
    others = ("n", "when", "url", "mail", "uuid", "code", "one", "none", "user_id")
    assert {name: kinds[name] for name in others} == dict.fromkeys(others, "other")
    assert [kinds[name] for name in ("mood", "stars", "price", "said", "who")] == [
        "label",
        "label",
        "number",
        "text",
        "name",
    ]


def test_a_task_that_is_given_gets_hints_of_its_own() -> None:
    rows = table(Kunde=words(), Antwort=words(8), Team=one_of("A", "B"))
    fields = {
        task: [set(one.columns) for one in meanings(rows, task)] for task in ("classify", "text", "embed", "summarize")
    }
    assert fields["classify"] == [{"text", "label"}]
    assert fields["text"] == [{"text"}]
    assert fields["embed"] == [{"anchor", "positive"}]
    assert fields["summarize"] == [{"document", "summary"}]
    assert meanings(rows, "tag") == []


def test_a_teacher_teaches_the_answers_that_a_chat_would_learn() -> None:
    rows = table(question=words(), answer=words(8))
    assert usual_meaning(rows, "distil") == usual_meaning(rows, "chat")
    assert [str(one) for one in meanings(rows, "distil")] == [str(one) for one in meanings(rows, "chat")]


def test_short_answers_that_differ_may_be_learnt_from_many_rows() -> None:
    """Sixty questions, each with a name for an answer: what they teach is not the questions alone."""
    rows = table(stem=words(), gold=lambda i: f"Ann {chr(97 + i % 26)}{i}q", author=lambda i: f"Bo {i}x")
    assert values_of(rows)["gold"] == "name"
    assert meanings(rows, None)[0].columns == {"prompt": "stem", "completion": "gold"}


def test_all_that_is_read_of_a_row_is_shown(tmp_path: Path) -> None:
    rows = [{"query": "red", "documents": ["a rose", "the sky"], "labels": [1, 0]}]
    path = put(tmp_path, "rank.jsonl", json_lines(rows))
    data = Data(train=(DataFile(path=str(path)),))
    ((_, example),) = examples(data.train, data, pytest.fail)
    shown = "".join(span for span, _ in spans_of_texts(example))
    assert shown == "query: red\ndocument: a rose\n1.0\ndocument: the sky\n0.0\n"
    assert check(data).forms == ((f"{path}:1: ranked_documents", spans_of_texts(example)),)


def test_files_are_read_for_one_task_as_in_training(tmp_path: Path) -> None:
    prefs = put(tmp_path, "prefs.jsonl", json_lines([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3))
    pairs = put(tmp_path, "pairs.jsonl", json_lines([{"anchor": f"a{i}", "positive": "b"} for i in range(3)]))
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    chats, plain = (
        put(tmp_path, name, json_lines([row] * 3))
        for name, row in (("chats.jsonl", chat), ("plain.jsonl", {"instruction": "a", "output": "b"}))
    )
    refused = check(Data(train=(DataFile(path=str(prefs)), DataFile(path=str(pairs)))))
    assert refused.errors == {"other_task": 3}
    assert {problem.fix for problem in refused.problems if problem.code == "other_task"} == {
        "Give --task embed. Files of two tasks need two runs."
    }
    both = check(Data(train=(DataFile(path=str(chats)), DataFile(path=str(plain)))))
    assert both.ok
    assert [place.rpartition(": ")[2] for place, _ in both.forms] == ["messages", "alpaca"]


def test_classes_of_few_rows_are_named(tmp_path: Path) -> None:
    rows = table(120, text=words(), label=lambda i: "neutral" if i < 4 else "ab"[i % 2])
    notes = checked(put(tmp_path, "rare.csv", comma_separated(rows))).notes
    assert any("'neutral' (4 rows, 1 of them held out)" in note for note in notes)


def test_classes_that_may_be_missing_labels_are_named(tmp_path: Path) -> None:
    rows = table(text=words(), label=one_of("a", "b", "NaN"))
    notes = checked(put(tmp_path, "nan.csv", comma_separated(rows))).notes
    assert any("learnt as classes: 'NaN' (20 rows)" in note for note in notes)


def first_fix(path: Path) -> str:
    return check(Data(train=(DataFile(path=str(path)),))).problems[0].fix


def test_a_text_that_is_called_message_is_no_conversation(tmp_path: Path) -> None:
    rows = table(date=lambda i: f"2024-01-{1 + i % 28:02d}", message=words(), department=one_of("sales", "support"))
    fix = first_fix(put(tmp_path, "rows.csv", comma_separated(rows)))
    assert "data.columns={text: message, label: department}" in fix
    assert "messages" not in fix
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert "{messages: message}" in first_fix(put(tmp_path, "chats.jsonl", json_lines([{"message": turns}] * 3)))


def test_rows_in_an_object_and_roles_of_other_programs_have_a_way_out(tmp_path: Path) -> None:
    whole = put(tmp_path, "whole.json", json_lines([{"data": [{"input": "a", "output": "b"}] * 3}]))
    assert first_fix(whole) == "'data' is a list of objects: if they are the rows, give a file of that list alone."
    turns = [{"role": "Human", "content": "a"}, {"role": "assistant", "content": "b"}]
    roles = put(tmp_path, "roles.jsonl", json_lines([{"messages": turns}]))
    assert first_fix(roles) == "One of assistant, developer, system, tool, user. Write user for it."


def test_a_name_that_nobody_would_type_is_in_no_hint() -> None:
    rows = table(text=words(), **{"mood" * 200: one_of("glad", "sad")})
    assert list(values_of(rows)) == ["text"]
