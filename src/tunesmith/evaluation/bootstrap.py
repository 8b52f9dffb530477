"""Percentile intervals of the bootstrap, and the metrics as functions of row weights that it needs.

Efron & Tibshirani 1993, §13.3. Rows are drawn with replacement, always the same ones for the same number of
rows, so that a report repeats. A resample is a vector of weights: how often each row was drawn. A metric takes
all resamples at once. With all weights 1 it is the number that scikit-learn, scipy or seqeval computes; with
the weights of a resample it is that number for the rows drawn.
"""

# I rows, P predictions, R resamples, C classes, G groups of equal values

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
COVERED = 0.95
"""Share of the resamples' values that lie between `low` and `high`."""
BINS = 10
"""Bins of equal width in which confidence is compared with accuracy."""
_CELLS = 1 << 22  # weights held at once: 32 MiB

Floats = NDArray[np.float64]
Counts = NDArray[np.generic]
Statistic = Callable[[Floats], Floats]
"""Weights [R, I] to the metric's value in each resample [R]; NaN where it is not defined there."""


class Interval(TypedDict):
    """A value and its 95 % interval; NaN where it is not defined, its ends also where it is infinite."""

    value: float
    low: float
    high: float


def intervals(num_rows: int, statistics: Mapping[str, Statistic]) -> dict[str, Interval]:
    """Each statistic's value on all rows with its interval over resamples of these (at least one) rows."""
    values = {key: value_of(statistic, num_rows) for key, statistic in statistics.items()}
    return _spread(num_rows, values, statistics)


def paired_intervals(
    num_rows: int, of_a: Mapping[str, Statistic], of_b: Mapping[str, Statistic], differences: Mapping[str, float]
) -> dict[str, Interval]:
    """Intervals of B minus A where both sides are drawn together; `differences` are the values on all rows."""

    def difference(key: str) -> Statistic:
        a, b = of_a[key], of_b[key]
        behind = min(rows_behind(side, num_rows) for side in (a, b))
        return OfRows(lambda weights_RI: b(weights_RI) - a(weights_RI), behind)

    return _spread(num_rows, differences, {key: difference(key) for key in of_a}, paired_interval)


@dataclass(frozen=True, slots=True)
class OfRows:
    """A statistic that rests on fewer rows than are drawn: on some of them, or on rows that weigh unlike."""

    statistic: Statistic
    num_rows: float

    def __call__(self, weights_RI: Floats) -> Floats:
        return self.statistic(weights_RI)


def rows_behind(statistic: Statistic, num_rows: int) -> float:
    """The number of rows of equal weight that a statistic of `num_rows` rows is as good as."""
    return statistic.num_rows if isinstance(statistic, OfRows) else num_rows


def value_of(statistic: Statistic, num_rows: int) -> float:
    """The statistic of all rows, each counted once."""
    return float(statistic(np.ones((1, num_rows)))[0])


def interval(value: float, values_R: Floats, num_rows: float) -> Interval:
    """The value between percentiles of the resamples in which it is defined, further out the fewer the rows.

    Percentiles are the expanded ones of Hesterberg 2015, "What Teachers Should Know About the Bootstrap": of a
    mean the interval is as wide as Student's t, which percentiles alone miss by 23 % at 6 rows.
    """
    defined = values_R[~np.isnan(values_R)]
    if not np.isfinite(value) or not len(defined):
        return Interval(value=float(value), low=float("nan"), high=float("nan"))
    outside = expanded(num_rows)
    low, high = np.quantile(defined, [outside, 1 - outside])
    return Interval(value=float(value), low=float(low), high=float(high))


def paired_interval(difference: float, differences_R: Floats, num_rows: float) -> Interval:
    """`interval` of a difference, at least as wide as Student's t around it with the spread of the resamples.

    Where both sides are as good, differences lie as often above 0 as below and t is seldom wrong, also where a
    few rows differ by far more than others, which the percentiles of few rows do not show.
    """
    spread = interval(difference, differences_R, num_rows)
    if math.isnan(spread["low"]):
        return spread
    free = max(num_rows - 1, 1.0)
    far = student_t(free) * math.sqrt((free + 1) / free) * float(np.nanstd(differences_R))
    low, high = min(spread["low"], difference - far), max(spread["high"], difference + far)
    return Interval(value=difference, low=low, high=high)


def expanded(num_rows: float) -> float:
    """Share of resamples on each side of an interval: Φ(−√(n / (n − 1)) t), t of n − 1 degrees of freedom."""
    free = max(num_rows - 1, 1.0)
    return NormalDist().cdf(-math.sqrt((free + 1) / free) * student_t(free))


def student_t(free: float) -> float:
    """The quantile of Student's t that leaves half of `COVERED` above 0: Abramowitz and Stegun 1964, 26.7.5,
    which is right to 0.003 from 4 degrees of freedom on, and too small, so that it is never too wide, below."""
    z = NormalDist().inv_cdf((1 + COVERED) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / free**power for power, term in enumerate(terms, 1))


def _spread(
    num_rows: int,
    values: Mapping[str, float],
    statistics: Mapping[str, Statistic],
    bounds: Callable[[float, Floats, float], Interval] = interval,
) -> dict[str, Interval]:
    drawn = [{key: statistic(weights) for key, statistic in statistics.items()} for weights in resamples(num_rows)]
    spreads = {}
    for key, statistic in statistics.items():
        values_S = np.concatenate([batch[key] for batch in drawn])
        spreads[key] = bounds(values[key], values_S, rows_behind(statistic, num_rows))
    return spreads


def resamples(num_rows: int) -> Iterator[Floats]:
    """`RESAMPLES` times the weights of `num_rows` rows drawn with replacement, some at a time: [R, I]."""
    draw = np.random.default_rng(0)
    at_once = max(1, _CELLS // num_rows)
    for start in range(0, RESAMPLES, at_once):
        num = min(at_once, RESAMPLES - start)
        cells = draw.integers(0, num_rows, (num, num_rows)) + np.arange(num)[:, None] * num_rows
        counts = np.bincount(cells.ravel(), minlength=num * num_rows)
        yield counts.reshape(num, num_rows).astype(np.float64)


def ratio(numerators_I: ArrayLike, denominators_I: ArrayLike | None = None) -> Statistic:
    """Sum over sum, or the mean of the rows; NaN where the denominators' sum is 0.

    Of rows with denominators w it is as good as of (Σ w)² / Σ w² equal ones: Kish 1965, "Survey Sampling".
    """
    tops_I = np.asarray(numerators_I, np.float64)
    bottoms_I = np.ones(len(tops_I)) if denominators_I is None else np.asarray(denominators_I, np.float64)
    behind = float(divide(bottoms_I.sum() ** 2, np.square(bottoms_I).sum()))
    return OfRows(lambda weights_RI: divide(weights_RI @ tops_I, weights_RI @ bottoms_I, otherwise=np.nan), behind)


def precision_recall_f1(counts_I3: Counts) -> tuple[Statistic, Statistic, Statistic]:
    """Precision, recall and F1 by each row's counts of right, found and true; 0 for a denominator of 0."""
    right_I, found_I, true_I = np.asarray(counts_I3, np.float64).T
    return (
        lambda weights_RI: divide(weights_RI @ right_I, weights_RI @ found_I),
        lambda weights_RI: divide(weights_RI @ right_I, weights_RI @ true_I),
        lambda weights_RI: divide(2 * (weights_RI @ right_I), weights_RI @ (found_I + true_I)),
    )


def macro_f1(right_IC: Counts, both_IC: Counts, *, absent_count: bool) -> Statistic:
    """Mean F1 of classes from what each row adds: how often a class is right and how often found or true.

    A class that is neither found nor true counts 0 (`absent_count`, as scikit-learn where a row has any number
    of classes) or is left out of the mean (as where each item has one).
    """
    rights_IC, boths_IC = np.asarray(right_IC, np.float64), np.asarray(both_IC, np.float64)

    def statistic(weights_RI: Floats) -> Floats:
        both_RC = weights_RI @ boths_IC
        counted_RC = np.ones_like(both_RC) if absent_count else both_RC > 0
        return divide(divide(2 * (weights_RI @ rights_IC), both_RC).sum(1), counted_RC.sum(1))

    return statistic


def calibration_error(confidences_P: Floats, hits_P: Floats, rows_P: NDArray[np.int64] | None = None) -> Statistic:
    """Gap of mean confidence and accuracy in each bin, weighted by the bin's rows: ECE (Guo et al. 2017, §2).

    `rows_P`: the row of each prediction, of which a row may have several that share its weight; None: one each.
    """
    of_P = np.arange(len(hits_P)) if rows_P is None else rows_P
    # 0: up to 0.1, 1: up to 0.2, ...
    bins_P = np.digitize(confidences_P, np.arange(1, BINS) / BINS, right=True)
    counts_I = np.bincount(of_P)
    gaps_IB = np.zeros((len(counts_I), BINS))
    np.add.at(gaps_IB, (of_P, bins_P), (confidences_P - hits_P) / counts_I[of_P])
    return lambda weights_RI: divide(np.abs(weights_RI @ gaps_IB).sum(1), weights_RI.sum(1))


def roc_auc(positive_I: NDArray[np.bool_], scores_I: Floats) -> Statistic:
    """Chance that a positive row scores above a negative one, ties half; NaN if all rows are of one class."""
    order, starts, _ = _groups(scores_I)
    rarer = min(int(positive_I.sum()), int((~positive_I).sum()))
    positive_I = positive_I[order]

    def statistic(weights_RI: Floats) -> Floats:
        sorted_RI = weights_RI[:, order]
        positive_RG = np.add.reduceat(sorted_RI * positive_I, starts, axis=1)
        negative_RG = np.add.reduceat(sorted_RI * ~positive_I, starts, axis=1)
        above_RG = np.cumsum(negative_RG, axis=1) - negative_RG / 2
        pairs_R = positive_RG.sum(1) * negative_RG.sum(1)
        return divide((positive_RG * above_RG).sum(1), pairs_R, otherwise=np.nan)

    return OfRows(statistic, rarer)


def spearman(ones_I: Floats, others_I: Floats) -> Statistic:
    """Correlation of ranks, ties at their mean rank; NaN where either side is constant."""
    groups = (_groups(ones_I), _groups(others_I))

    def statistic(weights_RI: Floats) -> Floats:
        one_RI, other_RI = (_ranks(weights_RI, *sorted_) for sorted_ in groups)
        total_R1 = weights_RI.sum(1, keepdims=True)
        one_RI -= (weights_RI * one_RI).sum(1, keepdims=True) / total_R1
        other_RI -= (weights_RI * other_RI).sum(1, keepdims=True) / total_R1
        spread_R = np.sqrt((weights_RI * one_RI**2).sum(1) * (weights_RI * other_RI**2).sum(1))
        return divide((weights_RI * one_RI * other_RI).sum(1), spread_R, otherwise=np.nan)

    return statistic


def divide(tops: ArrayLike, bottoms: ArrayLike, *, otherwise: float = 0.0) -> Floats:
    """tops / bottoms, and `otherwise` where bottoms is 0."""
    above, below = np.asarray(tops, np.float64), np.asarray(bottoms, np.float64)
    return np.asarray(np.divide(above, below, out=np.full(above.shape, otherwise), where=below != 0))


def _groups(values_I: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The order that sorts, the start of each group of equal values in it, each row's group: [I], [G], [I]."""
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
