"""The measures of a task, each with its interval, and what the report draws: all from the outcomes of held-out rows.

Values are the ecosystem's (scikit-learn, scipy, seqeval); only their intervals are computed here. Definitions:
docs/measures.md.
"""

# I rows, C classes

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.evaluation import statistics
from tunesmith.evaluation.intervals import Estimate, Interval, intervals
from tunesmith.evaluation.outcomes import Constant, Outcomes, constant_words
from tunesmith.types import HeadName, Labels, TaskName

MOST_DOTS = 500
"""Rows in the scatter of true and predicted numbers."""


def score(
    head: HeadName,
    labels: Labels | None,
    outcomes: Outcomes,
    *,
    task: TaskName,
    constant: Constant | None = None,
    constant_from: str = "the training rows",
    hashes_I: NDArray[np.uint64] | None = None,
) -> tuple[dict[str, Interval], dict[str, Any]]:
    """Measures of at least one row by the keys of `MEASURES`, and JSON-ready details by kind of label.

    `constant` is what is answered without reading, see `constant_of`, by the labels of `constant_from`; None: no
    baseline. `hashes_I` tell the windows of one document, which are not independent: of task text, documents are
    resampled.
    """
    if task == "text" and hashes_I is not None:
        outcomes = outcomes.by_document(hashes_I)
    measures = {"loss": _quotient(outcomes.losses_I, outcomes.counts_I)}
    details: dict[str, Any] = {}
    if labels is None:
        measures |= _score_tokens(outcomes, bytes_told=task == "text" and head == "next_token")
    else:
        # Now: scikit-learn takes as long to import as a small model to load, and chats do without it.
        from tunesmith.evaluation.class_scores import score_one, score_sets
        from tunesmith.evaluation.tag_scores import score_tags

        kinds = {"one": score_one, "many": score_sets, "number": _score_numbers, "tags": score_tags}
        more, details = kinds[labels.kind](labels, outcomes, constant)
        measures |= more
        if constant is not None:
            details["constant"] = {"answer": constant_words(labels, constant), "from": constant_from}
    return intervals(len(outcomes), measures), details


def _quotient(tops_I: NDArray[np.generic], bottoms_I: NDArray[np.generic]) -> Estimate:
    statistic = statistics.ratio(tops_I, bottoms_I)
    return float(statistic(np.ones((1, len(tops_I))))[0]), statistic


def _score_tokens(outcomes: Outcomes, *, bytes_told: bool) -> dict[str, Estimate]:
    loss, losses = _quotient(outcomes.losses_I, outcomes.counts_I)
    measures = {
        "perplexity": (_exp(loss), lambda weights_RI: np.exp(np.minimum(losses(weights_RI), 700.0))),
        "token_accuracy": _quotient(outcomes.hits_I, outcomes.lengths_I),
    }
    if bytes_told and outcomes.num_bytes_I.any():
        measures["bits_per_byte"] = _quotient(outcomes.losses_I / math.log(2), outcomes.num_bytes_I)
    return measures


def _exp(loss: float) -> float:
    """exp, at most what a float holds."""
    return math.exp(min(loss, 700.0))


def _score_numbers(_: Labels, outcomes: Outcomes, mean: Constant | None) -> tuple[dict[str, Estimate], dict[str, Any]]:
    from sklearn.metrics import mean_squared_error

    true_I, predicted_I = outcomes.values_I, outcomes.logits_IC[:, 0]
    measures: dict[str, Estimate] = {
        "mse": (mean_squared_error(true_I, predicted_I), statistics.ratio((true_I - predicted_I) ** 2)),
        "spearman": (_spearman(true_I, predicted_I), statistics.spearman(true_I, predicted_I)),
    }
    if mean is not None:
        constant_I = np.full(len(true_I), float(mean))
        measures["baseline_mse"] = (
            mean_squared_error(true_I, constant_I),
            statistics.ratio((true_I - constant_I) ** 2),
        )
    shown = np.unique(np.linspace(0, len(true_I) - 1, MOST_DOTS).astype(np.int64))
    return measures, {"scatter": np.stack([true_I, predicted_I], axis=1)[shown].tolist()}


def _spearman(ones_I: NDArray[np.float64], others_I: NDArray[np.float64]) -> float:
    """scipy's; NaN, without its warning, where either side is constant."""
    if np.ptp(ones_I) == 0 or np.ptp(others_I) == 0:
        return math.nan
    from scipy.stats import spearmanr

    return float(spearmanr(ones_I, others_I).statistic)
