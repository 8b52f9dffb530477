"""`tunesmith grade`: measures with exact numbers, verdicts, exit codes; the answers of a model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tunesmith.cli.app import app
from tunesmith.cli.grade import _keep
from tunesmith.graders import trial
from tunesmith.graders.grade import Answer, Grade
from tunesmith.graders.prompts import Prompt, read_prompts
from tunesmith.graders.trial import MODEL, Graded
from tunesmith.graders.verdict import verdicts
from tunesmith.recipe.schema import Data, DataFile

ROWS = [
    {"prompt": "Is a cat an animal?", "answer": "yes"},
    {"prompt": "Is a stone an animal?", "answer": "no"},
    {"prompt": "What does a cat say?", "answer": "it says meow"},
]
RIGHT = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "eq"}
ECHO = {"type": "string_check", "input": "{{item.prompt}}", "reference": "a", "operation": "like"}
LONGER = "def grade(sample, item):\n    return len(sample['output_text'])\n"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def grade(rows: Path, grader: Any, *words: str | Path, code: int = 0) -> Any:
    file = rows.with_name("grader.py" if isinstance(grader, str) else "grader.json")
    file.write_text(grader if isinstance(grader, str) else json.dumps(grader))
    words = ("grade", rows, "--grader", file, *words)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output or code == 2
    return result


def test_a_grader_that_tells_answers_apart_is_found_good(rows: Path, tmp_path: Path) -> None:
    page = tmp_path / "tried.html"
    lines = grade(rows, RIGHT, "--page", page).stdout.splitlines()
    assert lines[1] == "the row's reference\t1.000\t1.000 to 1.000\tall 1"
    assert lines[2].startswith("an empty answer\t0.000")
    assert "Nothing speaks against this grader" in lines[-1]
    assert "Nothing speaks against" in page.read_text()


def can_be_won(rows: Path, grader: Any, how: str) -> None:
    said = grade(rows, grader, code=2).stdout
    assert "can be won without the answer" in said
    assert how in said


def test_a_reward_for_nothing_is_refused(rows: Path) -> None:  # trap: R20
    can_be_won(rows, ECHO | {"reference": "animal"}, "an empty answer gets 0.667")
    can_be_won(rows, LONGER, "the prompt repeated gets")


def test_a_trial_without_such_answers_is_seen(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # trap: R20
    monkeypatch.setattr(trial, "_won", lambda kinds: {})
    with pytest.raises(AssertionError):
        can_be_won(rows, ECHO | {"reference": "animal"}, "an empty answer")


def test_repeating_that_wins_and_grades_all_alike_are_refused(rows: Path) -> None:
    often = (
        "def grade(sample, item):\n    text = sample['output_text']\n"
        "    return text.count(item['answer']) - text.count('?')"
    )
    assert "repeating wins" in grade(rows, often, code=2).stdout
    assert "there is nothing to learn from" in grade(rows, "def grade(sample, item):\n    return 0.5", code=2).stdout


def test_references_that_the_grader_does_not_take_are_named(rows: Path) -> None:
    said = grade(rows, RIGHT | {"reference": "{{item.prompt}}"}, code=2).stdout.splitlines()[-1]
    assert "the row's reference 0, the lowest reward of all".lower() in said.lower()
    assert "not written as the grader wants answers" in said


def test_failed_grades_are_counted_by_kind_with_their_line(rows: Path) -> None:
    source = "def grade(sample, item):\n    return float(sample['output_text'])\n"
    text = grade(rows, source, code=2).stdout
    assert f"14 without reward, the grader raised an error: {rows}:1" not in text
    assert "15 of 15 grades failed (100.0 %)" in text
    assert "ValueError: could not convert string to float" in text
    values = json.loads(grade(rows, source, "--json", code=2).stdout)
    assert [(one["kind"], one["num"]) for one in values["errors"]] == [("exception", 15)]
    assert values["verdict"][0]["refuses"]
    assert values["kinds"]["reference"] == {
        "answers": 3,
        "scored": 0,
        "unread": 0,
        "mean": None,
        "counts": [],
        "edges": [],
    }


def test_a_trial_without_right_answers_praises_no_grader(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    said = grade(rows, "def grade(s, i):\n    return 1 - len(s['output_text']) / 99\n").stdout
    assert "Nothing speaks against" not in said
    assert "No row has a reference and no model has answered" in said
    assert "An empty answer gets 1, the most of all" in said
    assert "An empty answer" not in grade(rows, LONGER).stdout


def test_scores_that_are_no_numbers_are_counted_with_their_first_line(rows: Path, tmp_path: Path) -> None:
    source = "def grade(s, i):\n    return {'reward': float(s['output_text'] == i['answer']), 'style': None}\n"
    page = tmp_path / "tried.html"
    said = grade(rows, source, "--page", page).stdout
    assert "score style is no finite number in 15 of 15 grades, the first of" in said
    assert "rows.jsonl:1, an empty answer: None: left out of its mean" in said
    assert "score style: no finite number, 15 times" in page.read_text()


def test_a_grader_that_never_ends_is_refused_after_a_few_grades(rows: Path) -> None:
    endless = "def grade(sample, item):\n    while True: pass\n"
    function = {"type": "function", "file": "endless.py", "seconds": 0.2}
    rows.with_name("endless.py").write_text(endless)
    error = grade(rows, function, code=2).stderr
    assert "rows.jsonl:1: none of the first 4 grades came in time: it took more than 0.2 s and was ended" in error


def test_files_that_cannot_be_written_are_refused_first(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "none" / "kept.jsonl"
    error = grade(rows, RIGHT, "--model", "m", "--keep", "0:1", "--out", out, code=2).stderr
    assert f"{out.parent} is no folder that may be written" in error


def graded(*groups: list[tuple[float | None, int]]) -> list[Graded]:
    return [
        Graded(MODEL, row, Answer("x", tokens=tokens), Grade(reward, kind=None if reward is not None else "timeout"))
        for row, group in enumerate(groups)
        for reward, tokens in group
    ]


def results(*groups: list[tuple[float | None, int]]) -> dict[str, Any]:
    prompts = [Prompt(f"a:{i + 1}", {}, ({"role": "user", "content": "q"},)) for i in range(len(groups))]
    return trial.results(prompts, graded(*groups))


def test_the_measures_of_a_models_groups() -> None:
    found = results([(1.0, 2), (0.0, 2), (0.0, 2), (0.0, 2)], [(0.0, 1)] * 4, [(None, 1), (0.5, 1), (0.5, 1), (0.5, 1)])
    measures = {name: one["value"] for name, one in found["model"]["measures"].items()}
    assert measures == {"reward": 0.25, "pass@1": 0.125, "pass@4": 0.5, "best of 4": 0.5, "groups with spread": 0.5}
    assert found["errors"][0]["kind"] == "timeout"
    assert found["kinds"][MODEL]["scored"] == 11


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    # Of 5 answers, 2 right: C(3, 2) = 3 of C(5, 2) = 10 pairs have none.
    assert trial.pass_at(2, 5, 2) == 1 - 3 / 10
    assert [trial.pass_at(1, 8, c) for c in (0, 2, 8)] == [0, 0.25, 1]


def test_spread_of_groups_of_other_sizes() -> None:
    half = [1.0] * 4 + [0.0] * 4
    assert trial.spread_of(4, half) == pytest.approx(1 - 2 / math.comb(8, 4))
    assert trial.spread_of(16, [0.0] * 8) == 0
    assert trial.spread_of(16, half) == trial.spread_of(8, half) == 1, "all of them spread already"
    assert trial.spread_of(16, [0.5]) == 0
    assert trial.spread_of(32, [0.1] * 8) == 0


def test_length_is_compared_within_groups() -> None:
    # Longer prompts have higher rewards, but within each group the shorter answer wins.
    found = results([(1.0, 10), (0.0, 12)], [(11.0, 100), (10.0, 102)])
    assert found["model"]["length"] == pytest.approx(-1)
    assert results([(1.0, 5), (0.0, 5)])["model"]["length"] is None


def test_verdicts_on_a_models_answers() -> None:
    hopeless = results(*[[(0.0, 1)] * 4] * 9, [(1.0, 2), (0.0, 3), (0.0, 1), (0.0, 2)])
    words = " ".join(one.words for one in verdicts(hopeless))
    assert "Only 10 % of the groups of 4" in words
    assert "--keep 0.05:0.95" in words
    longer = results([(1.0, 2), (0.0, 1)], [(3.0, 7), (2.0, 5)])
    assert any("length wins" in one.words for one in verdicts(longer))
    assert next(iter(verdicts(results([(0.5, 2), (0.5, 1)])))).refuses


def test_rows_are_read_with_their_references(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    file = write(
        tmp_path / "rows.jsonl",
        [
            {"messages": turns}, {"prompt": turns[:1], "reference_answer": {"a": 1}},
            {"prompt": "Hi", "completion": turns[1:]}, {"prompt": "Hi", "answer": 4, "other": [1]},
            {"messages": turns[:1]},
        ],
    )  # fmt: skip
    found, _ = read_prompts(Data(train=(DataFile(path=str(file)),)))
    assert [one.reference and one.reference.text for one in found] == ["Hello", '{"a": 1}', "Hello", "4", None]
    assert {one.text for one in found} == {"Hi"}
    assert found[3].item == {"prompt": "Hi", "answer": 4, "other": [1]}


def test_usual_names_of_prompt_and_answer_are_read_and_said(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"question": f"What is {i}?", "gold": str(i)} for i in range(4)])
    output = grade(file, RIGHT | {"reference": "{{item.gold}}"}, code=0).output
    assert "note: the prompt is read from 'question'" in output
    assert "note: the right answer is read from 'gold'" in output
    both = write(tmp_path / "both.jsonl", [{"question": "What?", "input": "Which?"}])
    assert "neither prompt nor messages; there are 'question', 'input'" in grade(both, RIGHT, code=2).output


def test_rows_are_read_as_set_says(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Grüße {i}?", "answer": f"ja {i}"} for i in range(6)]
    file.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("cp1252"))
    output = grade(file, RIGHT, code=2).output
    assert "add --set data.encoding=cp1252" in output
    assert output.count("invalid_utf8") == 1, "six rows have one cause"
    assert "Nothing speaks against" in grade(file, RIGHT, "--set", "data.encoding=cp1252", code=0).output
    file.write_text("\n".join([*map(json.dumps, rows), "{}"]))
    assert "leave such rows out: --set data.bad_rows=skip" in grade(file, RIGHT, code=2).output
    assert "note: 1 row left out" in grade(file, RIGHT, "--set", "data.bad_rows=skip", code=0).output
    other = grade(file, RIGHT, "--set", "train.epochs=2", code=2).output
    assert "--set train.epochs=2: only options of reading do something here" in " ".join(other.split())


def test_rows_without_a_prompt_are_refused_by_line(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": "Hi"}, {"text": "x"}, {"prompt": " "}, {"messages": []}])
    text = grade(file, RIGHT, code=2).output
    assert all(f"{file}:{line}: " in text for line in (2, 3, 4))


def test_variables_that_rows_do_not_have_are_refused_first(rows: Path) -> None:
    text = grade(rows, RIGHT | {"reference": "{{item.anwser}}"}, code=2).output
    assert "item has no anwser. Did you mean answer?" in text


@pytest.mark.parametrize(
    "words",
    [["--keep", "0:1"], ["--out", "x.jsonl"], ["--keep", "a", "--out", "x.jsonl", "--model", "m"], ["--page", "x"]],
)
def test_options_that_do_not_go_together_are_refused(rows: Path, words: list[str]) -> None:
    grade(rows, RIGHT, *words, code=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_run import model_folder  # torch, which nothing else here needs

    return model_folder(tmp_path_factory.mktemp("model"))


def test_the_best_answer_that_ended_is_kept_as_a_chat(tmp_path: Path) -> None:
    prompts = [Prompt("a:1", {}, ({"role": "user", "content": "hi"},)), Prompt("a:2", {}, ())]
    rewards = [("a", 0.5, True), ("b", 1.0, False), ("c", 0.75, True), ("d", 0.75, True), ("e", None, True)]
    graded = [Graded(MODEL, 0, Answer(text, ended=ended), Grade(reward)) for text, reward, ended in rewards]
    graded += [Graded(MODEL, 1, Answer("f", ended=False), Grade(1.0)), Graded("reference", 0, Answer("g"), Grade(1.0))]
    said: list[str] = []
    _keep(prompts, graded, (-math.inf, math.inf), tmp_path / "best.jsonl", said.append, best=True)
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "c"}]}
    assert [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()] == [row]
    assert said[0].startswith("1 of 2 rows have an answer that ended: the best of each is in")


def test_answers_of_a_model_are_drawn_graded_and_rows_kept_by_them(rows: Path, model: Path) -> None:
    out = rows.with_name("kept.jsonl")
    short = "def grade(sample, item):\n    return float(len(sample['output_text']) % 2 == 0 and sample['tokens'] > 0)\n"
    words = ("--model", model, "--samples", "4", "--max-tokens", "6", "--json", "--offline")
    first = CliRunner()
    file = rows.with_name("grader.py")
    file.write_text(short)
    call = ["grade", rows, "--grader", file, *words]
    result = first.invoke(app, [str(word) for word in (*call, "--keep", "0:1", "--out", out)])
    assert result.exit_code in (0, 2), result.output
    values = json.loads(result.stdout)
    assert values["kinds"][MODEL]["answers"] == 12
    assert values["model"]["samples"] == 4
    assert [json.loads(line) for line in out.read_text().splitlines()] == ROWS
    again = json.loads(first.invoke(app, [str(word) for word in call]).stdout)
    assert again["best"] == values["best"], "the same seed draws the same answers"
    assert again["kinds"] == values["kinds"]
