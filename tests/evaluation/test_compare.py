"""Two evaluations side by side: matched by content, wins counted by hand, differences beyond chance told from noise."""

import math

import numpy as np
import pytest

from evaluation.predictions import classes, results, tokens
from tunesmith.errors import InputError
from tunesmith.evaluation.compare import compare_answers, compare_rows
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.scores import ANSWER_SCORES, score
from tunesmith.types import Labels


def told(hash_: str, loss: float = 1.0, count: float = 1.0, **fields):
    return {"source": f"x.jsonl:{hash_}", "hash": hash_, "loss": loss, "count": count, **fields}


def row(hash_: str, label, predicted, probability=0.9):
    return told(hash_, label=label, predicted=predicted, probability=probability)


def hashes(pairs):
    return [was["hash"] for was, _ in pairs]


def test_rows_are_matched_by_content_whatever_their_order():
    a = [row("1", "x", "x"), row("2", "x", "y"), row("3", "y", "y")]
    b = [row("4", "x", "x"), row("3", "y", "x"), row("2", "x", "x")]
    found = compare_rows(a, b)
    assert (found.kind, found.num_rows, found.only_a, found.only_b) == ("classes", 2, 1, 1)
    assert hashes(found.won) == ["2"]
    assert hashes(found.lost) == ["3"]
    assert found.num_ties == 0


def test_rows_that_flipped_are_listed_surest_first():
    a = [row(str(i), "x", "x") for i in range(3)]
    b = [row(str(i), "x", "y", p) for i, p in enumerate((0.6, 0.9, 0.7))]
    found = compare_rows(a, b)
    assert hashes(found.lost) == ["1", "2", "0"]
    assert found.lost[0] == (a[1], b[1])


def test_equal_rows_are_matched_one_by_one():
    found = compare_rows([row("1", "x", "x"), row("1", "x", "x")], [row("1", "x", "x")])
    assert (found.num_rows, found.only_a) == (1, 1)


def test_measures_of_classes_by_hand():
    a = [row("1", "x", "x"), row("2", "x", "y"), row("3", "y", "y"), row("4", "y", "x")]
    b = [row("1", "x", "x"), row("2", "x", "x"), row("3", "y", "y"), row("4", "y", "x")]
    found = compare_rows(a, b).metrics
    assert set(found) == {"loss", "accuracy", "macro_f1", "calibration_error"} <= set(METRICS)
    assert (found["accuracy"].a, found["accuracy"].b) == (0.5, 0.75)
    assert found["accuracy"].b_minus_a["value"] == 0.25
    assert found["macro_f1"].b == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found["calibration_error"].a == pytest.approx(0.4)


def test_difference_on_every_row_is_clear_and_on_one_is_not():
    a = [row(str(i), "x", "y" if i < 30 else "x") for i in range(100)]
    all_right = [row(str(i), "x", "x") for i in range(100)]
    one_more = [row(str(i), "x", "y" if i < 29 else "x") for i in range(100)]
    assert compare_rows(a, all_right).metrics["accuracy"].is_clear
    assert not compare_rows(a, one_more).metrics["accuracy"].is_clear


def test_equal_evaluations_differ_by_nothing():
    rows = [row(str(i), "x", "xy"[i % 2]) for i in range(10)]
    found = compare_rows(rows, rows)
    assert found.num_ties == 10
    assert found.metrics["accuracy"].b_minus_a == {"value": 0, "low": 0, "high": 0}
    assert not any(difference.is_clear for difference in found.metrics.values())


def test_losses_of_tokens_tie_within_the_tolerance():
    """0.01 nats a token: 0.1 for ten."""
    a = [told(str(i), 20.0, 10.0, correct=5) for i in range(4)]
    b = [told(str(i), 20.0 + d, 10.0, correct=5) for i, d in enumerate((-0.2, 0.09, -0.09, 3.0))]
    found = compare_rows(a, b)
    assert (hashes(found.won), hashes(found.lost), found.num_ties) == (["0"], ["3"], 2)


def test_windows_of_a_document_are_added_up():
    a = [told("1", 4.0, 2.0, correct=1), told("2", 9.0, 3.0, correct=0), told("1", 2.0, 1.0, correct=1)]
    b = [told("2", 9.0, 3.0, correct=0), told("1", 5.0, 4.0, correct=2)]
    found = compare_rows(a, b)
    assert found.num_rows == 2
    assert found.won[0][0]["loss"] == 6.0
    assert found.metrics["loss"].a == pytest.approx(15 / 6)
    assert found.metrics["perplexity"].b == pytest.approx(math.exp(14 / 7))
    assert found.metrics["token_accuracy"].a == pytest.approx(2 / 6)
    assert not found.same_targets


def test_bits_per_byte_compare_where_tokens_do_not():
    """6 nats on 4 + 2 bytes and 9 on 3; B has other tokens, and so other counts, of the same bytes."""
    a = [told("1", 4.0, 2.0, correct=1, bytes=4), told("2", 9.0, 3.0, correct=0, bytes=3)]
    a += [told("1", 2.0, 1.0, correct=1, bytes=2), told("1", 0.0, 1.0, correct=1)]  # its end is no text
    b = [told("2", 9.0, 3.0, correct=0, bytes=3), told("1", 5.0, 7.0, correct=2, bytes=6)]
    found = compare_rows(a, b)
    assert (found.are_documents, found.same_targets, found.num_rows) == (True, False, 2)
    assert found.metrics["bits_per_byte"].a == pytest.approx((6 + 9) / 9 / math.log(2))
    assert found.metrics["bits_per_byte"].b == pytest.approx((5 + 9) / 9 / math.log(2))
    assert "bits_per_byte" in METRICS


def test_numbers_tie_within_a_share_of_their_error():
    a = [told(str(i), 4.0, value=float(i), predicted=i + 2.0) for i in range(3)]
    b = [told(str(i), loss, value=float(i), predicted=i + loss**0.5) for i, loss in enumerate((4.03, 1.0, 9.0))]
    found = compare_rows(a, b)
    assert (hashes(found.won), hashes(found.lost), found.num_ties) == (["1"], ["2"], 1)
    assert found.metrics["mse"].b == pytest.approx((4.03 + 1 + 9) / 3)
    assert found.metrics["spearman"].a == pytest.approx(1)


def test_sets_are_right_when_whole():
    a = [row("1", ["x", "y"], ["x"], [0.8]), row("2", [], [], [])]
    b = [row("1", ["x", "y"], ["x", "y"], [0.8, 0.6]), row("2", [], ["x"], [0.7])]
    found = compare_rows(a, b)
    assert (found.kind, hashes(found.won), hashes(found.lost)) == ("sets", ["1"], ["2"])
    assert found.metrics["exact_rows"].a == 0.5
    assert found.metrics["micro_f1"].a == pytest.approx(2 * 1 / (1 + 2))


def test_sets_without_any_class_have_no_f1():
    rows = [row("1", [], [], []), row("2", [], [], [])]
    assert compare_rows(rows, rows).metrics["micro_f1"].a == 0


def test_tags_win_by_words_and_spans_are_counted():
    a = [told("1", tags=["B-P", "I-P", "O"], predicted=["B-P", "O", "O"])]
    b = [told("1", tags=["B-P", "I-P", "O"], predicted=["B-P", "I-P", "O"])]
    found = compare_rows(a, b)
    assert hashes(found.won) == ["1"]
    assert (found.metrics["span_f1"].a, found.metrics["span_f1"].b) == (0, 1)
    assert found.metrics["tag_accuracy"].a == pytest.approx(2 / 3)


def test_tags_that_mark_no_spans_have_no_span_measures():
    rows = [told("1", tags=["N", "V"], predicted=["N", "N"])]
    assert set(compare_rows(rows, rows).metrics) == {"loss", "tag_accuracy", "macro_f1"}


def answered(number: int, score: float, *, prompt: str = "p", reference: str = "r"):
    scores = {"exact_match": float(score == 1), "rouge1": score, "rouge2": score / 2, "rougeL": score}
    return {"source": f"x.jsonl:{number}", "prompt": prompt, "reference": reference, "answer": "a", **scores}


def test_answers_to_the_same_prompts_are_paired():
    """On every prompt B is 0.1 better, however much prompts differ: the difference is sure."""
    a = [answered(n, n / 10) for n in range(8)]
    b = [answered(n, n / 10 + 0.1) for n in range(8, -1, -1)]
    num, found = compare_answers(a, b)
    assert num == 8
    assert set(found) == set(ANSWER_SCORES) <= set(METRICS)
    assert (found["rougeL"].a, found["rougeL"].b) == pytest.approx((0.35, 0.45))
    assert found["rougeL"].b_minus_a == pytest.approx({"value": 0.1, "low": 0.1, "high": 0.1})
    assert found["rougeL"].is_clear
    assert not found["exact_match"].is_clear


def test_answers_to_other_prompts_or_with_another_reference_do_not_compare():
    assert compare_answers([], [answered(1, 0.5)]) == (0, {})
    assert compare_answers([answered(1, 0.5)], [answered(1, 0.5, prompt="q"), answered(2, 0.5)]) == (0, {})
    assert compare_answers([answered(1, 0.5)], [answered(1, 0.5, reference="longer")]) == (0, {})


def test_no_common_row_says_the_way_out():
    with pytest.raises(InputError, match="no row in common"):
        compare_rows([row("1", "x", "x")], [row("2", "x", "x")])


def test_two_tasks_do_not_compare():
    with pytest.raises(InputError, match="measured on classes, the second on tokens"):
        compare_rows([row("1", "x", "x")], [told("1", correct=1)])


def test_documents_are_resampled_as_the_evaluation_does():
    """Three windows each of 40 documents: the same number, and against zeros the same interval, or that of t."""
    draw = np.random.default_rng(4)
    hashes = np.repeat(draw.permutation(40).astype(np.uint64), 3)
    sums = {"losses": np.repeat(draw.exponential(9, 40), 3), "counts": [5.0] * 120, "num_bytes": [20] * 120}
    rows = results("next_token", None, tokens([[1, 2]] * 120, [[1, 3]] * 120, **sums), hashes)
    metrics, _ = score(rows)
    found = compare_rows([{**row, "loss": 0.0} for row in rows], rows[::-1]).metrics
    for key in ("loss", "bits_per_byte"):
        change = found[key].b_minus_a
        assert change["value"] == pytest.approx(metrics[key]["value"], rel=1e-12)
        assert change["high"] == pytest.approx(metrics[key]["high"], rel=1e-12)
        assert metrics[key]["low"] * 0.98 < change["low"] < metrics[key]["low"]  # losses are skewed, t is not


def test_values_are_those_of_the_evaluation_itself():
    draw = np.random.default_rng(1)
    labels = Labels("one", ("p", "q", "r"))
    true = draw.integers(0, 3, 60)
    rows = [results("sequence", labels, classes(draw.dirichlet(np.ones(3), 60), true)) for _ in range(2)]
    metrics = [score(side, classes=labels.names)[0] for side in rows]
    for key, difference in compare_rows(*rows).metrics.items():
        assert difference.a == metrics[0][key]["value"]
        assert difference.b == metrics[1][key]["value"]


# trap: M3
def test_losses_of_other_class_weights_are_compared_without_them():
    """Both models are equally good; B counts a row of y three times."""
    a = [row("1", "x", "x") | {"loss": 0.2}, row("2", "y", "y") | {"loss": 0.4}]
    b = [row("1", "x", "x") | {"loss": 0.2}, row("2", "y", "y") | {"loss": 1.2, "count": 3.0}]

    def check(loss):
        assert (loss.a, loss.b) == pytest.approx((0.3, 0.3))
        assert not loss.is_clear

    found = compare_rows(a, b)
    check(found.metrics["loss"])
    with pytest.raises(AssertionError):  # the weighted loss of B is 1.4 / 4
        check(compare_rows(b, b).metrics["loss"])
    assert found.loss_note == (
        "the two weigh classes differently (train.class_weights): the loss is compared without weights"
    )
    assert found.same_targets, "no token has anything to do with it"


def test_losses_of_tags_with_other_weights_are_not_compared():
    a = [told("1", tags=["N", "V"], predicted=["N", "N"])]
    found = compare_rows(a, [{**a[0], "count": 4.0}])
    assert "loss" not in found.metrics
    assert "so the losses cannot be compared" in found.loss_note
