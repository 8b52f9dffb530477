"""Measures as functions of row weights, for many sets of weights at once. numpy only.

With all weights 1 each is the number that scikit-learn, scipy or seqeval computes; weights that count how often a row
was drawn give that number for the drawn rows.
"""

# I rows, R sets of weights, C classes, G groups of equal values

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tunesmith.evaluation.intervals import Statistic

Floats = NDArray[np.float64]

BINS = 10
"""Bins of equal width in which confidence is compared with accuracy."""


def ratio(numerators_I: NDArray[np.generic], denominators_I: NDArray[np.generic] | None = None) -> Statistic:
    """Sum over sum, or the mean of the rows; NaN where the denominators' sum is 0."""
    tops_I = np.asarray(numerators_I, np.float64)
    bottoms_I = np.ones(len(tops_I)) if denominators_I is None else np.asarray(denominators_I, np.float64)
    return lambda weights_RI: divided(weights_RI @ tops_I, weights_RI @ bottoms_I, otherwise=np.nan)


def precision(counts_I3: NDArray[np.generic]) -> Statistic:
    """Right ones over those found; 0 where none is found. Columns: right, found, true."""
    right_I, found_I, _ = np.asarray(counts_I3, np.float64).T
    return lambda weights_RI: divided(weights_RI @ right_I, weights_RI @ found_I)


def recall(counts_I3: NDArray[np.generic]) -> Statistic:
    """Right ones over the true ones; 0 where there are none. Columns: right, found, true."""
    right_I, _, true_I = np.asarray(counts_I3, np.float64).T
    return lambda weights_RI: divided(weights_RI @ right_I, weights_RI @ true_I)


def f1(counts_I3: NDArray[np.generic]) -> Statistic:
    """Harmonic mean of precision and recall; 0 where nothing is found and nothing true."""
    right_I, found_I, true_I = np.asarray(counts_I3, np.float64).T
    return lambda weights_RI: divided(2 * (weights_RI @ right_I), weights_RI @ (found_I + true_I))


def macro_f1(true_I: NDArray[np.int64], predicted_I: NDArray[np.int64]) -> Statistic:
    """Mean F1 of the classes that are true or predicted in some row, as scikit-learn's default with one class a row."""
    num_classes = int(max(true_I.max(), predicted_I.max())) + 1
    hits = true_I == predicted_I

    def statistic(weights_RI: Floats) -> Floats:
        right_RC = _sum_by_class(weights_RI[:, hits], true_I[hits], num_classes)
        both_RC = _sum_by_class(weights_RI, true_I, num_classes) + _sum_by_class(weights_RI, predicted_I, num_classes)
        return divided(divided(2 * right_RC, both_RC).sum(1), (both_RC > 0).sum(1))

    return statistic


def macro_f1_of_counts(right_IC: NDArray[np.generic], both_IC: NDArray[np.generic], *, absent_count: bool) -> Statistic:
    """Mean F1 of classes from what each row adds: how often it is right, and how often found plus how often true.

    A class that is neither found nor true counts 0 (`absent_count`, as scikit-learn where a row has any number of
    classes) or is left out of the mean (as where each item has one).
    """
    rights_IC, boths_IC = np.asarray(right_IC, np.float64), np.asarray(both_IC, np.float64)

    def statistic(weights_RI: Floats) -> Floats:
        both_RC = weights_RI @ boths_IC
        counted_RC = np.ones_like(both_RC) if absent_count else both_RC > 0
        return divided(divided(2 * (weights_RI @ rights_IC), both_RC).sum(1), counted_RC.sum(1))

    return statistic


def calibration_error(confidences_I: Floats, hits_I: NDArray[np.bool_]) -> Statistic:
    """Gap of mean confidence and accuracy in each bin, weighted by the bin's rows: ECE (Guo et al. 2017, §2)."""
    gaps_IB = np.zeros((len(hits_I), BINS))
    gaps_IB[np.arange(len(hits_I)), bins(confidences_I)] = confidences_I - hits_I
    return lambda weights_RI: divided(np.abs(weights_RI @ gaps_IB).sum(1), weights_RI.sum(1))


def bins(confidences_I: Floats) -> NDArray[np.int64]:
    """The bin of each confidence: 0 for up to 0.1, 1 for more and up to 0.2, ..."""
    return np.digitize(confidences_I, np.arange(1, BINS) / BINS, right=True).astype(np.int64)


def roc_auc(positive_I: NDArray[np.bool_], scores_I: Floats) -> Statistic:
    """Chance that a positive row scores above a negative one, ties half; NaN where all rows are of one class."""
    order, starts, _ = _groups(scores_I)
    positive_I = positive_I[order]

    def statistic(weights_RI: Floats) -> Floats:
        sorted_RI = weights_RI[:, order]
        positive_RG = np.add.reduceat(sorted_RI * positive_I, starts, axis=1)
        negative_RG = np.add.reduceat(sorted_RI * ~positive_I, starts, axis=1)
        above_RG = np.cumsum(negative_RG, axis=1) - negative_RG / 2
        pairs_R = positive_RG.sum(1) * negative_RG.sum(1)
        return divided((positive_RG * above_RG).sum(1), pairs_R, otherwise=np.nan)

    return statistic


def spearman(ones_I: Floats, others_I: Floats) -> Statistic:
    """Correlation of ranks, ties at their mean rank; NaN where either side is constant."""
    groups = (_groups(ones_I), _groups(others_I))

    def statistic(weights_RI: Floats) -> Floats:
        one_RI, other_RI = (_ranks(weights_RI, *sorted_) for sorted_ in groups)
        total_R1 = weights_RI.sum(1, keepdims=True)
        one_RI -= (weights_RI * one_RI).sum(1, keepdims=True) / total_R1
        other_RI -= (weights_RI * other_RI).sum(1, keepdims=True) / total_R1
        spread_R = np.sqrt((weights_RI * one_RI**2).sum(1) * (weights_RI * other_RI**2).sum(1))
        return divided((weights_RI * one_RI * other_RI).sum(1), spread_R, otherwise=np.nan)

    return statistic


def divided(tops: NDArray[np.generic], bottoms: NDArray[np.generic], *, otherwise: float = 0.0) -> Floats:
    """tops / bottoms, and `otherwise` where bottoms is 0."""
    tops, bottoms = np.asarray(tops, np.float64), np.asarray(bottoms, np.float64)
    return np.asarray(np.divide(tops, bottoms, out=np.full(tops.shape, otherwise), where=bottoms != 0))


def _sum_by_class(weights_RI: Floats, classes_I: NDArray[np.int64], num_classes: int) -> Floats:
    order, starts, _ = _groups(classes_I)
    sums_RC = np.zeros((len(weights_RI), num_classes))
    if len(order):
        sums_RC[:, classes_I[order[starts]]] = np.add.reduceat(weights_RI[:, order], starts, axis=1)
    return sums_RC


def _groups(
    values_I: NDArray[np.float64] | NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The order that sorts, where in it each group of equal values starts, and the group of each row: [I], [G], [I]."""
    order = np.argsort(values_I, kind="stable")
    new_I = np.ones(len(order), np.bool_)
    new_I[1:] = np.diff(values_I[order]) != 0
    group_I = np.empty(len(order), np.int64)
    group_I[order] = np.cumsum(new_I) - 1
    return order, np.flatnonzero(new_I), group_I


def _ranks(
    weights_RI: Floats, order: NDArray[np.int64], starts: NDArray[np.int64], group_I: NDArray[np.int64]
) -> Floats:
    """The mean rank of each row among all that were drawn: [R, I]."""
    sizes_RG = np.add.reduceat(weights_RI[:, order], starts, axis=1)
    ranks_RG = np.cumsum(sizes_RG, axis=1) - (sizes_RG - 1) / 2
    return np.asarray(ranks_RG[:, group_I])
