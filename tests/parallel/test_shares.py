"""Shares of a step: every row once, balanced, the same on every rank, and copies and families kept together."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.sampler import StepSampler, copies_in
from tunesmith.parallel.shares import shares

COSTS = st.lists(st.integers(0, 4000), max_size=64)
SIZES = st.integers(1, 9)


@given(COSTS, SIZES)
def test_every_index_is_in_one_share(costs, size):
    found = shares(costs, size)
    assert len(found) == size
    assert sorted(i for share in found for i in share) == list(range(len(costs)))


@given(COSTS, SIZES)
def test_no_share_costs_more_than_the_mean_and_the_costliest(costs, size):
    loads = [sum(costs[i] for i in share) for share in shares(costs, size)]
    assert max(loads) <= sum(costs) / size + max(costs, default=0)


@given(st.lists(st.integers(1, 4000), max_size=32, unique=True), SIZES, st.randoms())
def test_what_a_rank_gets_does_not_depend_on_the_order(costs, size, random):
    other = random.sample(costs, len(costs))
    first, second = ([sorted(given[i] for i in share) for share in shares(given, size)] for given in (costs, other))
    assert first == second


@pytest.mark.parametrize(("rows", "size", "least"), [(64, 8, 0.96), (16, 2, 0.99)])
def test_balance_is_that_of_lognormal_lengths(rows, size, least):
    """docs/guide/devices.md names these: the mean of 300 steps."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(300):
        costs = np.ceil(draw.lognormal(5, 0.8, rows)).tolist()
        loads = [sum(costs[i] for i in share) for share in shares(costs, size)]
        found.append(sum(loads) / size / max(loads))
    assert np.mean(found) > least


def sampler(weights, lengths, *, size, rank=0, keys_of=None, rows_per_step=16) -> StepSampler:
    return StepSampler(
        rows_I=np.arange(len(lengths)),
        weights_I=np.array(weights, float),
        lengths_I=np.array(lengths, np.int32),
        rows_per_step=rows_per_step,
        tokens_per_pass=300,
        layout="packed",
        seed=3,
        keys_of=keys_of,
        part=(rank, size),
    )


def assert_rows_are_those_of_one_process(lengths, weights, sizes=(1, 2, 4)):  # trap: L3b
    alone = sampler(weights, lengths, size=1)
    for size in sizes:
        parts = [sampler(weights, lengths, size=size, rank=rank) for rank in range(size)]
        for step in range(1, 2 * alone.steps_per_epoch + 1):
            dealt = Counter(i for part in parts for rows in part.step(step) for i in rows)
            assert dealt == Counter(i for rows in alone.step(step) for i in rows)


@given(st.lists(st.integers(1, 400), min_size=20, max_size=60), st.sampled_from([0.5, 1.0, 2.0]))
def test_a_step_has_the_same_rows_for_any_number_of_processes(lengths, weight):
    assert_rows_are_those_of_one_process(lengths, [weight] * len(lengths))


def test_the_test_sees_an_order_that_depends_on_the_rank(monkeypatch):  # trap: L3b planted
    right = StepSampler.rows

    def buggy(self, step):
        return right(self, 1 + (step + self.part[0]) % self.steps_per_epoch)

    monkeypatch.setattr(StepSampler, "rows", buggy)
    with pytest.raises(AssertionError):
        assert_rows_are_those_of_one_process(list(range(1, 41)), [1.0] * 40)


def test_copies_of_a_row_keep_their_numbers():
    """They are numbered within a rank, and must hide other words: L15."""
    lengths, weights = [10, 20, 30, 40], [3.0, 2.0, 1.0, 2.0]
    together = sampler(weights, lengths, size=1, rows_per_step=8).step(1)
    expected = sorted(
        (i, n) for rows, ns in zip(together, copies_in(together), strict=True) for i, n in zip(rows, ns, strict=True)
    )
    found = []
    for rank in range(2):
        passes = sampler(weights, lengths, size=2, rank=rank, rows_per_step=8).step(1)
        found += [
            (i, n) for rows, ns in zip(passes, copies_in(passes), strict=True) for i, n in zip(rows, ns, strict=True)
        ]
    assert sorted(found) == expected


def test_a_family_stays_together_unless_it_is_more_than_a_fair_share():
    prefix = np.arange(100, dtype=np.int32)
    ids = [np.append(prefix, [1000 + i]).astype(np.int32) for i in range(4)]
    ids += [np.full(101, 2000 + i, np.int32) for i in range(8)]
    lengths = [101] * 12
    homes = {}
    for rank in range(4):
        for rows in sampler([1] * 12, lengths, size=4, rank=rank, keys_of=ids.__getitem__, rows_per_step=12).step(1):
            homes.update(dict.fromkeys(rows, rank))
    assert sorted(homes) == list(range(12))
    assert len({homes[i] for i in range(4)}) == 1
    large = [np.append(np.arange(10), [1000 + i, *range(90)]).astype(np.int32) for i in range(12)]
    parts = [sampler([1] * 12, lengths, size=4, rank=r, keys_of=large.__getitem__, rows_per_step=12) for r in range(4)]
    assert [sum(len(rows) for rows in part.step(1)) for part in parts] == [3, 3, 3, 3]


def test_a_rank_may_have_no_rows():
    parts = [sampler([1, 1], [5, 6], size=4, rank=rank, rows_per_step=2).step(1) for rank in range(4)]
    assert sorted(map(len, parts)) == [0, 0, 1, 1]
