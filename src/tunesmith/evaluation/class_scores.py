"""Measures of classes of whole texts: one a row, or any number a row. Values are scikit-learn's."""

# I rows, C classes

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from tunesmith.evaluation import statistics
from tunesmith.evaluation.intervals import Estimate
from tunesmith.evaluation.outcomes import Constant, Outcomes, sigmoid, softmax
from tunesmith.types import Labels

Floats = NDArray[np.float64]


def score_one(
    labels: Labels, outcomes: Outcomes, majority: Constant | None
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """One class a row.

    macro-F1 is over the classes that are true or predicted in some row; one that is never predicted, or never true,
    counts 0 (scikit-learn's default, zero_division=0).
    """
    true_I, chances_IC = outcomes.true_I, softmax(outcomes.logits_IC)
    predicted_I = chances_IC.argmax(1)
    hits_I, confidences_I = true_I == predicted_I, chances_IC.max(1)
    calibration_error = statistics.calibration_error(confidences_I, hits_I)
    measures: dict[str, Estimate] = {
        "accuracy": (accuracy_score(true_I, predicted_I), statistics.ratio(hits_I)),
        "macro_f1": (
            f1_score(true_I, predicted_I, average="macro", zero_division=0),
            statistics.macro_f1(true_I, predicted_I),
        ),
        "calibration_error": (float(calibration_error(np.ones((1, len(true_I))))[0]), calibration_error),
    }
    if majority is not None:
        measures["majority"] = (float(np.mean(true_I == majority)), statistics.ratio(true_I == majority))
    ids = range(len(labels.names))
    details = {
        "labels": list(labels.names),
        "confusion": confusion_matrix(true_I, predicted_I, labels=ids).tolist(),
        "per_class": per_class(labels.names, true_I, predicted_I, labels=ids),
        "reliability": _reliability(confidences_I, hits_I),
    }
    if len(labels.names) == 2:
        measures["roc_auc"] = (_roc_auc(true_I, chances_IC[:, 1]), statistics.roc_auc(true_I == 1, chances_IC[:, 1]))
        details["threshold"] = _threshold_curve(true_I == 1, chances_IC[:, 1])
    return measures, details


def score_sets(
    labels: Labels, outcomes: Outcomes, usual_C: Constant | None
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Any number of classes a row: those whose probability is above one half."""
    true_IC, predicted_IC = outcomes.true_IC, sigmoid(outcomes.logits_IC) > 0.5
    right_IC = true_IC & predicted_IC
    counts_I3 = np.stack([right_IC.sum(1), predicted_IC.sum(1), true_IC.sum(1)], axis=1)
    true, predicted, ids = true_IC, predicted_IC, None
    if len(labels.names) == 1:  # scikit-learn takes a single column for two classes: the one of interest is True
        true, predicted, ids = true_IC[:, 0], predicted_IC[:, 0], [True]
    measures: dict[str, Estimate] = {
        "micro_f1": (
            f1_score(true, predicted, average="micro", labels=ids, zero_division=0),
            statistics.f1(counts_I3),
        ),
        "macro_f1": (
            f1_score(true, predicted, average="macro", labels=ids, zero_division=0),
            statistics.macro_f1_of_counts(right_IC, true_IC.astype(int) + predicted_IC, absent_count=True),
        ),
        "exact_rows": (
            accuracy_score(true, predicted),
            statistics.ratio((true_IC == predicted_IC).all(1)),
        ),
        "label_accuracy": _share((true_IC == predicted_IC).mean(1)),
    }
    if usual_C is not None:
        measures["majority"] = _share((true_IC == usual_C).mean(1))
    return measures, {"labels": list(labels.names), "per_class": per_class(labels.names, true, predicted, labels=ids)}


def _share(shares_I: NDArray[np.floating[Any]]) -> Estimate:
    return float(shares_I.mean()), statistics.ratio(shares_I)


def per_class(
    names: tuple[str, ...], true: NDArray[np.generic], predicted: NDArray[np.generic], **which: Any
) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each class; 0 where one is not defined."""
    columns = precision_recall_fscore_support(true, predicted, zero_division=0, **which)
    keys = ("precision", "recall", "f1", "support")
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [{"label": name, **dict(zip(keys, row, strict=True))} for name, row in zip(names, rows, strict=True)]


def _reliability(confidences_I: Floats, hits_I: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Mean confidence and accuracy in each bin; None in one without rows."""
    bins_I = statistics.bins(confidences_I)
    counts_B, sums_B, hits_B = (
        np.bincount(bins_I, weights, minlength=statistics.BINS) for weights in (None, confidences_I, hits_I)
    )
    return [
        {
            "confidence": float(total / count) if count else None,
            "accuracy": float(hits / count) if count else None,
            "count": int(count),
        }
        for count, total, hits in zip(counts_B, sums_B, hits_B, strict=True)
    ]


def _roc_auc(true_I: NDArray[np.int64], chances_I: Floats) -> float:
    """NaN where all rows are of one class: there is no pair to order."""
    return float(roc_auc_score(true_I, chances_I)) if len(np.unique(true_I)) == 2 else float("nan")


def _threshold_curve(positive_I: NDArray[np.bool_], chances_I: Floats) -> list[dict[str, float]]:
    """What calling rows positive from 0.01, 0.02, ... on would give; positive is the class of id 1."""
    thresholds_K = np.arange(1, 100) / 100
    called_KI = chances_I >= thresholds_K[:, None]
    right_K = (called_KI & positive_I).sum(1)
    precision_K = statistics.divided(right_K, called_KI.sum(1))
    recall_K = statistics.divided(right_K, np.full(len(right_K), positive_I.sum()))
    f1_K = statistics.divided(2 * right_K, called_KI.sum(1) + positive_I.sum())
    keys = ("threshold", "precision", "recall", "f1")
    columns = (thresholds_K, precision_K, recall_K, f1_K)
    return [dict(zip(keys, row, strict=True)) for row in np.stack(columns, axis=1).tolist()]
