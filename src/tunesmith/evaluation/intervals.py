"""How far a measure would move on other rows of the same kind: percentile intervals of the bootstrap.

Efron & Tibshirani 1993, §13.3. Rows are drawn with replacement, always the same ones for the same number of rows, so
that a report repeats. A resample is its weights: how often it drew each row. Measures are computed for all resamples at
once, which needs them written as functions of weights: statistics.py.
"""

# I rows, R resamples

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
COVERED = 0.95
"""Share of the resamples' values that lie between `low` and `high`."""

_CELLS = 1 << 22  # weights held at once: 32 MiB

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Weights [R, I] to the measure's value in each resample [R]; NaN where it is not defined there."""
Estimate = tuple[float, Statistic]
"""A measure's value, and the same as a function of row weights."""


class Interval(TypedDict):
    """A measure and its 95 % interval; NaN where it is not defined, its ends also where it is infinite."""

    value: float
    low: float
    high: float


def intervals(num_rows: int, measures: Mapping[str, Estimate]) -> dict[str, Interval]:
    """Each measure's value with the interval of its statistic over resamples of at least one row."""
    values: dict[str, list[NDArray[np.float64]]] = {key: [] for key in measures}
    for weights_RI in resamples(num_rows):
        for key, (_, statistic) in measures.items():
            values[key].append(statistic(weights_RI))
    return {key: interval(value, np.concatenate(values[key])) for key, (value, _) in measures.items()}


def interval(value: float, values_R: NDArray[np.float64]) -> Interval:
    """The value between the percentiles of the resamples in which it is defined."""
    defined = values_R[~np.isnan(values_R)]
    if not np.isfinite(value) or not len(defined):
        return Interval(value=float(value), low=float("nan"), high=float("nan"))
    low, high = np.quantile(defined, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return Interval(value=float(value), low=float(low), high=float(high))


def resamples(num_rows: int) -> Iterator[NDArray[np.float64]]:
    """`RESAMPLES` times the weights of `num_rows` rows drawn with replacement, some resamples at a time: [R, I]."""
    draw = np.random.default_rng(0)
    together = max(1, _CELLS // num_rows)
    for start in range(0, RESAMPLES, together):
        num = min(together, RESAMPLES - start)
        cells = draw.integers(0, num_rows, (num, num_rows)) + np.arange(num)[:, None] * num_rows
        counts = np.bincount(cells.ravel(), minlength=num * num_rows)
        yield counts.reshape(num, num_rows).astype(np.float64)
