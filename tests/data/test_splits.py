"""Rows are encoded once and split: every class on both sides, documents whole, replay never held out."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.rows_of import json_lines, put
from tiny import tiny_tokenizer
from tunesmith.data.examples import content_hash
from tunesmith.data.hold_out import measured, stratified_mask
from tunesmith.data.renderer import Renderer
from tunesmith.data.row_targets import write_targets
from tunesmith.data.splits import CacheDirs, Splits, encode_rows
from tunesmith.recipe.schema import Data
from tunesmith.tasks import TASKS
from tunesmith.types import TaskName

CLASSES = ("eye", "ear", "skin")


def labelled(num: int, label: str, *, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"{label} text {i}", "label": label} for i in range(start, start + num)]


def rows_for(
    folder: Path, task: TaskName, *, max_tokens: int = 32, max_held: int | None = None, **options: Any
) -> Splits:
    renderer = Renderer(
        tiny_tokenizer(), TASKS[task], kind="causal", max_tokens=max_tokens, too_long="cut", control_tokens="error"
    )
    places = CacheDirs(folder / ".rows", folder / ".rows")
    return encode_rows(
        Data(**options),
        renderer,
        cache_dirs=places,
        max_held=max_held,
        task=task,
        on_progress=lambda what, done, total: None,
    )


def places_of(rows: Splits, indices: Sequence[int], *, held: bool = False) -> list[tuple[str, int]]:
    store = rows.held_store if held else rows.store
    return [(Path(store.source(int(i)).path).name, store.source(int(i)).line) for i in indices]


# stratified


HASHED = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), min_size=1, max_size=80)


@given(rows=HASHED, share=st.floats(0, 1, exclude_max=True))
def test_every_class_gives_its_share_and_one_input_stays_together(rows: list[tuple[int, int]], share: float):
    inputs_I = np.array([read for read, _ in rows], np.uint64)
    classes_I = np.array([label for _, label in rows], np.int64)
    hashes_I = inputs_I * np.uint64(7) + classes_I.astype(np.uint64)
    mask_I = stratified_mask(inputs_I, hashes_I, classes_I, share)
    assert set(inputs_I[mask_I].tolist()).isdisjoint(inputs_I[~mask_I].tolist())
    first = {read: min(label for other, label in rows if other == read) for read, _ in rows}
    counted_I = np.array([first[read] for read, _ in rows])  # the class that each input counts for
    for label in set(counted_I.tolist()):
        of_class = counted_I == label
        held, num = mask_I & of_class, int(of_class.sum())
        contents = set(inputs_I[of_class].tolist())
        if share == 0 or len(contents) == 1:
            assert not held.any()
            continue
        assert held.any()
        assert (of_class & ~mask_I).any()
        if len(contents) == num:
            assert held.sum() == min(max(1, round(share * num)), num - 1)
            assert sorted(inputs_I[of_class].tolist())[: held.sum()] == sorted(inputs_I[held].tolist())


def test_held_out_rows_of_a_classifier_are_of_every_class(tmp_path: Path):
    found = [row for label, num in zip(CLASSES, (50, 10, 2), strict=True) for row in labelled(num, label)]
    path = put(tmp_path, "rows.jsonl", json_lines(found))
    rows = rows_for(tmp_path, "classify", train=str(path), held_out=0.1)
    held = Counter(found[line - 1]["label"] for _, line in places_of(rows, rows.held_rows.tolist()))
    assert held == {"eye": 5, "ear": 1, "skin": 1}
    assert len(rows.train_rows) == 62 - 7
    assert rows.labels.names == ("ear", "eye", "skin")
    assert [choice.key for choice in rows.choices] == ["data.label_kind", "data.labels"]
    write_targets(rows.sides, labels=rows.labels)
    assert rows.store.row(0).labels.tolist() == [1]  # type: ignore[union-attr]


def every_class_is_measured(rows: Splits, most: int) -> None:
    held = Counter(rows.held_store.labels.at(int(i))[0] for i in rows.held_rows)
    assert sum(held.values()) == most
    assert [held[label] for label in range(3)] == [8, 1, 1]


def imbalanced(folder: Path, max_held: int | None) -> Splits:
    found = [row for label, num in zip(CLASSES, (400, 20, 4), strict=True) for row in labelled(num, label)]
    held = [row for label, num in zip(CLASSES, (200, 10, 2), strict=True) for row in labelled(num, label, start=1000)]
    train = put(folder, "rows.jsonl", json_lines(found))
    test = put(folder, "test.jsonl", json_lines(held))
    return rows_for(folder, "classify", train=str(train), eval=str(test), max_held=max_held)


def test_few_measured_rows_are_of_every_class(tmp_path: Path):
    rows = imbalanced(tmp_path, 10)
    every_class_is_measured(rows, 10)
    note = "10 of 212 held-out rows are measured, each class its share: 202 are left out (evaluation.max_rows)"
    assert note in rows.notes
    assert rows.held_store.hashes[rows.held_rows].tolist() == sorted(rows.held_store.hashes[rows.held_rows].tolist())
    assert len(imbalanced(tmp_path, 300).held_rows) == 212


def test_the_smallest_hashes_alone_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tunesmith.data.hold_out.measured", lambda hashes, classes, most: np.argsort(hashes)[:most])
    with pytest.raises(AssertionError):
        every_class_is_measured(imbalanced(tmp_path, 10), 10)


@given(classes=st.lists(st.integers(0, 5), min_size=1, max_size=60), most=st.integers(1, 70), seed=st.integers(0, 9))
def test_measured_rows_are_a_share_of_each_class(classes: list[int], most: int, seed: int):
    hashes_I = np.random.default_rng(seed).permutation(len(classes)).astype(np.uint64)
    chosen = measured(hashes_I, np.array(classes), most)
    assert len(set(chosen.tolist())) == len(chosen) == min(most, len(classes))
    assert hashes_I[chosen].tolist() == sorted(hashes_I[chosen].tolist())
    total, held = Counter(classes), Counter(classes[i] for i in chosen.tolist())
    if most >= len(total):
        assert held.keys() == total.keys()
        for label, num in total.items():  # at most one row from the share, and what single rows of others take
            assert held[label] >= min(num, int((most - len(total)) * num / len(classes)))
    for label in held:
        of_class = sorted(int(hashes_I[i]) for i in range(len(classes)) if classes[i] == label)
        assert of_class[: held[label]] == sorted(int(hashes_I[i]) for i in chosen if classes[i] == label)


def keeps_ids_and_sides(encode: Callable[[Path, list[dict[str, Any]]], Splits], folder: Path) -> None:
    """Rows that are turned round change nothing; rows that are added move at most one other a class."""
    found = [row for label in CLASSES for row in labelled(20, label)]
    before = encode(folder, found)
    turned = encode(folder, found[::-1])
    assert turned.labels.names == before.labels.names
    hashes = [sorted(rows.held_store.hashes[rows.held_rows].tolist()) for rows in (before, turned)]
    assert hashes[0] == hashes[1]
    more = encode(folder, [*found, *labelled(3, "eye", start=100)])
    again = set(more.held_store.hashes[more.held_rows].tolist())
    assert len(set(hashes[0]) - again) <= 1


def encoded(folder: Path, found: list[dict[str, Any]]) -> Splits:
    path = put(folder, "rows.jsonl", json_lines(found))
    return rows_for(folder, "classify", train=str(path), held_out=0.1)


def test_the_order_of_rows_changes_neither_ids_nor_sides(tmp_path: Path):  # trap: A12
    keeps_ids_and_sides(encoded, tmp_path)


def test_ids_by_first_appearance_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # trap: A12, planted
    monkeypatch.setattr("tunesmith.data.labels.order", lambda names: tuple(dict.fromkeys(names)))
    with pytest.raises(AssertionError):
        keeps_ids_and_sides(encoded, tmp_path)


def test_tags_that_only_held_out_rows_have_are_named(tmp_path: Path):
    found = [{"tokens": ["Ann", f"sings{i}"], "tags": ["B-PER", "O"]} for i in range(40)]
    path = put(tmp_path, "rows.jsonl", json_lines(found))
    first = rows_for(tmp_path, "tag", train=str(path), held_out=0.2)
    rare = int(first.held_store.lines[first.held_rows[0]]) - 1
    found[rare]["tags"] = ["B-PER", "B-SONG"]  # an input keeps its side whatever its tags are
    put(tmp_path, "rows.jsonl", json_lines(found))
    rows = rows_for(tmp_path, "tag", train=str(path), held_out=0.2)
    (note,) = [note for note in rows.notes if "classes" in note]
    assert note.startswith("1 of 3 classes are in held-out rows alone, so they are measured and never learnt: 'B-SONG'")
    assert not any("classes" in note for note in first.notes)


# inputs


def no_input_is_on_both_sides(rows: Splits, records: Sequence[dict[str, Any]], field: str) -> None:
    held, trained = (
        {records[line - 1][field] if isinstance(records[line - 1][field], str) else str(records[line - 1][field])
         for _, line in places_of(rows, side.tolist())}
        for side in (rows.held_rows, rows.train_rows)
    )  # fmt: skip
    assert held
    assert held.isdisjoint(trained)


TWICE: dict[TaskName, tuple[str, list[dict[str, Any]]]] = {
    "classify": ("text", [{"text": f"text {i // 2}", "label": CLASSES[i % 2]} for i in range(80)]),
    "summarize": ("document", [{"document": f"text {i // 2}", "summary": f"short {i}"} for i in range(80)]),
    "generate": ("prompt", [{"prompt": f"text {i // 2}", "completion": f"short {i}"} for i in range(80)]),
    "tag": ("tokens", [{"tokens": ["it", f"says{i // 2}"], "tags": ["O", CLASSES[i % 2]]} for i in range(80)]),
}


@pytest.mark.parametrize("task", TWICE)
def test_an_input_with_two_answers_stands_on_one_side(task: TaskName, tmp_path: Path):
    field, records = TWICE[task]
    path = put(tmp_path, "rows.jsonl", json_lines(records))
    no_input_is_on_both_sides(rows_for(tmp_path, task, max_tokens=64, train=str(path), held_out=0.2), records, field)


def test_a_split_by_whole_rows_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tunesmith.data.encode.input_hash", content_hash)
    field, records = TWICE["tag"]
    path = put(tmp_path, "rows.jsonl", json_lines(records))
    with pytest.raises(AssertionError):
        no_input_is_on_both_sides(
            rows_for(tmp_path, "tag", max_tokens=64, train=str(path), held_out=0.2), records, field
        )


def test_held_out_files_with_trained_inputs_are_counted_beside_equal_rows(tmp_path: Path):
    train = put(tmp_path, "train.jsonl", json_lines(labelled(5, "eye") + labelled(5, "ear")))
    held = [*labelled(2, "eye"), {"text": "eye text 3", "label": "ear"}, *labelled(1, "ear", start=50)]
    rows = rows_for(tmp_path, "classify", train=str(train), eval=str(put(tmp_path, "test.jsonl", json_lines(held))))
    assert any(note.startswith("2 of 4 held-out rows are also in the training files") for note in rows.notes)
    assert any(note.startswith("1 of 4 held-out rows share an input with a trained row") for note in rows.notes)


# documents


def documents(folder: Path, num: int = 12) -> Path:
    for i in range(num):
        target = folder / "legal" / ("a" if i % 2 else "b") / f"{i}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"Document {i} says this and that. " * (1 + i))
    return folder / "legal"


def test_a_folder_is_its_documents_and_their_windows_stay_on_one_side(tmp_path: Path):
    folder = documents(tmp_path)
    rows = rows_for(tmp_path, "text", train=str(folder), held_out=0.3)
    assert [Path(file.path).relative_to(folder).as_posix() for file in rows.data.train] == sorted(
        f"{'a' if i % 2 else 'b'}/{i}.txt" for i in range(12)
    )
    assert len(rows.store) > 12
    held = {name for name, _ in places_of(rows, rows.held_rows.tolist())}
    trained = {name for name, _ in places_of(rows, rows.train_rows.tolist())}
    assert held
    assert held.isdisjoint(trained)
    assert len(held | trained) == 12
    examples = rows.sample_examples(3)
    assert len({str(example.source) for example in examples}) == len(examples) == min(3, len(held))
    assert {example.shape for example in examples} == {"text"}


# replay


def pairs(num: int, name: str) -> bytes:
    return json_lines([{"prompt": f"{name} {i}", "completion": f"{i}"} for i in range(num)])


def test_replay_rows_are_trained_and_never_held_out(tmp_path: Path):
    train = put(tmp_path, "train.jsonl", pairs(30, "a"))
    replay = put(tmp_path, "general.jsonl", pairs(30, "b"))
    rows = rows_for(tmp_path, "generate", train=str(train), replay=str(replay), held_out=0.2)
    alone = rows_for(tmp_path, "generate", train=str(train), held_out=0.2)
    assert rows.held_store.hashes[rows.held_rows].tolist() == alone.held_store.hashes[alone.held_rows].tolist()
    trained = Counter(name for name, _ in places_of(rows, rows.train_rows.tolist()))
    assert trained == {"train.jsonl": 30 - len(rows.held_rows), "general.jsonl": 30}
    assert all(rows.store.file_index[i] < len(rows.data.train) for i in rows.held_rows)


def test_replay_rows_that_are_held_out_elsewhere_are_left_out_and_counted(tmp_path: Path):
    train = put(tmp_path, "train.jsonl", pairs(30, "a"))
    replay = put(tmp_path, "general.jsonl", pairs(30, "a") + pairs(5, "b"))
    rows = rows_for(tmp_path, "generate", train=str(train), replay=str(replay), held_out=0.2)
    num = len(rows.held_rows)
    assert f"{num:,} rows of data.replay are also held out, and so not trained" in rows.notes
    assert not np.isin(rows.store.hashes[rows.train_rows], rows.store.hashes[rows.held_rows]).any()
    assert len(rows.train_rows) == 65 - 2 * num
