"""Intervals of the bootstrap: as wide as theory says, the same every time, and undefined where nothing is."""

import math

import numpy as np
import pytest

from tunesmith.evaluation import bootstrap as module
from tunesmith.evaluation.bootstrap import calibration_error, interval, intervals, ratio, resamples


def shares(num: int):
    return ratio(np.arange(num) % 2)


def test_interval_of_a_share_is_as_wide_as_the_normal_approximation():
    """Half of 400 rows: 0.5 ± 1.96 · √(0.25 / 400) = ± 0.049. 0.006: the spread of percentiles of 1000 resamples."""
    found = intervals(400, {"share": shares(400)})["share"]
    assert found["low"] == pytest.approx(0.451, abs=0.006)
    assert found["high"] == pytest.approx(0.549, abs=0.006)


def test_every_resample_draws_as_many_rows_as_there_are():
    weights_RI = np.concatenate(list(resamples(7)))
    assert weights_RI.shape == (1000, 7)
    assert set(weights_RI.sum(1)) == {7.0}


def test_resamples_repeat_and_do_not_depend_on_how_many_are_held_at_once(monkeypatch):
    whole = np.concatenate(list(resamples(50)))
    monkeypatch.setattr(module, "_CELLS", 50 * 7)
    assert np.array_equal(np.concatenate(list(resamples(50))), whole)


def test_resamples_where_a_measure_is_not_defined_are_left_out():
    found = interval(2.0, np.array([math.nan, 1.0, 3.0]), 1e9)
    assert (found["low"], found["high"]) == pytest.approx((1.05, 2.95))
    assert all(math.isnan(end) for end in interval(2.0, np.array([math.nan]), 2).values() if end != 2.0)


def test_bins_hold_their_upper_edge():
    """0.05 and 0.1 are in one bin, whose gap is of the sum: 1 right, 0.15 expected."""
    found = calibration_error(np.array([0.05, 0.1]), np.array([False, True]))
    assert found(np.ones((1, 2)))[0] == pytest.approx(0.85 / 2)
