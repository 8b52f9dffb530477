"""Weights of data files: times per epoch, and shares that hold over a run."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from tunesmith.data.sampler import StepSampler, copies
from tunesmith.data.splits import mix, source_ids, times_per_epoch
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.summaries.words import mix_text


def data(**files: Any) -> Data:
    return validate({"data": files}).data


TWO = [{"path": "a.jsonl", "weight": 0.7}, {"path": "b.jsonl", "weight": 0.3}]


def test_weights_are_times_per_epoch_unless_they_are_shares() -> None:
    assert times_per_epoch(data(train=TWO), [10, 90]).tolist() == [0.7, 0.3]


def test_shares_let_the_first_source_that_is_used_up_end_the_epoch() -> None:
    times = times_per_epoch(data(train=TWO, mix="shares"), [70, 300])
    assert times.tolist() == pytest.approx([1.0, 0.1])
    assert times_per_epoch(data(train=TWO, mix="shares"), [700, 30]).tolist() == pytest.approx([0.1, 1.0])


def test_files_of_one_folder_share_its_weight() -> None:
    folder, file = DataFile(path="docs", weight=0.5), DataFile(path="b.jsonl", weight=0.5)
    members = [folder.at_place(f"docs/{name}.txt", path=f"docs/{name}.txt") for name in "xy"]
    mixed = data(train=TWO, mix="shares").model_copy(update={"train": (*members, file)})
    assert times_per_epoch(mixed, [10, 30, 80]).tolist() == [1.0, 1.0, 0.5]
    assert source_ids(mixed).tolist() in ([0, 0, 1], [1, 1, 0])
    assert [one["path"] for one in mix(mixed, [10, 30, 80])] == ["docs", "b.jsonl"]


def test_replayed_files_keep_their_own_weight() -> None:
    mixed = data(train=TWO, replay=[{"path": "general.jsonl", "weight": 2}], mix="shares")
    assert times_per_epoch(mixed, [70, 30, 5]).tolist() == pytest.approx([1, 1, 2])


def test_the_mix_says_how_often_each_row_is_seen() -> None:
    found = mix(data(train=TWO, mix="shares"), [70, 300])
    assert [round(one["share"], 6) for one in found] == [0.7, 0.3]
    text = mix_text(found)
    assert text == "a.jsonl 70 % (each row 1 × an epoch), b.jsonl 30 % (each row 0.1 × an epoch)"
    assert mix(data(train=["a.jsonl"]), [5]) == []


def sampler(mode: str, rows_F: list[int], train: list[dict[str, Any]] = TWO) -> tuple[StepSampler, Any]:
    mixed = data(train=train, mix=mode)
    file_I = np.repeat(np.arange(len(rows_F)), rows_F)
    found = StepSampler(
        rows_I=np.arange(sum(rows_F)),
        weights_I=times_per_epoch(mixed, rows_F)[file_I],
        sources_I=source_ids(mixed)[file_I],
        lengths_I=np.full(sum(rows_F), 10, np.int32),
        rows_per_step=10,
        tokens_per_pass=1000,
        layout="packed",
        seed=3,
    )
    return found, file_I


def test_shares_hold_in_every_epoch_exactly_and_over_a_run_without_drift() -> None:
    plan, file_I = sampler("shares", [700, 900])
    assert plan.rows_per_epoch == 1000
    for epoch in range(4):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = [Counter(int(file_I[row]) for rows in plan.step(step + 1) for row in rows) for step in steps]
        assert sum(seen, Counter()) == {0: 700, 1: 300}
        quarters = [sum(seen[at : at + 25], Counter())[0] / 250 for at in range(0, 100, 25)]
        assert all(abs(share - 0.7) < 0.09 for share in quarters)  # three standard errors of 250 rows


def test_no_row_is_seen_twice_in_an_epoch_and_others_come_in_the_next() -> None:
    plan, file_I = sampler("shares", [700, 900])
    epochs = []
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        rows = [row for step in steps for batch in plan.step(step + 1) for row in batch]
        assert len(rows) == len(set(rows)) == 1000
        epochs.append({row for row in rows if file_I[row] == 1})
    assert len(epochs[0] & epochs[1]) < 150  # a third of a third of 900 is 100


def test_sources_of_equal_times_have_their_own_share_each() -> None:
    three = [{"path": name, "weight": weight} for name, weight in (("a", 0.5), ("b", 0.25), ("c", 0.25))]
    plan, file_I = sampler("shares", [100, 100, 100], three)
    seen = Counter(int(file_I[row]) for step in range(plan.steps_per_epoch) for b in plan.step(step + 1) for row in b)
    assert seen == {0: 100, 1: 50, 2: 50}


def test_a_planted_draw_over_all_sources_misses_the_shares() -> None:
    weights_I = np.full(200, 0.5)
    sources_I = np.repeat([0, 1], 100)
    pooled = [copies(weights_I, seed=seed, epoch=0)[:100].sum() for seed in range(5)]
    assert any(num != 50 for num in pooled)
    assert all(copies(weights_I, sources_I, seed=seed, epoch=0)[:100].sum() == 50 for seed in range(5))


def test_a_source_without_a_row_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train: b\.jsonl: no row of it is trained"):
        times_per_epoch(data(train=TWO, mix="shares"), [70, 0])


@pytest.mark.parametrize("weight", [0, -1, 101])
def test_a_weight_out_of_range_is_refused_with_its_place(weight: float) -> None:
    with pytest.raises(RecipeError, match=r"data\.train\[1\]\.weight: .* is not a number above 0"):
        data(train=["a.jsonl", {"path": "b.jsonl", "weight": weight}])
