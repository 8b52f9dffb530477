"""What is proved against one answer to every row, counted by hand; what is never right; how few rows say so."""

from collections.abc import Mapping
from typing import Any

import pytest

from tunesmith.evaluation.compare import (
    answer_baseline,
    baseline_sentence,
    never_right,
    row_baseline,
    too_few,
)
from tunesmith.evaluation.metrics import info_of


def rows_of(kind: str, pairs: list[tuple[Any, Any]]) -> list[dict[str, Any]]:
    """Rows by (what is right, what was answered)."""
    key = {"number": "value", "tag": "tags"}.get(kind, "label")
    probability = (lambda said: [0.9] * len(said)) if kind == "sets" else (lambda said: 0.9)
    return [
        {"source": f"x:{i}", "hash": str(i), "text": "t", "loss": 1.0, "count": 1, key: true, "predicted": said,
         "probability": probability(said)}
        for i, (true, said) in enumerate(pairs)
    ]  # fmt: skip


def drug_reviews() -> list[tuple[str, str]]:
    """248 positive, 95 negative and 36 neutral rows: the constant has 65.4 %, the model, never neutral, 67.3 %."""
    right = [("pos", "pos")] * 220 + [("neg", "neg")] * 35
    return right + [("pos", "neg")] * 28 + [("neg", "pos")] * 60 + [("neu", "pos")] * 36


# trap: M1
def test_a_classifier_like_the_commonest_class_is_not_called_better() -> None:
    rows = rows_of("classes", drug_reviews())
    random_head = rows_of("classes", [(true, "neu") for true, _ in drug_reviews()])

    def check(found: Mapping[str, Any]) -> None:
        accuracy = found["measures"]["accuracy"]
        assert accuracy["value"] == pytest.approx(248 / 379)
        assert accuracy["change"]["value"] == pytest.approx((255 - 248) / 379)
        assert info_of("accuracy").verdict(accuracy["change"]) == "unclear"

    check(row_baseline(rows, {"answer": "pos", "from": "the training rows"}))
    with pytest.raises(AssertionError):  # compared with what random numbers answered
        check(row_baseline(rows, {"answer": random_head[0]["predicted"], "from": "the training rows"}))


def test_a_classifier_below_the_commonest_class_is_called_worse() -> None:
    pairs = [("pos", "pos")] * 150 + [("pos", "neg")] * 100 + [("neg", "neg")] * 40 + [("neg", "pos")] * 89
    found = row_baseline(rows_of("classes", pairs), {"answer": "pos", "from": "the training rows"})
    assert found["measures"]["accuracy"]["change"]["high"] < 0
    sentence = baseline_sentence({"accuracy": {"value": 190 / 379, "low": 0.45, "high": 0.55}}, found)
    assert sentence.startswith(
        "accuracy is 50.1 % (45.0–55.0), against 66.0 % for always answering `pos` (majority baseline): −15.8 ("
    )
    assert sentence.endswith(" points, worse")


def test_a_baseline_that_its_words_name_is_named_once() -> None:
    measures = {"recall_1": {"value": 0.4, "change": {"value": 0.1, "low": -0.1, "high": 0.3, "is_clear": False}}}
    of_ranks = {"name": "BM25", "words": "a search for shared words (BM25)", "from": "the rows measured"}
    sentence = baseline_sentence(
        {"recall_1": {"value": 0.5, "low": 0.4, "high": 0.6}}, {**of_ranks, "key": "recall_1", "measures": measures}
    )
    assert "against 40.0 % for a search for shared words (BM25): +10.0" in sentence


def test_short_answers_are_compared_with_the_commonest_reference() -> None:
    """65 of 100 are positive; the model says so always, and is no better."""
    answers = [
        {"reference": said, "answer": "positive", "exact_match": float(said == "positive")}
        for said in ["positive"] * 65 + ["negative"] * 35
    ]
    found = answer_baseline(answers)
    assert (found["words"], found["measures"]["exact_match"]["value"]) == ("always answering `positive`", 0.65)
    assert found["measures"]["exact_match"]["change"]["value"] == 0
    names = [{"reference": f"name {i}", "answer": "x", "exact_match": 0.0} for i in range(100)]
    assert answer_baseline(names) is None
    assert answer_baseline([]) is None


def test_every_kind_of_label_has_its_constant() -> None:
    def told(kind: str, pairs: list[tuple[Any, Any]], answer: Any) -> tuple[str, str, float]:
        found = row_baseline(rows_of(kind, pairs), {"answer": answer, "from": "the training rows"})
        return found["key"], found["words"], found["measures"][found["key"]]["value"]

    tags = [(["O", "B-PER"], ["O", "B-PER"]), (["O", "O"], ["O", "O"])]
    assert told("tag", tags, "O") == ("tag_accuracy", "always answering `O`", 3 / 4)
    sets = [(["a"], ["a"]), (["a", "b"], [])]
    assert told("sets", sets, ["a"]) == ("label_accuracy", "always answering `a`", 3 / 4)
    assert told("sets", sets, []) == ("label_accuracy", "always answering no class", 1 / 4)
    assert told("number", [(1.0, 1.5), (3.0, 3.0)], 2.0) == ("mse", "always answering the mean, 2", 1.0)
    assert row_baseline(rows_of("classes", []), {"answer": "a", "from": "the training rows"}) is None
    assert row_baseline([{"correct": 1, "loss": 1.0, "count": 1}], None) is None


def test_classes_that_are_never_right_are_named_with_their_rows() -> None:
    def told(*recalls: tuple[str, float, int]) -> str:
        table = [{"label": name, "recall": recall, "support": support} for name, recall, support in recalls]
        return " ".join(never_right({"confusion": [], "per_class": table}))

    assert told(("pos", 0.9, 248), ("neutral", 0.0, 36)) == "`neutral` (36 rows) is never right."
    assert told(("a", 0.0, 1), ("b", 0.0, 7)) == "`b` (7 rows) and `a` (1 row) are never right."
    assert told(("a", 0.0, 0), ("b", 0.1, 7)) == ""
    many = told(*((f"c{i}", 0.0, 9 - i) for i in range(5)))
    assert many == "`c0` (9 rows), `c1` (8 rows), `c2` (7 rows) and 2 more are never right."
    spans = {"labels": ["O", "B-LOC"], "per_type": [{"type": "LOC", "recall": 0.0, "support": 12}]}
    assert list(never_right(spans)) == ["`LOC` (12 spans) is never right."]


@pytest.mark.parametrize(
    ("num", "words"),
    [
        (1, "1 row is too few to conclude anything"),
        (5, "5 rows are too few to conclude anything: below 6 nothing is called better or worse."),
        (6, "6 rows are few: on other rows of the same kind this may turn out differently."),
        (29, "29 rows are few"),
        (30, ""),
    ],
)
def test_what_few_rows_cannot_tell_is_said(num: int, words: str) -> None:
    assert " ".join(too_few(num, "row")).startswith(words)
    assert bool(words) == bool(list(too_few(num, "row")))


def test_five_rows_never_make_a_verdict() -> None:
    found = row_baseline(rows_of("classes", [("a", "a")] * 5), {"answer": "b", "from": "the training rows"})
    change = found["measures"]["accuracy"]["change"]
    assert (change["low"], change["high"], change["is_clear"]) == (1.0, 1.0, False)
    six = row_baseline(rows_of("classes", [("a", "a")] * 6), {"answer": "b", "from": "the training rows"})
    assert six["measures"]["accuracy"]["change"]["is_clear"]
