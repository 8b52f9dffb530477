"""Batches of every layout, labels that are not shifted, and masked tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.families import bert_like
from shape.tree import source_files
from tunesmith.data.collate import Collator, Masking, build_batch
from tunesmith.data.dataset import RowStore, build
from tunesmith.data.renderer import Renderer
from tunesmith.data.row_targets import write_targets
from tunesmith.data.sampler import copies_in
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.tasks import TASKS
from tunesmith.types import Row, Source

BERT = bert_like()


def row(ids: list[int], trained: list[int], labels: Any = None, *, second: int = 0) -> Row:
    where = np.array(trained, np.bool_)
    return Row(np.array(ids, np.int32), where, Source("x", 1), labels=labels, second=second)


# --- Labels


def classes_stand_where_they_are_learnt(batch: Any) -> None:
    assert batch.predict_N.tolist() == [0, 4, 5]
    assert batch.targets_N.tolist() == [3, 2, 1]


TAGGED = [row([5, 6, 7], [1, 0, 0], np.array([3])), row([8, 9, 4], [0, 1, 1], np.array([2, 1]))]


# trap: T12
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_labels_are_not_shifted(layout: Any) -> None:
    batch = build_batch(TAGGED, (0, 1), layout=layout, device="cpu")
    classes_stand_where_they_are_learnt(batch)
    assert batch.row_of_N.tolist() == [0, 1, 1]
    assert batch.targets_N.dtype == torch.int64


# trap: T12
def test_shifted_labels_would_be_seen() -> None:
    bare = [Row(r.ids, r.trained, r.source) for r in TAGGED]
    with pytest.raises(AssertionError):
        classes_stand_where_they_are_learnt(build_batch(bare, (0, 1), layout="padded", device="cpu"))


def test_numbers_and_many_classes_keep_their_kind() -> None:
    numbers = [row([5, 6], [1, 0], np.array([x], np.float32)) for x in (0.5, -2.0)]
    batch = build_batch(numbers, (0, 1), layout="padded", device="cpu")
    assert (batch.targets_N.tolist(), batch.targets_N.dtype) == ([0.5, -2.0], torch.float32)
    many = [row([5, 6], [1, 0], np.array([held], np.float32)) for held in ([0, 1, 1], [0, 0, 0])]
    batch = build_batch(many, (0, 1), layout="padded", device="cpu")
    assert batch.targets_N.tolist() == [[0, 1, 1], [0, 0, 0]]
    assert batch.num_targets == 2


@pytest.mark.parametrize(
    ("layout", "expected"), [("padded", [[0, 0, 1, 1], [0, 0, 0, 0]]), ("packed", [[0, 0, 1, 1, 0, 0]])]
)
def test_the_second_text_has_its_own_type_and_padding_has_none(layout: Any, expected: list[list[int]]) -> None:
    rows = [row([5, 6, 7, 8], [1, 0, 0, 0], np.array([0]), second=2), row([5, 6], [1, 0], np.array([0]))]
    assert build_batch(rows, (0, 1), layout=layout, device="cpu", has_types=True).types_BT.tolist() == expected  # type: ignore[union-attr]
    assert build_batch(rows, (0, 1), layout=layout, device="cpu").types_BT is None


# --- Masks


def masking(**options: Any) -> Masking:
    return Masking.of(BERT, **{"share": 0.15, "seed": 3, **options})


LONG = row([2, *(5 + i % 100 for i in range(20_000)), 3], [0, *[1] * 20_000, 0])


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 60), step=st.integers(0, 10), index=st.integers(0, 1000), data=st.data())
def test_exactly_as_many_tokens_are_learnt_as_are_counted(length: int, step: int, index: int, data: Any) -> None:
    num = data.draw(st.integers(1, length))
    whole = row([2, *range(10, 10 + length), 3], [0, *[1] * length, 0])
    masked = masking().apply(whole, num=num, step=step, index=index)
    assert int(masked.trained.sum()) == num
    assert not (masked.trained & ~whole.trained).any()
    assert masked.labels.tolist() == whole.ids[masked.trained].tolist()
    assert (masked.ids[~masked.trained] == whole.ids[~masked.trained]).all()


def test_four_fifths_are_hidden_a_tenth_is_another_and_a_tenth_itself() -> None:
    masked = masking().apply(LONG, num=10_000, step=1, index=0)
    shown, truth = masked.ids[masked.trained], LONG.ids[masked.trained]
    hidden, kept = (shown == BERT.mask_token_id).mean(), (shown == truth).mean()
    # 10,000 draws: four standard deviations are 0.016 and 0.012; a random token is the true one in a few hundred
    assert hidden == pytest.approx(0.8, abs=0.016)
    assert kept == pytest.approx(0.1, abs=0.014)
    others = shown[(shown != BERT.mask_token_id) & (shown != truth)]
    assert not set(others.tolist()) & set(BERT.all_special_ids)
    assert len(set(others.tolist())) > 100


def test_masks_follow_from_seed_step_and_row_alone() -> None:
    def places(**options: Any) -> list[int]:
        asked = {"seed": 3, "step": 1, "index": 0, **options}
        made = masking(seed=asked.pop("seed")).apply(LONG, num=50, **asked)
        return [*made.trained.nonzero()[0].tolist(), *made.ids[made.trained].tolist()]

    assert places() == places()
    assert len({str(places(**options)) for options in ({}, {"seed": 4}, {"step": 2}, {"index": 1})}) == 4


def store_of(path: Path, text: str, **options: Any) -> RowStore:
    path.mkdir()
    (path / "a.jsonl").write_text(text, "utf-8")
    settings = {"max_tokens": 12, "too_long": "cut", "control_tokens": "error", "kind": "encoder", **options}
    store = build(
        path,
        data=Data(),
        files=[DataFile(path=str(path / "a.jsonl"))],
        renderer=Renderer(BERT, **settings),
        on_problem=lambda problem: pytest.fail(str(problem)) if problem.severity == "error" else None,
    )
    write_targets([(store, np.arange(len(store)))], masked=0.3)
    return store


def test_making_a_collator_changes_nothing_in_its_store(tmp_path: Path) -> None:
    store = store_of(tmp_path / "rows", '{"text": "the quick brown fox jumps over"}\n', task=TASKS["text"])
    learnt, denominators = store.learnt, store.denominators
    Collator(store, layout="padded", device="cpu", masking=masking(share=0.9))
    assert store.learnt is learnt
    assert store.denominators is denominators


def test_row_stores_are_written_in_one_place() -> None:
    assert [path.name for path in source_files() if ".learn(" in path.read_text("utf-8")] == ["row_targets.py"]


def test_a_collator_masks_what_the_store_counts_for_any_grouping_of_rows(tmp_path: Path) -> None:
    text = '{"text": "the quick brown fox jumps over the lazy dog and the fox"}\n{"text": "山"}\n'
    store = store_of(tmp_path / "rows", text, task=TASKS["text"])
    made = Collator(store, layout="padded", device="cpu", masking=masking(share=0.3))
    assert store.denominators.tolist() == [max(1, round(0.3 * int(n))) for n in store.targets]
    together = made.batch(range(len(store)), step=5)
    assert together.row_of_N.bincount().tolist() == store.denominators.tolist()
    alone = [made.batch([i], step=5) for i in range(len(store))]
    assert torch.cat([batch.targets_N for batch in alone]).tolist() == together.targets_N.tolist()
    assert made.batch([0], step=6).ids_BT.tolist() != made.batch([0], step=5).ids_BT.tolist()


def held_out_masks_follow_from_what_rows_say(folder: Path) -> None:
    long, short = '{"text": "the quick brown fox jumps over the lazy dog and the fox"}\n', '{"text": "the lazy dog"}\n'
    masks = []
    for name, text in (("one", long + short), ("turned", short + long), ("more", short * 3 + long)):
        store = store_of(folder / name, text, task=TASKS["text"])
        made = Collator(store, layout="padded", device="cpu", masking=masking(share=0.3))
        rows = [i for i in range(len(store)) if store.hashes[i] == store.hashes[0 if name == "one" else -1]]
        assert len(rows) > 1
        masks.append([made.batch([i], step=0).ids_BT.tolist() for i in rows])
    assert masks[0] == masks[1] == masks[2]


def test_held_out_rows_are_masked_alike_in_every_file_and_order(tmp_path: Path) -> None:
    held_out_masks_follow_from_what_rows_say(tmp_path)


def test_masks_by_place_in_the_file_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Collator, "_content_number", lambda collator, index: index)
    with pytest.raises(AssertionError):
        held_out_masks_follow_from_what_rows_say(tmp_path)


# trap: L15
def assert_copies_teach_different_words(copies: tuple[int, ...], tmp_path: Path) -> None:
    store = store_of(tmp_path / "rows", '{"text": "the quick brown fox jumps over the lazy dog"}\n', task=TASKS["text"])
    made = Collator(store, layout="padded", device="cpu", masking=masking(share=0.3))
    together = made.batch([0, 0, 0, 0], step=5, copies=copies)
    assert len({str(line) for line in together.ids_BT.tolist()}) > 1
    alone = [made.batch([0], step=5, copies=[copy]).targets_N for copy in copies]  # whichever pass they are in
    assert torch.cat(alone).tolist() == together.targets_N.tolist()


def test_copies_of_a_row_in_one_step_have_masks_of_their_own(tmp_path: Path) -> None:
    assert copies_in([(3, 3), (5, 3), (5,)]) == [(0, 1), (0, 2), (1,)]
    assert_copies_teach_different_words((0, 1, 2, 3), tmp_path)


def test_copies_that_are_not_counted_would_be_seen(tmp_path: Path) -> None:  # trap: L15 planted
    with pytest.raises(AssertionError):
        assert_copies_teach_different_words((0, 0, 0, 0), tmp_path)
