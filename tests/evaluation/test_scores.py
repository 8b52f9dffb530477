"""Every metric against a case counted by hand, and every resampled one against its library on the drawn rows."""

import math
import time

import numpy as np
import pytest
from scipy.stats import spearmanr
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
from sklearn import metrics as sklearn

from evaluation.predictions import classes, numbers, results, sets, tokens
from tunesmith.evaluation import bootstrap
from tunesmith.evaluation.bootstrap import resamples, value_of
from tunesmith.evaluation.branch_scores import pair_statistics
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.scores import kind_of, labels_headline, score, statistics_of
from tunesmith.runs.atomic import from_json, to_json
from tunesmith.tasks import TASKS
from tunesmith.types import Labels

nan = math.nan


def scored(head, labels, found, *, hashes=None, constant=None):
    rows = results(head, labels, found, hashes)
    metrics, details = score(rows, classes=() if labels is None else labels.names, constant=constant)
    assert set(metrics) <= set(METRICS)
    assert from_json(to_json(details)) == details
    return metrics, details


def measured(head, labels, found, **options):
    metrics, details = scored(head, labels, found, **options)
    return {key: interval["value"] for key, interval in metrics.items()}, details


# Tokens


def test_loss_of_tokens_is_sum_over_sum_not_the_mean_of_rows():
    outcomes = tokens([[5, 6], [7]], [[5, 9], [8]], losses=[2.0, 3.0], counts=[2.0, 1.0])
    values, _ = measured("next_token", None, outcomes)
    assert values == pytest.approx({"loss": 5 / 3, "perplexity": math.exp(5 / 3), "token_accuracy": 1 / 3})


def test_bits_per_byte_are_the_losses_in_bits_over_the_bytes_of_the_text():
    outcomes = tokens([[5], [6]], [[5], [6]], losses=[2 * math.log(2), 6 * math.log(2)], num_bytes=[1, 3])
    values, _ = measured("next_token", None, outcomes)
    assert values["bits_per_byte"] == pytest.approx(2.0)


def windows(num_windows: int, *, hashes=None):
    """Sixty documents that differ in how hard they are, each in as many windows that are alike."""
    draw = np.random.default_rng(2)
    hard = np.repeat(draw.exponential(4, 60), num_windows)
    outcomes = tokens([[5]] * len(hard), [[5]] * len(hard), losses=hard, num_bytes=[3] * len(hard))
    return scored("next_token", None, outcomes, hashes=hashes)[0]


def test_windows_of_one_document_make_no_interval_narrower():
    """Ten equal windows say no more than one. Taken for independent they would narrow the interval by √10."""
    whole, cut = windows(1), windows(10, hashes=np.repeat(np.arange(60, dtype=np.uint64), 10))
    for key in ("loss", "perplexity", "bits_per_byte", "token_accuracy"):
        assert cut[key] == pytest.approx(whole[key], rel=1e-12)
    naive = windows(10)["loss"]
    assert (whole["loss"]["high"] - whole["loss"]["low"]) / (naive["high"] - naive["low"]) > 2.5


def test_the_order_of_rows_has_no_say():
    """A run, an evaluation of its file and a comparison read the same rows in different orders."""
    draw = np.random.default_rng(5)
    hashes, order = draw.permutation(30).astype(np.uint64), draw.permutation(30)
    losses = draw.exponential(4, 30)
    found = tokens([[5]] * 30, [[5]] * 30, losses=losses)
    moved = tokens([[5]] * 30, [[5]] * 30, losses=losses[order])
    first, other = (
        scored("next_token", None, found, hashes=hashes),
        scored("next_token", None, moved, hashes=hashes[order]),
    )
    assert first == other


def test_masked_tokens_have_no_bits_per_byte():
    """Only a share of the tokens is guessed, but the bytes are those of all."""
    outcomes = tokens([[5]], [[5]], num_bytes=[4])
    assert set(measured("masked_token", None, outcomes)[0]) == {"loss", "perplexity", "token_accuracy"}


def test_perplexity_of_a_lost_model_is_a_number_still():
    values, _ = measured("next_token", None, tokens([[1]], [[2]], losses=[1e6]))
    assert math.isfinite(values["perplexity"])


def test_loss_that_is_not_a_number_is_said_so():
    measures, _ = scored("next_token", None, tokens([[1]], [[2]], losses=[nan]))
    assert all(math.isnan(measures["loss"][end]) for end in ("value", "low", "high"))


# One class a row

FIVE = Labels("one", ("a", "b", "c", "d", "e"))
CERTAIN = np.eye(5) * 0.95 + 0.01


def test_classes_counted_by_hand():
    """a: 1 right, 1 found, 2 true. b: 2 right, 3 found, 2 true. c is never found, d never true, e neither."""
    outcomes = classes(CERTAIN[[0, 1, 1, 1, 3]], [0, 0, 1, 1, 2])
    values, details = measured("sequence", FIVE, outcomes, constant="b")
    f1_a, f1_b = 2 * 1 / (1 + 2), 2 * 2 / (3 + 2)
    assert values["accuracy"] == pytest.approx(3 / 5)
    assert values["macro_f1"] == pytest.approx((f1_a + f1_b + 0 + 0) / 4)  # e is left out, as in scikit-learn
    assert values["majority"] == pytest.approx(2 / 5)
    assert details["confusion"] == [[1, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 0, 0, 1, 0], [0] * 5, [0] * 5]
    table = [(row["label"], row["precision"], row["recall"], row["support"]) for row in details["per_class"]]
    assert table == [("a", 1, 1 / 2, 2), ("b", 2 / 3, 1, 2), ("c", 0, 0, 1), ("d", 0, 0, 0), ("e", 0, 0, 0)]
    assert [row["f1"] for row in details["per_class"]] == pytest.approx([f1_a, f1_b, 0, 0, 0])


def test_calibration_error_counted_by_hand():
    """Two rows 95 % sure, one of them right: gap 0.45 each. One row 55 % sure and right: gap 0.45."""
    two = Labels("one", ("no", "yes"))
    outcomes = classes([[0.95, 0.05], [0.05, 0.95], [0.45, 0.55]], [0, 0, 1])
    values, _ = measured("sequence", two, outcomes)
    assert values["calibration_error"] == pytest.approx((2 * 0.45 + 1 * 0.45) / 3, abs=1e-6)  # float32 logits


def test_area_under_the_curve_counted_by_hand():
    """Of the four pairs of a positive and a negative two are in order, one is not, one is tied."""
    two = Labels("one", ("no", "yes"))
    outcomes = classes([[0.1, 0.9], [0.6, 0.4], [0.4, 0.6], [0.6, 0.4]], [1, 1, 0, 0])
    values, details = measured("sequence", two, outcomes)
    assert values["roc_auc"] == pytest.approx(2.5 / 4)
    at = {round(point["threshold"], 2): point for point in details["threshold"]}
    assert len(at) == 99
    assert at[0.5] == pytest.approx({"threshold": 0.5, "precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2})
    assert at[0.95] == pytest.approx({"threshold": 0.95, "precision": 0, "recall": 0, "f1": 0})


def test_area_under_the_curve_of_one_class_is_not_defined():
    two = Labels("one", ("no", "yes"))
    measures, _ = scored("sequence", two, classes([[0.1, 0.9]], [1]))
    assert all(math.isnan(measures["roc_auc"][end]) for end in ("value", "low", "high"))


# Any number of classes a row


def test_sets_of_classes_counted_by_hand():
    """3 right of 4 found and 4 true. a: F1 1. b: 1 right, 2 found, 1 true. c: 0 of 0 found and 1. d: neither."""
    many = Labels("many", ("a", "b", "c", "d"))
    chances = [[0.9, 0.8, 0.1, 0.1], [0.7, 0.6, 0.2, 0.1], [0.2, 0.1, 0.1, 0.1]]
    outcomes = sets(chances, [[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    values, details = measured("sequence", many, outcomes)
    assert values["micro_f1"] == pytest.approx(2 * 3 / (4 + 4))
    assert values["macro_f1"] == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)  # every class counts, as in scikit-learn
    assert values["exact_rows"] == pytest.approx(2 / 3)
    assert [row["support"] for row in details["per_class"]] == [2, 1, 1, 0]


@pytest.mark.parametrize("true", [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_sets_of_one_class_are_that_class_or_nothing(true):
    """Found in the first and the third row; a row that rightly has none is no part of F1."""
    outcomes = sets([[0.9], [0.2], [0.8], [0.1]], [[t] for t in true])
    values, details = measured("sequence", Labels("many", ("spam",)), outcomes)
    right, found = true[0] + true[2], 2
    f1 = 2 * right / (found + sum(true))
    assert values["micro_f1"] == values["macro_f1"] == pytest.approx(f1)
    assert values["exact_rows"] == pytest.approx(sum(t == p for t, p in zip(true, [1, 0, 1, 0], strict=True)) / 4)
    [row] = details["per_class"]
    assert row["support"] == sum(true)
    assert (row["label"], row["precision"], row["f1"]) == ("spam", right / found, pytest.approx(f1))


# Numbers


def test_numbers_counted_by_hand():
    values, details = measured("sequence", Labels("number"), numbers([1, 3, 2, 4], [1, 2, 3, 4]), constant=2.0)
    assert values["mse"] == pytest.approx((0 + 1 + 1 + 0) / 4)
    assert values["baseline_mse"] == pytest.approx((1 + 0 + 1 + 4) / 4)
    assert values["spearman"] == pytest.approx(1 - 6 * (0 + 1 + 1 + 0) / (4 * (16 - 1)))
    assert details["scatter"] == [[1, 1], [2, 3], [3, 2], [4, 4]]


def test_rank_correlation_of_a_constant_is_not_defined(recwarn):
    values, _ = measured("sequence", Labels("number"), numbers([2, 2, 2], [1, 2, 3]))
    assert math.isnan(values["spearman"])
    assert not recwarn.list


def test_scatter_shows_five_hundred_rows_evenly():
    _, details = measured("sequence", Labels("number"), numbers(range(2000), range(2000)))
    assert len(details["scatter"]) == 500
    assert details["scatter"][0] == [0, 0]
    assert details["scatter"][-1] == [1999, 1999]


# Tags

TAGS = Labels("tags", ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"))
OUT, BP, IP, BL, IL = range(5)


def test_spans_counted_by_hand():
    """True: PER 0–1, LOC 3, PER 0. Found: PER 0–1, PER 3, LOC 0–1. One of three is right both ways."""
    outcomes = tokens([[BP, IP, OUT, BP], [BL, IL]], [[BP, IP, OUT, BL], [BP, OUT]])
    values, details = measured("tokens", TAGS, outcomes)
    assert (values["span_precision"], values["span_recall"], values["span_f1"]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert values["tag_accuracy"] == pytest.approx(3 / 6)
    assert details["per_type"] == [
        {"type": "LOC", "precision": 0, "recall": 0, "f1": 0, "support": 1},
        {"type": "PER", "precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2},
    ]


FIXTURES = {
    "IOB2": ([["B-A", "I-A", "B-A", "O", "B-B"]], [["B-A", "I-A", "I-A", "O", "B-B"]]),
    "IOB1": ([["I-A", "I-A", "B-A", "O", "I-B"]], [["I-A", "I-A", "I-A", "O", "I-B"]]),
    "a type changes inside a span": ([["B-A", "I-B", "I-B"]], [["B-A", "I-A", "I-B"]]),
    "IOBES": ([["B-A", "E-A", "S-B", "O"]], [["B-A", "I-A", "S-B", "O"]]),
    "without types": ([["B", "I", "O", "B"]], [["B", "I", "O", "O"]]),
    "nothing true": ([["O", "O"]], [["B-A", "O"]]),
    "nothing found": ([["B-A", "O"]], [["O", "O"]]),
    "neither": ([["O", "O"]], [["O", "O"]]),
}


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.filterwarnings("ignore")  # seqeval's own remarks on what is not defined
def test_spans_are_those_of_seqeval(name):
    true, found = FIXTURES[name]
    names = tuple(dict.fromkeys(tag for row in [*true, *found] for tag in [*row, "B-A"]))
    ids = [[[names.index(tag) for tag in row] for row in rows] for rows in (found, true)]
    values, details = measured("tokens", Labels("tags", names), tokens(*ids))
    assert values["span_f1"] == pytest.approx(f1_score(true, found))
    assert values["span_precision"] == pytest.approx(precision_score(true, found))
    assert values["span_recall"] == pytest.approx(recall_score(true, found))
    report = classification_report(true, found, output_dict=True) if details["per_type"] else {}
    for row in details["per_type"]:
        assert row["f1"] == pytest.approx(report[row["type"]]["f1-score"])


def test_tags_that_are_no_spans_are_scored_one_by_one():
    """N: 2 right, 3 found, 2 true. V: 1 right, 1 found, 2 true."""
    outcomes = tokens([[0, 1], [0, 0]], [[0, 1], [0, 1]])
    values, details = measured("tokens", Labels("tags", ("N", "V", "X")), outcomes)
    assert values["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert values["tag_accuracy"] == pytest.approx(3 / 4)
    assert "span_f1" not in values
    assert [row["type"] for row in details["per_type"]] == ["N", "V", "X"]


# Every statistic is its library's number on the rows that were drawn


def cases():
    draw = np.random.default_rng(3)
    num = 40
    lengths = draw.integers(1, 9, num)
    rows = [draw.integers(0, 5, n) for n in lengths]
    guesses = [np.where(draw.random(len(row)) < 0.6, row, draw.integers(0, 5, len(row))) for row in rows]
    losses = {"losses": draw.exponential(size=num), "num_bytes": [7] * num}
    yield "tokens", ("next_token", None, tokens(guesses, rows, **losses))
    yield "spans", ("tokens", TAGS, tokens(guesses, rows))
    yield "tags", ("tokens", Labels("tags", tuple("NVADX")), tokens(guesses, rows))
    for num_classes in (2, 12):  # with 12 many a resample lacks a class
        chances = draw.dirichlet(np.ones(num_classes), num).round(2) + 1e-3  # rounded: some are tied
        labels = Labels("one", tuple(f"c{i:02}" for i in range(num_classes)))
        yield f"{num_classes} classes", ("sequence", labels, classes(chances, draw.integers(0, num_classes, num)))
    chances = draw.uniform(0.05, 0.95, (num, 6))
    yield "sets", ("sequence", Labels("many", tuple("abcdef")), sets(chances, draw.integers(0, 2, (num, 6))))
    one = sets(chances[:, :1], draw.integers(0, 2, (num, 1)))
    yield "sets of one class", ("sequence", Labels("many", ("a",)), one)
    found = numbers(draw.integers(0, 9, num), draw.integers(0, 9, num))
    yield "numbers", ("sequence", Labels("number"), found)


CASES = dict(cases())


def by_library(kind, rows, names):
    """The metrics of some rows as scikit-learn, scipy and seqeval compute them, or as their definition."""
    loss = sum(row["loss"] for row in rows) / sum(row["count"] for row in rows)
    found = {"loss": loss}
    if kind == "tokens":
        bits = sum(row["loss"] for row in rows) / math.log(2) / sum(row["bytes"] for row in rows)
        right = sum(row["correct"] for row in rows) / sum(row["count"] for row in rows)
        return found | {"perplexity": math.exp(loss), "token_accuracy": right, "bits_per_byte": bits}
    true, said = (
        [row[key] for row in rows] for key in ({"numbers": "value", "tags": "tags"}.get(kind, "label"), "predicted")
    )
    if kind == "numbers":
        return found | {"mse": sklearn.mean_squared_error(true, said), "spearman": spearmanr(true, said).statistic}
    if kind == "tags":
        flat = [tag for row in true for tag in row], [tag for row in said for tag in row]
        found |= {"tag_accuracy": sklearn.accuracy_score(*flat)}
        if "O" not in names:
            return found | {"macro_f1": sklearn.f1_score(*flat, average="macro", zero_division=0)}
        spans = {"span_f1": f1_score, "span_precision": precision_score, "span_recall": recall_score}
        return found | {key: function(true, said, zero_division=0) for key, function in spans.items()}
    if kind == "sets":
        true, said = (np.array([[name in row for name in names] for row in rows]) for rows in (true, said))
        found |= {"exact_rows": float((true == said).all(1).mean()), "label_accuracy": float((true == said).mean())}
        options = {"zero_division": 0}
        if len(names) == 1:
            true, said, options = true[:, 0], said[:, 0], {"zero_division": 0, "labels": [True]}
        return found | {f"{a}_f1": sklearn.f1_score(true, said, average=a, **options) for a in ("micro", "macro")}
    found |= {
        "accuracy": sklearn.accuracy_score(true, said),
        "macro_f1": sklearn.f1_score(true, said, average="macro", zero_division=0),
    }
    if len(names) == 2:
        second = [row["probability"] if row["predicted"] == names[1] else 1 - row["probability"] for row in rows]
        found["roc_auc"] = sklearn.roc_auc_score(np.array(true) == names[1], second)
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_statistic_is_that_of_its_library_on_the_rows_drawn(name):
    head, labels, found = CASES[name]
    rows = results(head, labels, found)
    names = () if labels is None else labels.names
    statistics = statistics_of(kind_of(rows[0]), rows, names, complete=True)
    weights_RI = np.concatenate([np.ones((1, len(rows))), next(iter(resamples(len(rows))))[:12]])
    of_all = {key: statistic(weights_RI) for key, statistic in statistics.items() if key != "calibration_error"}
    for r, weights_I in enumerate(weights_RI):
        drawn = [rows[i] for i in np.repeat(np.arange(len(rows)), weights_I.astype(int))]
        # 1e-9: the same sums in another order
        assert {key: values_R[r] for key, values_R in of_all.items()} == pytest.approx(
            by_library(kind_of(rows[0]), drawn, names), rel=1e-9, abs=1e-9
        )


def test_thousand_rows_of_21_classes_take_less_than_a_second():
    draw = np.random.default_rng(0)
    outcomes = classes(draw.dirichlet(np.ones(21), 1000), draw.integers(0, 21, 1000))
    labels = Labels("one", tuple(map(str, range(21))))
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        measured("sequence", labels, outcomes, constant="0")
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 1


def assert_a_calibrated_reward_is_said_to_be_so(size: int) -> None:  # trap: M7
    """Orders are drawn from the model's own rewards by Plackett and Luce, so that the better of two is i in σ(r_i −
    r_j) of all cases: the error is that of 3,000 rows by chance, which is below 0.02."""
    draw, rows = np.random.default_rng(size), []
    for i in range(3000):
        rewards = draw.normal(0, 1.2, size)
        order = np.argsort(-(rewards + draw.gumbel(size=size)))
        fields = {"rewards": rewards[order].tolist(), "scores": list(range(size))[::-1], "lengths": [1] * size}
        rows.append({"hash": f"{i:x}", "loss": 1.0, "count": 1, **fields})
    assert value_of(pair_statistics(rows, (), True)["calibration_error"], len(rows)) < 0.02


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_a_calibrated_reward_is_said_to_be_so(size):
    assert_a_calibrated_reward_is_said_to_be_so(size)


def test_calibration_by_the_mean_of_a_rows_pairs_would_be_seen(monkeypatch):
    def by_row(confidences_P, hits_P, rows_P):
        leads_P = np.log(confidences_P / (1 - confidences_P)) * np.where(hits_P > 0, 1, -1)
        means_I = np.bincount(rows_P, leads_P) / np.bincount(rows_P)
        return real(1 / (1 + np.exp(-np.abs(means_I))), means_I > 0)

    real = bootstrap.calibration_error
    monkeypatch.setattr(bootstrap, "calibration_error", by_row)
    with pytest.raises(AssertionError):
        assert_a_calibrated_reward_is_said_to_be_so(4)


def test_the_pairs_of_a_row_share_its_weight():
    """By hand: one pair that is right with 0.88, and three of a row whose answers all differ by 2 or 4, a tie half."""
    rows = [{"rewards": [2.0, 0.0], "scores": [1, 0], "lengths": [1, 1]},
            {"rewards": [0.0, 2.0, 2.0], "scores": [2, 1, 0], "lengths": [1, 1, 1]}]  # fmt: skip
    rows = [{"hash": str(i), "loss": 1.0, "count": 1, **row} for i, row in enumerate(rows)]
    sure = 1 / (1 + math.exp(-2))
    expected = (abs((sure - 1) + 2 * sure / 3) + abs((0.5 - 0.5) / 3)) / 2
    assert value_of(pair_statistics(rows, (), True)["calibration_error"], 2) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("task", "kind", "names", "key"),
    [
        ("classify", "one", ("no", "yes"), "accuracy"),
        ("classify", "many", ("a", "b"), "macro_f1"),
        ("classify", "number", (), "spearman"),
        ("tag", "tags", ("O", "B-PER", "I-PER"), "span_f1"),
        ("tag", "tags", ("NOUN", "VERB"), "tag_accuracy"),
        ("rank", "number", (), "loss"),  # its rows are lists, whatever a document gets
    ],
)
def test_rows_with_labels_have_a_headline(task, kind, names, key):
    assert labels_headline(TASKS[task], Labels(kind, names)) == key
