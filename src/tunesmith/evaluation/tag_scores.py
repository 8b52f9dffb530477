"""Measures of tags of words: whole spans as seqeval counts them, or each tag by itself where tags do not mark spans."""

# I rows

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support
from sklearn.metrics import f1_score

from tunesmith.evaluation import statistics
from tunesmith.evaluation.class_scores import per_class
from tunesmith.evaluation.intervals import Estimate
from tunesmith.evaluation.outcomes import Constant, Outcomes
from tunesmith.types import Labels

PREFIXES = ("B", "I", "E", "S")


def score_tags(
    labels: Labels, outcomes: Outcomes, majority: Constant | None
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Span measures where every class is O or a tag of a span (B-PER, I-PER, ...), else macro-F1 of the tags."""
    hits_I, lengths_I = outcomes.hits_I, outcomes.lengths_I
    right = statistics.ratio(hits_I, lengths_I)
    measures: dict[str, Estimate] = {"tag_accuracy": (float(hits_I.sum() / lengths_I.sum()), right)}
    if majority is not None:
        usual_I = np.array([np.sum(target == majority) for target in outcomes.targets])
        measures["majority"] = (float(usual_I.sum() / lengths_I.sum()), statistics.ratio(usual_I, lengths_I))
    more, per_type = (_score_spans if mark_spans(labels.names) else _score_each_tag)(labels, outcomes)
    return measures | more, {"labels": list(labels.names), "per_type": per_type}


def mark_spans(names: Sequence[str]) -> bool:
    """Whether these tags say where spans begin and go on; parts of speech, for one, do not."""
    marks = [name for name in names if name != "O"]
    return bool(marks) and all(name in PREFIXES or (name[:1] in PREFIXES and name[1:2] == "-") for name in marks)


def count_spans(
    true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> tuple[NDArray[np.int64], list[str]]:
    """Spans of each row that are right, found and true, int64 [I, 3], and the sorted types of all of them."""
    true_spans, found_spans = ([set(get_entities(list(tags))) for tags in rows] for rows in (true, predicted))
    counts_I3 = np.array([[len(t & f), len(f), len(t)] for t, f in zip(true_spans, found_spans, strict=True)])
    return counts_I3, sorted({kind for row in (*true_spans, *found_spans) for kind, _, _ in row})


def _score_spans(labels: Labels, outcomes: Outcomes) -> tuple[dict[str, Estimate], list[dict[str, Any]]]:
    """seqeval's default mode, which reads IOB1 and IOB2 as conlleval does; 0 where nothing is found."""
    true, predicted = (
        [[labels.names[i] for i in row.tolist()] for row in rows] for rows in (outcomes.targets, outcomes.outputs)
    )
    counts_I3, types = count_spans(true, predicted)
    precision, recall, f1, _ = precision_recall_fscore_support(true, predicted, average="micro", zero_division=0)
    measures: dict[str, Estimate] = {
        "span_f1": (float(f1), statistics.f1(counts_I3)),
        "span_precision": (float(precision), statistics.precision(counts_I3)),
        "span_recall": (float(recall), statistics.recall(counts_I3)),
    }
    columns = precision_recall_fscore_support(true, predicted, average=None, zero_division=0)
    rows = zip(types, *(column.tolist() for column in columns), strict=True)
    return measures, [dict(zip(("type", "precision", "recall", "f1", "support"), row, strict=True)) for row in rows]


def _score_each_tag(labels: Labels, outcomes: Outcomes) -> tuple[dict[str, Estimate], list[dict[str, Any]]]:
    true, predicted = np.concatenate(outcomes.targets), np.concatenate(outcomes.outputs)
    shape = (len(outcomes), len(labels.names))
    first = np.repeat(np.arange(len(outcomes)), outcomes.lengths_I) * shape[1]
    right, found, wanted = (
        np.bincount((first + classes)[kept], minlength=shape[0] * shape[1]).reshape(shape)
        for classes, kept in ((true, true == predicted), (predicted, slice(None)), (true, slice(None)))
    )
    statistic = statistics.macro_f1_of_counts(right, found + wanted, absent_count=False)
    measures: dict[str, Estimate] = {
        "macro_f1": (f1_score(true, predicted, average="macro", zero_division=0), statistic)
    }
    table = per_class(labels.names, true, predicted, labels=range(len(labels.names)))
    return measures, [{"type": row.pop("label"), **row} for row in table]
