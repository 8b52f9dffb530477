"""Each type of grader gives the scores that its definition gives; OpenAI's published examples are read as they are."""

import json
import math
from pathlib import Path
from typing import Any

import jsonschema_specifications
import pytest
import referencing.jsonschema

from graders.graders import function_in, grade, grades
from tunesmith.errors import InputError
from tunesmith.graders import formula, schema, templates, texts
from tunesmith.graders.grade import Answer, GradeError
from tunesmith.graders.pool import TOO_DEEP, Pool

STRING = {
    "type": "string_check",
    "name": "sample string check",
    "input": "{{sample.output_text}}",
    "reference": "{{item.reference_answer}}",
    "operation": "eq",
}


@pytest.mark.parametrize(
    ("operation", "text", "reward"),
    [
        ("eq", "Paris", 1), ("eq", "paris", 0), ("eq", "Paris.", 0), ("ne", "Rome", 1), ("ne", "Paris", 0),
        ("neq", "Rome", 1), ("like", "It is Paris.", 1), ("like", "It is paris.", 0), ("ilike", "IT IS PARIS", 1),
    ],
)  # fmt: skip
def test_string_check(operation: str, text: str, reward: float) -> None:
    assert grade({**STRING, "operation": operation}, text, {"reference_answer": "Paris"}).reward == reward


def test_multi_of_openais_guide() -> None:
    """A name by likeness and an address by equality, each half of the reward."""
    multi = {
        "type": "multi",
        "graders": {
            "name": {
                "name": "name_grader",
                "type": "text_similarity",
                "input": "{{sample.output_json.name}}",
                "reference": "{{item.name}}",
                "evaluation_metric": "fuzzy_match",
                "pass_threshold": 0.9,
            },
            "email": {
                "name": "email_grader",
                "type": "string_check",
                "input": "{{sample.output_json.email}}",
                "reference": "{{item.email}}",
                "operation": "eq",
            },
        },
        "calculate_output": "(name + email) / 2",
    }
    item = {"name": "Ada Lovelace", "email": "ada@example.org"}
    found = grade(multi, json.dumps({"name": "ada lovelace", "email": "other"}), item)
    assert (found.reward, dict(found.scores)) == (0.5, {"name": 1.0, "email": 0.0})
    unread = grade(multi, '{"name": "Ada Lovelace"}', item)
    assert (unread.reward, unread.is_unread) == (0.5, True), (
        "an answer without the JSON is a bad answer, no failed grade"
    )
    assert grade(multi, "Ada", item).reward == 0


def test_python_of_openais_guide() -> None:
    source = (
        "from rapidfuzz import fuzz, utils\n\ndef grade(sample, item) -> float:\n"
        '    output_text = sample["output_text"]\n    reference_answer = item["reference_answer"]\n'
        "    return fuzz.WRatio(output_text, reference_answer, processor=utils.default_process) / 100.0\n"
    )
    item = {"reference_answer": "fuzzy wuzzy was a bear"}
    python = {"type": "python", "name": "fuzzy", "source": source}
    as_text = {"type": "text_similarity", "name": "fuzzy", "evaluation_metric": "fuzzy_match"}
    as_text |= {"input": "{{sample.output_text}}", "reference": "{{item.reference_answer}}"}
    text = "fuzzy wuzzy had no hair"
    assert grade(python, text, item).reward == grade(as_text, text, item).reward == pytest.approx(0.7556, abs=0.0001)


TEXT, REFERENCE = "the cat sat on a mat today", "the cat sat on the mat"


def test_bleu_and_gleu_are_those_of_nltk() -> None:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from nltk.translate.gleu_score import sentence_gleu

    words, reference = TEXT.split(), REFERENCE.split()
    smooth = SmoothingFunction().method2
    assert texts.similarity("bleu", TEXT, REFERENCE) == pytest.approx(
        sentence_bleu([reference], words, smoothing_function=smooth), abs=1e-12
    )
    assert texts.similarity("gleu", TEXT, REFERENCE) == pytest.approx(sentence_gleu([reference], words), abs=1e-12)
    assert [texts.similarity(metric, "", REFERENCE) for metric in ("bleu", "gleu")] == [0, 0]
    assert [texts.similarity(metric, REFERENCE, REFERENCE) for metric in ("bleu", "gleu")] == [1, 1]


def test_rouge_is_the_f_measure() -> None:
    # 5 of 7 words are in the 6 of the reference; 3 of 6 pairs in its 5; the longest common subsequence has 5 words.
    assert texts.similarity("rouge_1", TEXT, REFERENCE) == pytest.approx(2 * (5 / 7) * (5 / 6) / (5 / 7 + 5 / 6))
    assert texts.similarity("rouge_2", TEXT, REFERENCE) == pytest.approx(2 * (3 / 6) * (3 / 5) / (3 / 6 + 3 / 5))
    assert texts.similarity("rouge_l", TEXT, REFERENCE) == pytest.approx(2 * (5 / 7) * (5 / 6) / (5 / 7 + 5 / 6))
    assert texts.similarity("rouge_5", TEXT, REFERENCE) == 0


@pytest.mark.parametrize(
    ("options", "text", "reward"),
    [
        ({}, "1,250", 1), ({}, " 1250.0 ", 1), ({}, "it is 1250", 0), ({"last": True}, "2 dozen are 1,250.", 1),
        ({"last": True}, "1250 or 1251", 0), ({"tolerance": 0.01}, "1260", 1), ({"last": True}, "none", 0),
    ],
)  # fmt: skip
def test_number(options: dict[str, Any], text: str, reward: float) -> None:
    assert grade({"type": "number", "reference": "{{item.answer}}", **options}, text, {"answer": 1250}).reward == reward


def test_length_falls_linearly_outside_its_bounds() -> None:
    bounded = schema.from_value({"type": "length", "low": 4, "high": 10})
    found = [one.reward for one in grades(bounded, *("word " * num for num in (0, 2, 4, 10, 15, 20, 40)))]
    assert found == [0, 0.5, 1, 1, 0.5, 0, 0]


def test_regex_is_the_share_of_patterns_and_cannot_keep_it_busy() -> None:
    both = {"type": "regex", "pattern": ["^Yes", r"\b{{item.word}}\b"]}
    assert grade(both, "Yes, it will rain", {"word": "rain"}).reward == 1
    assert grade(both, "No rain", {"word": "rain"}).reward == 0.5
    endless = schema.from_value({"type": "regex", "pattern": "^(a+)+$", "seconds": 1})
    assert grades(endless, "a" * 40 + "!")[0].kind == "timeout"


def test_json_schema_counts_errors() -> None:
    of = {"type": "object", "required": ["a", "b"], "properties": {"a": {"type": "integer"}}}
    rewards = [grade({"type": "json_schema", "schema": of}, text).reward for text in ('{"a": 1, "b": 2}', "{}", "none")]
    assert rewards == [1, 1 / 3, 0]


def test_a_schema_that_refers_to_a_file_or_an_address_reads_neither(tmp_path: Path) -> None:  # trap: S30
    (tmp_path / "secret.json").write_text('{"type": "integer"}')
    for place in ((tmp_path / "secret.json").as_uri(), "http://127.0.0.1:1/schema.json"):
        of = schema.from_value({"type": "json_schema", "schema": {"$ref": place}})
        with pytest.raises(GradeError, match="which is not in it"):
            texts.grade_text(of, Answer("1").as_sample(), {})
    published = {"$ref": "https://json-schema.org/draft/2020-12/schema"}
    of = schema.from_value({"type": "json_schema", "schema": published})
    assert texts.grade_text(of, Answer('{"type": "object"}').as_sample(), {}) == 1


def test_a_registry_that_reads_files_is_found(  # trap: S30 planted
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(place: str) -> referencing.Resource[Any]:
        content = json.loads(Path(place.removeprefix("file://")).read_text())
        return referencing.jsonschema.DRAFT202012.create_resource(content)

    monkeypatch.setattr(jsonschema_specifications, "REGISTRY", referencing.Registry(retrieve=read))
    texts._validator.cache_clear()
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_schema_that_refers_to_a_file_or_an_address_reads_neither(tmp_path)
    texts._validator.cache_clear()


def test_a_function_of_trls_is_told_by_its_parameters(tmp_path: Path) -> None:
    source = (
        "def reward(completions, answer, **kwargs):\n    return [float(a in c) for c, a in zip(completions, answer)]\n"
    )
    trl = function_in(tmp_path, source, function="reward")
    found = grades(trl, "it is 4", "it is 5", item={"prompt": "2 + 2?", "answer": "4"})
    assert [one.reward for one in found] == [1, 0]
    chat = source.replace("a in c)", 'a in c[0]["content"])')
    assert (
        grades(function_in(tmp_path, chat, function="reward"), "4", item={"prompt": [], "answer": "4"})[0].reward == 1
    )


def test_further_numbers_of_a_function_are_told_beside_its_reward(tmp_path: Path) -> None:
    source = "def grade(sample, item):\n    return {'reward': 0.5, 'style': 1, 'tokens': sample['tokens']}\n"
    [found] = grades(function_in(tmp_path, source), "text")
    assert (found.reward, dict(found.scores)) == (0.5, {"style": 1.0})


def test_further_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    source = (
        "def grade(s, i):\n    return {'reward': 1, 'none': None, 'nan': float('nan'), 'text': '1', 'good': True}\n"
    )
    [found] = grades(function_in(tmp_path, source), "text")
    assert (found.reward, dict(found.scores)) == (1.0, {"good": 1.0})
    assert found.left_out == {"none": "None", "nan": "nan", "text": "'1'"}
    file = tmp_path / "grader.py"
    parts = {"type": "multi", "graders": {"f": {"type": "function", "file": str(file)}}, "calculate_output": "2 * f"}
    assert set(grade(parts, "text").left_out) == {"f.none", "f.nan", "f.text"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({**STRING, "operation": "is"}, "operation: "),
        ({**STRING, "extra": 1}, "extra: there is no such option of this type"),
        ({"type": "label_model"}, "Let a `score_model` grader give a number"),
        ({"type": "reward_run"}, "run: is missing"),
        ({"type": "text_similarity", "input": "", "reference": "", "evaluation_metric": "cosine"}, "rouge_l"),
        ({"type": "text_similarity", "input": "", "reference": "", "evaluation_metric": "meteor"}, "`python` grader"),
        ({"type": "python", "source": "", "image_tag": "2025-05-08"}, "Leave it out"),
        ({"type": "score_model", "model": "m", "input": [{"role": "user", "content": "x"}]}, "address"),
        ({"type": "regex", "pattern": "("}, "no regular expression"),
        ({"type": "length", "low": 5, "high": 2}, "low is 5, above high, 2"),
        ({"type": "multi", "graders": {"a": STRING}, "calculate_output": "a + b"}, "there is no grader b"),
        ({"type": "multi", "graders": {"a": {"type": "multi"}}, "calculate_output": "a"}, "within another"),
        ({"type": "multi", "graders": [STRING, STRING], "calculate_output": "a"}, "a name of its own"),
        ([], "grader"),
    ],
)
def test_what_is_no_grader_is_refused_with_its_place(value: Any, words: str) -> None:
    with pytest.raises(InputError) as error:
        schema.from_value(value, place="grader.json")
    assert words in str(error.value)
    assert "grader.json" in str(error.value)


def test_files_that_are_no_grader_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    words = {
        "run:": "run: String should have at least 1 character",
        "x.txt": "file.py",
        str(tmp_path / "bad.jsn"): "file.py",
    }
    words |= {
        str(tmp_path / "bad.json"): "JSON",
        "none.py": "no such file",
        str(tmp_path / "bad.json:f"): "Leave it out",
    }
    for word, text in words.items():
        with pytest.raises(InputError, match=text):
            schema.load(word)


def test_a_grader_that_cannot_be_loaded_is_an_error_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 2") as error:
        grades(function_in(tmp_path, "import math\nimport no_such_module\n"), "x")
    assert "no_such_module" in str(error.value)
    with pytest.raises(InputError, match=r"it has no function grade\. There are: other\."):
        grades(function_in(tmp_path, "import math\ndef other(sample, item): return 1\n"), "x")
    for arguments in ("text", "sample, item, more", ""):
        with pytest.raises(InputError, match=r"takes two arguments, \(sample, item\)"):
            grades(function_in(tmp_path, f"def grade({arguments}): return 1\n"), "x")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"type": "lenght", "high": 3},
            r"type lenght: there is no such type\. Did you mean length\? One of str",
        ),
        ({"high": 3}, r"type: is missing\. One of string_check, "),
        ([1], r"grader: is no object with a type"),
        ({"type": "length"}, r"high: is missing\."),
        (
            {"type": "multi", "graders": {"a": {"type": "x"}}, "calculate_output": "a"},
            r"graders\.a: type x: ",
        ),
    ],
    ids=["typo", "no type", "list", "no option", "part"],
)
def test_a_value_that_is_no_grader_is_refused_in_plain_words(value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        schema.from_value(value)


def test_a_folder_may_have_a_colon_and_json_a_byte_order_mark(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "grader.py").write_text("def other(sample, item): return 1\n")
    assert schema.load(f"{folder}/grader.py:other").function == "other"  # type: ignore[union-attr]
    (folder / "grader.json").write_bytes(b"\xef\xbb\xbf" + b'{"type": "length", "high": 3}')
    assert schema.load(str(folder / "grader.json")).type == "length"


SAMPLE = Answer('{"a": [{"b": 2}]}', ({"function": {"name": "look"}},)).as_sample()


def test_templates_reach_into_values() -> None:
    text = "{{ item.x.y }} {{sample.output_json.a[0].b}} {{sample.output_tools[0].function.name}} {{item.list}}"
    item = {"x": {"y": "{{item.list}}"}, "list": [1, "é"]}
    assert templates.render(text, SAMPLE, item) == '{{item.list}} 2 look [1, "é"]'  # a value is not a template


def test_an_unknown_variable_names_what_there_is() -> None:
    with pytest.raises(InputError, match=r"item has no anwser\. Did you mean answer\? It has prompt, answer"):
        templates.check("{{item.anwser}}", {"prompt": "", "answer": ""}, "input")
    with pytest.raises(InputError, match=r"^input: \{\{answer\}\}: not a variable"):
        templates.check("{{answer}}", None, "input")
    assert grade(STRING, "x", {}).kind == "unknown_variable"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a + 2 * b", 7), ("-a ^ 2", -1), ("2 ^ 3 ^ 2", 512), ("(a + b) / 2", 2), ("min(a, b, 0.5)", 0.5),
        ("max(a, b)", 3), ("floor(2.5) + ceil(0.1)", 3), ("sqrt(b + 1)", 2), ("exp(log(b))", 3), ("abs(a - b)", 2),
        ("1e1 - .5", 9.5), ("a - b - 1", -3),
    ],
)  # fmt: skip
def test_formulas(text: str, value: float) -> None:
    found = formula.compute(formula.parse(text, ("a", "b"), "f"), {"a": 1.0, "b": 3.0})
    assert math.isclose(found, value, rel_tol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "a / 0",
        "log(0)",
        "10 ^ 999",
        "sqrt(-1)",
        "(0 - 8) ^ 0.5",
        "abs((0 - 8) ^ 0.5)",
        "min((0 - 8) ^ 0.5, 1)",
        "a / (a - 1)",
    ],
)
def test_a_formula_without_a_value_is_no_reward(text: str) -> None:
    found = grade({"type": "multi", "graders": {"a": STRING}, "calculate_output": text}, "x", {"reference_answer": "x"})
    assert (found.reward, found.kind) == (None, "formula")


@pytest.mark.parametrize(
    "text", ["", "a +", "a b", "(a", "a)", "abs(a, a)", "__import__('os')", "a ** 2", "a;b", "(" * 400]
)
def test_what_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no formula"):
        formula.parse(text, ("a",), "calculate_output")


@pytest.mark.slow
def test_long_texts_keep_no_grader_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are compared in a process with limits, by the identity and the score of this one."""
    monkeypatch.setattr(schema.TextSimilarity, "seconds", 1)
    value = {"type": "text_similarity", "input": "{{sample.output_text}}", "reference": "{{item.text}}"}
    likeness = {**value, "evaluation_metric": "rouge_l"}
    assert grade(likeness, "a b", {"text": "a c"}).reward == pytest.approx(0.5)
    assert grade(likeness, "a " * 20_000, {"text": "b " * 20_000}).kind in ("timeout", "memory")


RENDERED = {"type": "string_check", "operation": "eq", "input": "{{sample.output_json}}", "reference": "x"}


@pytest.mark.parametrize("value", [{"type": "python", "source": "def grade(s, i): return 1"}, RENDERED])
def test_json_that_nests_too_deeply_is_no_error_of_the_run(value: dict[str, Any]) -> None:
    """Of some depths Python reads what it cannot write."""
    answers = [Answer("[" * depth + "]" * depth) for depth in range(970, 1000)]
    with Pool(schema.from_value(value), at_once=1) as pool:
        made = [pool.submit(answer, {}).result() for answer in answers]
    assert {grade.kind for grade in made} <= {None, "exception"}
    assert {grade.error for grade in made if grade.kind} <= {TOO_DEEP}


def test_a_variable_that_repeats_a_long_value_ends() -> None:
    long = {"type": "number", "input": "{{item.text}}" * 100, "reference": "1"}
    assert "more than 16,777,216 characters" in grade(long, "", {"text": "a" * 2**20}).error
