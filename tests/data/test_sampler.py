"""Steps are permutations of an epoch's rows and a pure function of seed and step."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.sampler import StepSampler, sort_keys

PAIRS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=90)


def plan(sides, *, weights=None, rows_per_step=4, seed=0) -> StepSampler:
    """Rows of one side, or of (source, target)."""
    sides = np.array(sides, np.int32)
    is_pair = sides.ndim == 2
    return StepSampler(
        rows_I=np.arange(len(sides)) * 2 + 1,
        weights_I=np.ones(len(sides)) if weights is None else np.asarray(weights, float),
        lengths_I=sides.sum(1) if is_pair else sides,
        targets_I=sides[:, 1] if is_pair else None,
        rows_per_step=rows_per_step,
        tokens_per_pass=200,
        layout="encoder_decoder" if is_pair else "padded",
        seed=seed,
    )


def rows_of(given: StepSampler, step: int) -> list[int]:
    return [row for rows in given.step(step) for row in rows]


def epoch_of(given: StepSampler, epoch: int = 0) -> list[list[int]]:
    num = given.steps_per_epoch
    return [rows_of(given, epoch * num + step + 1) for step in range(num)]


@settings(max_examples=100, deadline=None)
@given(sides=PAIRS, as_pairs=st.booleans(), rows_per_step=st.integers(1, 9), seed=st.integers(0, 2**63 - 1))
def test_every_epoch_has_each_row_as_often_as_its_weight_says(sides, as_pairs, rows_per_step, seed):  # trap: R1, L2
    sides = sides if as_pairs else [source for source, _ in sides]
    weights = [(1.0, 2.0, 0.5)[i % 3] for i in range(len(sides))]
    given = plan(sides, weights=weights, rows_per_step=rows_per_step, seed=seed)
    for epoch in range(3):
        steps = epoch_of(given, epoch)
        times = Counter(row for rows in steps for row in rows)
        assert {len(rows) for rows in steps[:-1]} <= {rows_per_step}
        assert all(times[2 * i + 1] == weight for i, weight in enumerate(weights) if weight >= 1)
        halves = sum(times[2 * i + 1] for i, weight in enumerate(weights) if weight == 0.5)
        assert halves == (max(1, round(0.5 * weights.count(0.5))) if 0.5 in weights else 0)


@settings(max_examples=50, deadline=None)
@given(sides=PAIRS, seed=st.integers(0, 2**63 - 1), steps=st.lists(st.integers(1, 200), min_size=1, max_size=5))
def test_any_step_can_be_asked_for_first(sides, seed, steps):  # trap: R1
    walked = plan(sides, seed=seed)
    expected = [walked.step(step) for step in range(1, 201)]
    assert [plan(sides, seed=seed).step(step) for step in steps] == [expected[step - 1] for step in steps]


# trap: L14
def assert_neighbours_are_unrelated(keys_of) -> None:
    """Of the orders of two seeds, epochs or salts that differ by one, neither is the other shifted."""
    rows = np.arange(2000)
    first = np.argsort(keys_of(rows, 7, 3, salt=1))
    for seed, epoch, salt in ((8, 3, 1), (6, 3, 1), (7, 4, 1), (7, 3, 2), (8, 2, 1)):
        other = np.argsort(keys_of(rows, seed, epoch, salt=salt))
        steps, counts = np.unique(other - first, return_counts=True)
        assert counts.max() < 20, f"{counts.max()} of 2000 rows moved by {steps[counts.argmax()]}"  # by chance 1 or 2


def test_neighbouring_seeds_give_unrelated_orders():
    assert_neighbours_are_unrelated(sort_keys)


def test_seeds_that_are_added_to_rows_before_they_are_mixed_would_be_seen():  # trap: L14 planted
    def one_stream(items, seed, epoch, *, salt):
        return sort_keys(items + seed, 0, epoch, salt=salt)

    with pytest.raises(AssertionError, match="rows moved by -1"):
        assert_neighbours_are_unrelated(one_stream)


def test_a_million_rows_are_planned_and_gone_on_with_at_once():
    rng = np.random.default_rng(0)
    million = plan(np.stack([rng.integers(9, 500, 1_000_000), rng.integers(2, 60, 1_000_000)], 1), rows_per_step=16)
    begun = time.process_time()
    for step in range(1, million.steps_per_epoch + 1, 256):
        million.step(step)
    assert time.process_time() - begun < 2.0
    begun = time.process_time()
    million.step(150_000)
    assert time.process_time() - begun < 1.0  # 0.15 s: a step of another
