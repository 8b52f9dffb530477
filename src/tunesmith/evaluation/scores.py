"""Metrics of a task from the results of its rows, each with its interval, and metrics of generated answers.

A row's result is one line of evaluation/<name>.jsonl. Values equal scikit-learn's, scipy's, seqeval's and
rouge-score's. Definitions: docs/reference/measures.md.
"""

# I rows, C classes

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.evaluation import bootstrap, branch_scores, graded_scores
from tunesmith.evaluation.bootstrap import Floats, Interval, Statistic, divide, intervals, ratio, value_of
from tunesmith.evaluation.branch_scores import HABITS, column
from tunesmith.evaluation.metrics import HEAD_METRICS
from tunesmith.tasks.task import Task
from tunesmith.types import JsonObject, Labels, Record

RowResult = Record
"""One line of evaluation/<name>.jsonl, or its numbers alone; see `predict_rows.row_results`."""
Constant = str | float | list[str]
"""One answer to every row: a class or tag, a number, or the classes that hold."""
RowKind = Literal[
    "tokens", "classes", "sets", "numbers", "tags", "pairs", "answers", "rewards", "ranks", "similarities",
    "graded", "taught",
]  # fmt: skip
MEASURED_ROWS = "the rows measured"
OVER_CLASSES = ("label_accuracy", "macro_f1")
"""Metrics of sets that are means over all classes of the head, also those that no row names."""
MOST_DOTS = 500
"""Rows in a scatter."""
MOST_SOURCES = 20
"""Sources whose losses are measured apart."""
PREFIXES = ("B", "I", "E", "S")

ANSWER_SCORES = ("exact_match", "rouge1", "rouge2", "rougeL")
"""Scores of each answer in evaluation/answers-<name>.jsonl."""
SHORT_WORDS = 3
"""An answer of at most this number of words is right or wrong: a class, a name, a date."""
MOSTLY_SHARE = 0.9
_SUMS = ("loss", "count", "correct", "bytes")
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai, Lao, kana, Han: no spaces
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")


def score(
    rows: Iterable[RowResult],
    *,
    classes: Sequence[str] = (),
    constant: Constant | None = None,
    constant_from: str = "the training rows",
) -> tuple[dict[str, Interval], JsonObject]:
    """Metrics of at least one row by the keys of `METRICS`, and JSON-ready details by kind of row.

    `classes`: the head's. `constant` is the baseline's answer to every row, by the labels of `constant_from`;
    None: no baseline.
    """
    results = list(rows)
    kind, units = kind_of(results[0]), list(by_key(results).values())
    statistics = statistics_of(kind, units, classes, complete=True)
    details: JsonObject = {} if kind == "tokens" else _DETAILS[kind](results, classes)
    if habits := {key: value_of(statistics[key], len(units)) for key in HABITS if key in statistics}:
        details["constant"] = {
            "answer": max(habits, key=lambda key: np.nan_to_num(habits[key])),
            "from": MEASURED_ROWS,
        }
    elif "recall" in details:
        details["constant"] = {"answer": branch_scores.BM25, "from": MEASURED_ROWS}
    elif constant is not None and kind != "similarities":  # a rank correlation, which no constant has
        statistics |= _baseline(kind, units, classes, constant)
        details["constant"] = {"answer": constant, "from": constant_from}
    return intervals(len(units), statistics), details


def loss_by_source(rows: Sequence[RowResult], sources: Sequence[str]) -> dict[str, JsonObject]:
    """Rows and loss of each source, {"rows": 12, "loss": {"value", "low", "high"}}, of 2 to `MOST_SOURCES`;
    else empty. `sources`: the source of each row."""
    names = list(dict.fromkeys(sources))
    if not 1 < len(names) <= MOST_SOURCES:
        return {}
    by_source = {}
    for name in names:
        rows_of_source = [row for row, source in zip(rows, sources, strict=True) if source == name]
        units = list(by_key(rows_of_source).values())
        loss = ratio([unit["loss"] for unit in units], [unit["count"] for unit in units])
        by_source[name] = {"rows": len(rows_of_source), **intervals(len(units), {"loss": loss})}
    return by_source


def kind_of(row: RowResult) -> RowKind:
    """The kind of prediction that a row's result holds."""
    for mark, kind in _MARKS.items():
        if mark in row:
            return kind
    return "sets" if isinstance(row["label"], list) else "classes"


_MARKS: Mapping[str, RowKind] = {
    "correct": "tokens", "rewards": "rewards", "wanted": "answers", "logps": "pairs", "rank": "ranks",
    "similarity": "similarities", "value": "numbers", "tags": "tags", graded_scores.MARK: "graded",
    "agreed": "taught",
}  # fmt: skip
"""Keys of which the first one that a row has says its kind."""


def by_key(rows: Iterable[RowResult]) -> dict[tuple[str, int], RowResult]:
    """The units that are resampled, in the order of their hashes, whatever the order of the rows.

    Keys are a row's hash and how many rows with that hash came before. The windows of a document, which share
    its hash, are one unit: their sums are added up.
    """
    units: dict[tuple[str, int], RowResult] = {}
    for key, row in keyed(rows):
        if key in units:
            sums = {name: units[key].get(name, 0) + row[name] for name in _SUMS if name in row}
            units[key] = {**units[key], **sums}
        else:
            units[key] = row
    return dict(sorted(units.items(), key=lambda item: item[0]))


def keyed(rows: Iterable[RowResult]) -> Iterator[tuple[tuple[str, int], RowResult]]:
    """Each row with its key, see `by_key`."""
    seen: Counter[str] = Counter()
    for row in rows:
        yield (row["hash"], 0 if "correct" in row else seen[row["hash"]]), row
        seen[row["hash"]] += 1


def num_right(row: RowResult) -> int:
    """1 for a row whose class or classes are right, else 0; of tags how many are."""
    if "margin" in row or "rewards" in row:
        return int((branch_scores.gains(row, "margin").mean() > 0) == row.get("wanted", True))
    if "rank" in row:
        return int(row["rank"] == 1)
    if "tags" in row:
        return sum(tag == predicted for tag, predicted in zip(row["tags"], row["predicted"], strict=True))
    return int(row["label"] == row["predicted"])


def sureness(row: RowResult) -> float:
    """Probability of a row's prediction; the least sure one of several classes."""
    chances = row.get("probability", 0.0)
    return float(min(chances, default=0.0) if isinstance(chances, list) else chances)


def statistics_of(
    kind: RowKind, rows: Sequence[RowResult], classes: Sequence[str], *, complete: bool
) -> dict[str, Statistic]:
    """Every metric of some rows as a function of row weights, by the keys of `METRICS`.

    `complete`: `classes` are all that the head has; else those that are known from rows.
    """
    loss = ratio(column(rows, "loss"), column(rows, "count"))
    return {"loss": loss, **_STATISTICS[kind](rows, classes or names_in(rows), complete)}


def names_in(rows: Iterable[RowResult]) -> list[str]:
    """The classes that rows name, sorted."""
    names: set[str] = set()
    for row in rows:
        for value in (row.get("label"), row.get("tags"), row.get("predicted")):
            listed = value if isinstance(value, list) else [value]
            names.update(name for name in listed if isinstance(name, str))
    return sorted(names)


def _token_statistics(rows: Sequence[RowResult], _: Sequence[str], complete: bool) -> dict[str, Statistic]:
    loss = ratio(column(rows, "loss"), column(rows, "count"))
    statistics: dict[str, Statistic] = {
        "perplexity": lambda weights_RI: np.exp(np.minimum(loss(weights_RI), 700.0)),
        "token_accuracy": ratio(column(rows, "correct"), column(rows, "count")),
    }
    if any("bytes" in row for row in rows):
        num_bytes_I = np.array([row.get("bytes", 0) for row in rows])
        statistics["bits_per_byte"] = ratio(column(rows, "loss") / math.log(2), num_bytes_I)
    return statistics


def _taught_statistics(rows: Sequence[RowResult], _: Sequence[str], complete: bool) -> dict[str, Statistic]:
    """The loss is the divergence from a teacher; next to it where both agree, and
    what the rows' tokens lose."""
    names = (("agreement", "agreed"), ("answer_loss", "answers"))
    return {key: ratio(column(rows, name), column(rows, "count")) for key, name in names}


def _class_statistics(rows: Sequence[RowResult], classes: Sequence[str], complete: bool) -> dict[str, Statistic]:
    """One class a row; macro-F1 is over the classes that are true or predicted in some row."""
    true_I, found_I = _class_ids(rows, classes)
    true_IC, found_IC = (np.arange(len(classes)) == ids_I[:, None] for ids_I in (true_I, found_I))
    hits_I = true_I == found_I
    statistics = {
        "accuracy": ratio(hits_I),
        "macro_f1": bootstrap.macro_f1(true_IC & found_IC, true_IC.astype(int) + found_IC, absent_count=False),
        "calibration_error": bootstrap.calibration_error(column(rows, "probability"), hits_I),
    }
    if complete and len(classes) == 2:
        statistics["roc_auc"] = bootstrap.roc_auc(true_I == 1, _second_chances(rows, classes))
    return statistics


def _class_ids(rows: Sequence[RowResult], classes: Sequence[str]) -> list[NDArray[np.int64]]:
    ids = {name: i for i, name in enumerate(classes)}
    return [np.array([ids[row[key]] for row in rows], np.int64) for key in ("label", "predicted")]


def _second_chances(rows: Sequence[RowResult], classes: Sequence[str]) -> Floats:
    """Probability of the second of two classes; the probability of one is what the other leaves."""
    pairs = ((row["probability"], row["predicted"] == classes[1]) for row in rows)
    return np.array([chance if is_second else 1 - chance for chance, is_second in pairs], np.float64)


def _set_statistics(rows: Sequence[RowResult], classes: Sequence[str], complete: bool) -> dict[str, Statistic]:
    """Any number of classes a row: those whose probability is above one half."""
    true_IC, found_IC = _class_sets(rows, classes)
    right_IC = true_IC & found_IC
    counts_I3 = np.stack([right_IC.sum(1), found_IC.sum(1), true_IC.sum(1)], axis=1)
    statistics = {
        "micro_f1": bootstrap.precision_recall_f1(counts_I3)[2],
        "exact_rows": ratio((true_IC == found_IC).all(1)),
        "label_accuracy": ratio((true_IC == found_IC).sum(1) / max(len(classes), 1)),
        "macro_f1": bootstrap.macro_f1(right_IC, true_IC.astype(int) + found_IC, absent_count=True),
    }
    return statistics if complete else {key: statistics[key] for key in statistics if key not in OVER_CLASSES}


def _class_sets(rows: Sequence[RowResult], classes: Sequence[str]) -> list[NDArray[np.bool_]]:
    shape = len(rows), len(classes)
    sets = ([[name in row[key] for name in classes] for row in rows] for key in ("label", "predicted"))
    return [np.array(of_rows, np.bool_).reshape(shape) for of_rows in sets]


def _number_statistics(rows: Sequence[RowResult], _: Sequence[str], complete: bool) -> dict[str, Statistic]:
    true_I, found_I = column(rows, "value"), column(rows, "predicted")
    return {"mse": ratio((true_I - found_I) ** 2), "spearman": bootstrap.spearman(true_I, found_I)}


def _tag_statistics(rows: Sequence[RowResult], classes: Sequence[str], complete: bool) -> dict[str, Statistic]:
    """Metrics of whole spans where every class is O or a tag of a span (B-PER, I-PER, ...), else macro-F1."""
    words_I = np.array([len(row["tags"]) for row in rows])
    scores: dict[str, Statistic] = {"tag_accuracy": ratio([num_right(row) for row in rows], words_I)}
    if mark_spans(classes):
        statistics = bootstrap.precision_recall_f1(_span_counts(rows).sum(2))
        return scores | dict(zip(("span_precision", "span_recall", "span_f1"), statistics, strict=True))
    right_IC, found_IC, true_IC = _tag_counts(rows, classes)
    return scores | {"macro_f1": bootstrap.macro_f1(right_IC, found_IC + true_IC, absent_count=False)}


def labels_headline(task: Task, labels: Labels) -> str:
    """The first of the task's headline metrics that rows with these labels have; "loss" where there is none."""
    keys = () if task.outcome else HEAD_METRICS[labels.kind]
    spans = mark_spans(labels.names)
    return next((key for key in task.headline_metrics if key in keys and (spans or "span" not in key)), "loss")


def mark_spans(names: Sequence[str]) -> bool:
    """Whether these tags mark where spans begin and continue; parts of speech, for one, do not."""
    marks = [name for name in names if name != "O"]
    return bool(marks) and all(name in PREFIXES or (name[:1] in PREFIXES and name[1:2] == "-") for name in marks)


def _span_counts(rows: Sequence[RowResult], types: Sequence[str] | None = None) -> NDArray[np.int64]:
    """Spans of each row that are right, found and true, by type, int64 [I, 3, types]; seqeval's default mode,
    which reads IOB1 and IOB2 as conlleval does."""
    spans = [[_spans(row[key]) for row in rows] for key in ("tags", "predicted")]
    kinds = types if types is not None else sorted({kind for side in spans for row in side for kind, _, _ in row})
    counts = np.zeros((len(rows), 3, len(kinds)), np.int64)
    for i, (true, predicted) in enumerate(zip(*spans, strict=True)):
        for k, chosen in enumerate((true & predicted, predicted, true)):
            for kind, _, _ in chosen:
                counts[i, k, kinds.index(kind)] += 1
    return counts


def _spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    from seqeval.metrics.sequence_labeling import get_entities  # now: it imports scikit-learn

    return set(get_entities(list(tags)))


def _tag_counts(rows: Sequence[RowResult], classes: Sequence[str]) -> NDArray[np.int64]:
    """Words of each row whose tag is right, found and true, by class: [3, I, C]."""
    ids = {name: i for i, name in enumerate(classes)}
    counts = np.zeros((3, len(rows), len(classes)), np.int64)
    for i, row in enumerate(rows):
        for tag, predicted in zip(row["tags"], row["predicted"], strict=True):
            counts[0, i, ids[tag]] += tag == predicted
            counts[1, i, ids[predicted]] += 1
            counts[2, i, ids[tag]] += 1
    return counts


_STATISTICS: Mapping[RowKind, Callable[[Sequence[RowResult], Sequence[str], bool], dict[str, Statistic]]] = {
    "tokens": _token_statistics,
    "classes": _class_statistics,
    "sets": _set_statistics,
    "numbers": _number_statistics,
    "tags": _tag_statistics,
    "pairs": branch_scores.pair_statistics,
    "answers": branch_scores.answer_statistics,
    "rewards": branch_scores.pair_statistics,
    "ranks": branch_scores.rank_statistics,
    "similarities": branch_scores.similarity_statistics,
    "graded": graded_scores.graded_statistics,
    "taught": _taught_statistics,
}


def _baseline(kind: RowKind, rows: Sequence[RowResult], classes: Sequence[str], constant: Any) -> dict[str, Statistic]:
    """The metric that a constant answer is best at, of that answer."""
    if kind == "numbers":
        return {"baseline_mse": ratio((column(rows, "value") - constant) ** 2)}
    if kind == "tags":
        hits_I = np.array([sum(tag == constant for tag in row["tags"]) for row in rows])
        return {"majority": ratio(hits_I, np.array([len(row["tags"]) for row in rows]))}
    if kind == "sets":
        true_IC, _ = _class_sets(rows, classes)
        return {"majority": ratio((true_IC == np.array([name in constant for name in classes])).mean(1))}
    return {"majority": ratio(np.array([row["label"] == constant for row in rows]))}


def _class_details(rows: Sequence[RowResult], classes: Sequence[str]) -> JsonObject:
    true_I, found_I = _class_ids(rows, classes)
    confusion_CC = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion_CC, (true_I, found_I), 1)
    counts = confusion_CC.diagonal(), confusion_CC.sum(0), confusion_CC.sum(1)
    details = {
        "labels": list(classes),
        "confusion": confusion_CC.tolist(),
        "per_class": _table("label", classes, *counts),
    }
    if len(classes) == 2:
        details["threshold"] = _threshold_curve(true_I == 1, _second_chances(rows, classes))
    return details


def _set_details(rows: Sequence[RowResult], classes: Sequence[str]) -> JsonObject:
    true_IC, found_IC = _class_sets(rows, classes)
    counts = (true_IC & found_IC).sum(0), found_IC.sum(0), true_IC.sum(0)
    return {"labels": list(classes), "per_class": _table("label", classes, *counts)}


def _number_details(rows: Sequence[RowResult], _: Sequence[str]) -> JsonObject:
    key = "similarity" if "similarity" in rows[0] else "predicted"
    shown = np.unique(np.linspace(0, len(rows) - 1, MOST_DOTS).astype(np.int64)).tolist()
    return {"scatter": [[rows[i]["value"], rows[i][key]] for i in shown]}


def _tag_details(rows: Sequence[RowResult], classes: Sequence[str]) -> JsonObject:
    if mark_spans(classes):
        spans = [span for row in rows for key in ("tags", "predicted") for span in _spans(row[key])]
        types = sorted({kind for kind, _, _ in spans})
        table = _table("type", types, *_span_counts(rows, types).sum(0))
    else:
        table = _table("type", classes, *_tag_counts(rows, classes).sum(1))
    return {"labels": list(classes), "per_type": table}


_DETAILS: Mapping[RowKind, Callable[[Sequence[RowResult], Sequence[str]], JsonObject]] = {
    "classes": _class_details,
    "sets": _set_details,
    "numbers": _number_details,
    "tags": _tag_details,
    "pairs": branch_scores.pair_details,
    "answers": lambda rows, _: {},
    "rewards": branch_scores.pair_details,
    "ranks": branch_scores.rank_details,
    "similarities": _number_details,
    "graded": graded_scores.graded_details,
    "taught": lambda rows, _: {},
}


def _table(key: str, names: Sequence[str], right_C: Any, found_C: Any, true_C: Any) -> list[JsonObject]:
    """Precision, recall, F1 and support of each class; 0 where one is not defined."""
    scores = divide(right_C, found_C), divide(right_C, true_C), divide(2 * right_C, found_C + true_C)
    rows = zip(names, *(column.tolist() for column in (*scores, true_C)), strict=True)
    return [dict(zip((key, "precision", "recall", "f1", "support"), row, strict=True)) for row in rows]


def _threshold_curve(positive_I: NDArray[np.bool_], chances_I: Floats) -> list[dict[str, float]]:
    """Precision, recall and F1 if rows were called positive from a probability of 0.01, 0.02, ... on."""
    thresholds_K = np.arange(1, 100) / 100
    called_KI = chances_I >= thresholds_K[:, None]
    right_K, called_K, num = (called_KI & positive_I).sum(1), called_KI.sum(1), positive_I.sum()
    recall_K = divide(right_K, np.full(len(right_K), num))
    columns = (thresholds_K, divide(right_K, called_K), recall_K, divide(2 * right_K, called_K + num))
    keys = ("threshold", "precision", "recall", "f1")
    return [dict(zip(keys, row, strict=True)) for row in np.stack(columns, axis=1).tolist()]


class WordTokenizer:
    """Words in lower case, as rouge-score splits ASCII text; elsewhere it would lose letters."""

    def tokenize(self, text: str) -> list[str]:
        """Runs of letters and digits; each letter of a script without spaces is a word."""
        return _WORD.findall(text.lower())


def is_short(reference: str) -> bool:
    """Whether an answer is so short that it is right or wrong as a whole."""
    return len(WordTokenizer().tokenize(reference)) <= SHORT_WORDS


def are_short(references: Sequence[str]) -> bool:
    """Whether most answers are."""
    return bool(references) and sum(map(is_short, references)) >= MOSTLY_SHARE * len(references)


def score_answers(answers: Sequence[str], references: Sequence[str]) -> dict[str, Interval]:
    """exact_match, rouge1, rouge2, rougeL and length_ratio; {} for no answers.

    Without rouge2 where no reference has two words, since it is 0 for any answer then. The order of the answers
    has no say.
    """
    if not answers:
        return {}
    pairs = sorted(zip(answers, references, strict=True), key=lambda pair: (pair[1], pair[0]))
    answers, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    scores = answer_scores(answers, references)
    words = WordTokenizer().tokenize
    keys = [key for key in ANSWER_SCORES if key != "rouge2" or any(len(words(text)) > 1 for text in references)]
    statistics = {key: ratio([score[key] for score in scores]) for key in keys}
    lengths_2I = [[len(words(text)) for text in texts] for texts in (answers, references)]
    statistics["length_ratio"] = ratio(*map(np.array, lengths_2I))
    return intervals(len(scores), statistics)


def answer_scores(answers: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """Each answer's own `ANSWER_SCORES`, from 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer  # now: its imports take as long as loading a model

    scorer = RougeScorer(ANSWER_SCORES[1:], tokenizer=WordTokenizer())
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        rouges = {key: rouge.fmeasure for key, rouge in scorer.score(reference, answer).items()}
        scores.append({"exact_match": float(answer.strip() == reference.strip()), **rouges})
    return scores
