"""Measures of answers: by hand, and equal to rouge-score."""

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from tunesmith.evaluation.scores import WordTokenizer, are_short, is_short, score_answers

ANSWERS = ["The cat sat on the mat.", "It rained all day in Rome", "", "No_one came: 3 of 10!"]
REFERENCES = ["A cat sat on the mat.", "All day it rained", "Nothing", "no one came; 3 of 10"]


def values(answers, references):
    return {key: found["value"] for key, found in score_answers(answers, references).items()}


def test_answers_counted_by_hand():
    """Two of three words, one of two pairs: F1 of (2/3, 2/2) and of (1/2, 1/1)."""
    assert values(["the cat sat", " same "], ["the cat", "same"]) == pytest.approx(
        {
            "exact_match": 1 / 2,
            "rouge1": (4 / 5 + 1) / 2,
            "rouge2": (2 / 3 + 0) / 2,
            "rougeL": (4 / 5 + 1) / 2,
            "length_ratio": (3 + 1) / (2 + 1),
        }
    )


def test_rouge_is_that_of_rouge_score_in_ascii_text():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    expected = [scorer.score(reference, answer) for answer, reference in zip(ANSWERS, REFERENCES, strict=True)]
    found = values(ANSWERS, REFERENCES)
    for key in ("rouge1", "rouge2", "rougeL"):
        assert found[key] == pytest.approx(np.mean([score[key].fmeasure for score in expected]), rel=1e-12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop_now 3.5", ["don", "t", "stop", "now", "3", "5"]),
        ("Für Straße", ["für", "straße"]),
        ("ЛЕС и поле", ["лес", "и", "поле"]),
        ("今日はgood天気", ["今", "日", "は", "good", "天", "気"]),
        ("...", []),
    ],
)
def test_words(text, words):
    assert WordTokenizer().tokenize(text) == words


def test_words_are_those_of_rouge_score_for_every_ascii_character():
    from rouge_score.tokenizers import DefaultTokenizer

    text = "".join(f"a{chr(i)}b " for i in range(128))
    assert WordTokenizer().tokenize(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


def test_empty_answers_score_nothing_and_no_answers_have_no_measures():
    found = values([""], ["something said"])
    assert set(found.values()) == {0.0}
    assert score_answers([], []) == {}


def test_pairs_of_words_are_not_counted_where_no_reference_has_one():
    assert "rouge2" not in values(["positive", "very bad"], ["positive", "negative"])
    assert "rouge2" in values(["positive"], ["very positive"])


def test_short_answers_are_right_or_wrong_as_a_whole():
    assert is_short("positive")
    assert is_short("27 November 2026")
    assert not is_short("It was fine, thank you")
    assert not is_short("這是一個很長的句子")  # no spaces, and yet many words
    assert are_short(["yes"] * 9 + ["it depends on a few things"])
    assert not are_short(["yes"] * 8 + ["it depends on a few things"] * 2)
    assert not are_short([])
