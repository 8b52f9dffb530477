"""Order, passes, and the one shift."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.collate import build_batch
from tunesmith.data.prefixes import num_computed
from tunesmith.data.sampler import (
    MICRO_BATCH_COST,
    MOST_READ,
    StepSampler,
    make_micro_batches,
    make_sharing_micro_batches,
    pass_cost,
)
from tunesmith.types import Row, Source

LENGTHS = np.array([(7 * i) % 23 + 3 for i in range(64)], np.int32)


def plan(lengths=LENGTHS, *, weights=None, seed=0, rows_per_step=5, tokens_per_pass=40, layout="packed") -> StepSampler:
    return StepSampler(
        rows_I=np.arange(len(lengths)) * 2 + 1,
        weights_I=np.ones(len(lengths)) if weights is None else np.asarray(weights, float),
        lengths_I=lengths,
        rows_per_step=rows_per_step,
        tokens_per_pass=tokens_per_pass,
        layout=layout,
        seed=seed,
    )


def row(ids, trained) -> Row:
    return Row(np.array(ids, np.int32), np.array(trained, bool), Source("x.jsonl", 1))


def rows_of(steps) -> list[int]:
    return [i for step in steps for members in step for i in members]


def epochs_are_permutations(step_of, *, steps_per_epoch: int, rows: list[int]) -> None:
    for epoch in range(3):
        seen = rows_of(step_of(epoch * steps_per_epoch + k + 1) for k in range(steps_per_epoch))
        assert sorted(seen) == rows


def test_every_epoch_is_a_permutation():  # trap: R1
    p = plan()
    epochs_are_permutations(p.step, steps_per_epoch=p.steps_per_epoch, rows=[int(i) for i in p.rows_I])


def test_permutation_test_catches_a_sampler_that_skips_in_a_new_shuffle():  # trap: R1 planted
    p = plan()

    def broken(step: int):  # resumes by skipping n rows of another epoch's order
        return plan(seed=step % 2).step(step)

    with pytest.raises(AssertionError):
        epochs_are_permutations(broken, steps_per_epoch=p.steps_per_epoch, rows=[int(i) for i in p.rows_I])


def test_last_step_of_an_epoch_takes_what_is_left():  # trap: L2
    p = plan(np.full(10, 4, np.int32), rows_per_step=4)
    assert p.steps_per_epoch == 3
    assert [sum(map(len, p.step(k))) for k in (1, 2, 3)] == [4, 4, 2]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40),
    budget=st.integers(1, 100),
    layout=st.sampled_from(["packed", "padded"]),
)
def test_passes_hold_every_row_once_within_the_budget(lengths, budget, layout):
    passes = make_micro_batches(range(len(lengths)), lengths, tokens_per_pass=budget, layout=layout)
    assert sorted(i for members in passes for i in members) == list(range(len(lengths)))
    for members in passes:
        sizes = [lengths[i] for i in members]
        cost = sum(sizes) if layout == "packed" else max(sizes) * len(sizes)
        assert cost <= budget or len(members) == 1


def places(passes, lengths) -> int:
    """What padded passes compute, the passes themselves included."""
    return sum(MICRO_BATCH_COST + len(members) * max(lengths[i] for i in members) for members in passes)


def cuts(num: int):
    """Every way to cut rows that stand in a line into passes."""
    for marks in itertools.product([False, True], repeat=num - 1):
        ends = [i + 1 for i, mark in enumerate(marks) if mark] + [num]
        yield [tuple(range(a, b)) for a, b in itertools.pairwise([0, *ends])]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=9), budget=st.integers(100, 900))
def test_padded_passes_compute_the_least_of_all_ways_to_cut(lengths, budget):
    lengths = sorted(lengths, reverse=True)

    def fits(members) -> bool:
        return len(members) == 1 or len(members) * lengths[members[0]] <= budget

    least = min(places(way, lengths) for way in cuts(len(lengths)) if all(map(fits, way)))
    assert (
        places(make_micro_batches(range(len(lengths)), lengths, tokens_per_pass=budget, layout="padded"), lengths)
        == least
    )


def test_many_rows_are_packed_in_no_time():
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int).clip(2, 2048).tolist()
    begun = time.process_time()
    passes = make_micro_batches(range(20_000), lengths, tokens_per_pass=2048, layout="packed")
    assert time.process_time() - begun < 0.5  # 0.03 s; looking at every pass for every row took 1.5 s
    assert len(passes) == -(-sum(lengths) // 2048)  # no pass more than their tokens need
    begun = time.process_time()
    make_micro_batches(range(20_000), lengths, tokens_per_pass=2048, layout="padded")
    assert time.process_time() - begun < 2.0  # 0.15 s


ROWS = [row([5, 6, 7, 8], [0, 0, 1, 1]), row([9, 4, 2], [1, 1, 1])]


@pytest.mark.parametrize(
    ("layout", "predict"),
    [("packed", [1, 2, 4, 5]), ("padded", [1, 2, 4, 5])],
)
def test_position_t_predicts_token_t_plus_one_of_its_own_row(layout, predict):  # trap: T12
    batch = build_batch(ROWS, (0, 1), layout=layout, device="cpu")
    assert batch.predict_N.tolist() == predict
    assert batch.targets_N.tolist() == [7, 8, 4, 2]
    assert batch.num_targets == sum(int(r.trained[1:].sum()) for r in ROWS)


def test_positions_restart_with_every_row():  # trap: T12
    batch = build_batch(ROWS, (0, 1), layout="packed", device="cpu")
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9, 4, 2]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.mask_BT is None


def end_tokens_are_targets(targets: torch.Tensor) -> None:
    assert targets.tolist() == [4, 5, 2, 4, 2]


def test_padding_is_known_by_length_not_by_id():  # trap: T2
    rows = [row([1, 4, 5, 2], [0, 1, 1, 1]), row([1, 4, 2], [0, 1, 1])]
    batch = build_batch(rows, (0, 1), layout="padded", device="cpu")
    assert batch.mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    end_tokens_are_targets(batch.targets_N)


def test_end_token_test_catches_masking_by_id():  # trap: T2 planted
    pad = eos = 2
    labels = torch.tensor([[1, 4, 5, eos], [1, 4, eos, pad]])[:, 1:].flatten()
    with pytest.raises(AssertionError):
        end_tokens_are_targets(labels[labels != pad])


def beginnings(rng, num: int):
    """Rows of a few families and some of their own."""
    starts = [rng.integers(0, 50, size) for size in (0, 5, 40, 90)]
    rests = [rng.integers(50, 99, rng.integers(1, 30)) for _ in range(num)]
    return [np.concatenate([starts[rng.integers(4)], rest]).astype(np.int32) for rest in rests]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num=st.integers(1, 40), budget=st.integers(1, 400))
def test_sharing_micro_batches_hold_each_row_once_within_the_budget(seed, num, budget):
    rng = np.random.default_rng(seed)
    ids = beginnings(rng, num)
    passes = make_sharing_micro_batches(range(num), ids, tokens_per_pass=budget)
    assert sorted(i for members in passes for i in members) == list(range(num))
    for members in passes:
        assert num_computed([ids[i] for i in members]) <= budget or len(members) == 1
        assert sum(len(ids[i]) for i in members) <= MOST_READ * budget or len(members) == 1
    order = rng.permutation(num)
    again = make_sharing_micro_batches(order.tolist(), [ids[i] for i in order], tokens_per_pass=budget)
    assert again == passes  # a function of the rows, in whatever order they come


@pytest.mark.parametrize(
    ("lengths", "targets", "layout", "most"),
    [
        (np.random.default_rng(3).lognormal(np.log(600) - 0.245, 0.7, 16), 0.0, "padded", 3),
        (np.random.default_rng(3).lognormal(np.log(500) - 0.245, 0.7, 16), 0.3, "encoder_decoder", 3),
        (np.random.default_rng(5).integers(8, 61, 256), 0.0, "padded", 2),
    ],
)
def test_padded_passes_are_cut_by_what_one_costs_the_device(lengths, targets, layout, most):
    """On a card a pass costs as much as 4,096 tokens, since it has to start all its operations."""
    lengths = lengths.astype(int).clip(8).tolist()
    how = {"tokens_per_pass": 8192, "layout": layout}
    if targets:
        how["targets"] = [max(1, int(targets * length)) for length in lengths]
    passes = {device: make_micro_batches(range(len(lengths)), lengths, cost=pass_cost(device), **how)
              for device in ("cpu", "cuda:1")}  # fmt: skip
    assert len(passes["cuda:1"]) <= most
    assert len(passes["cpu"]) > 2 * most
    assert sorted(i for rows in passes["cuda:1"] for i in rows) == list(range(len(lengths)))
