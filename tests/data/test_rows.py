"""Rows are encoded once and split: every class on both sides, documents whole, replay never held out."""

from __future__ import annotations

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
from tunesmith.data.render import Renderer
from tunesmith.data.rows import Places, Rows, encode_rows, first_example
from tunesmith.data.split import held_out_mask, stratified_mask, stratified_note
from tunesmith.errors import DataError
from tunesmith.recipe.knobs import Data
from tunesmith.types import TaskName

CLASSES = ("eye", "ear", "skin")


def labelled(num: int, label: str, *, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"{label} text {i}", "label": label} for i in range(start, start + num)]


def rows_for(folder: Path, task: TaskName, *, max_tokens: int = 32, max_held: int | None = None, **knobs: Any) -> Rows:
    renderer = Renderer(
        tiny_tokenizer(), task, kind="causal", max_tokens=max_tokens, too_long="cut", control_tokens="error"
    )
    places = Places(folder / ".rows", folder / ".rows")
    return encode_rows(
        Data(**knobs),
        renderer,
        places=places,
        max_held=max_held,
        task=task,
        on_progress=lambda what, done, total: None,
    )


def places_of(rows: Rows, indices: Sequence[int], *, held: bool = False) -> list[tuple[str, int]]:
    store = rows.held_store if held else rows.store
    return [(Path(store.source(int(i)).path).name, store.source(int(i)).line) for i in indices]


# stratified


HASHED = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), min_size=1, max_size=80)


@given(rows=HASHED, share=st.floats(0, 1, exclude_max=True))
def test_every_class_gives_its_share_and_equal_rows_stay_together(rows: list[tuple[int, int]], share: float):
    hashes_I = np.array([content for content, _ in rows], np.uint64)
    classes_I = np.array([label for _, label in rows], np.int64)
    mask_I = stratified_mask(hashes_I, classes_I, share)
    for label in set(classes_I.tolist()):
        of_class = classes_I == label
        held, num = mask_I & of_class, int(of_class.sum())
        contents = set(hashes_I[of_class].tolist())
        if share == 0 or len(contents) == 1:
            assert not held.any()
            continue
        assert (of_class & ~mask_I).any()
        assert {int(h) for h in hashes_I[held]}.isdisjoint(hashes_I[of_class & ~mask_I].tolist())
        if len(contents) == num:
            assert held.sum() == min(max(1, round(share * num)), num - 1)
            assert sorted(hashes_I[of_class].tolist())[: held.sum()] == sorted(hashes_I[held].tolist())


def test_a_split_by_chance_that_misses_a_class_is_not_what_is_done():
    hashes_I = np.arange(40, dtype=np.uint64) << np.uint64(58)
    classes_I = np.array([0] * 36 + [1] * 4)
    mask_I = stratified_mask(hashes_I, classes_I, 0.1)
    assert Counter(classes_I[mask_I].tolist()) == {0: 4, 1: 1}
    assert set(classes_I[held_out_mask(hashes_I, 0.1)].tolist()) == {0}  # the other rule holds out no row of class 1


def test_classes_without_two_different_rows_are_counted():
    classes_I = np.array([0, 0, 1, 2, 2])
    mask_I = stratified_mask(np.array([1, 2, 3, 4, 4], np.uint64), classes_I, 0.5)
    assert mask_I.tolist() == [True, False, False, False, False]
    assert stratified_note(classes_I, mask_I, 0.5) == (
        "2 classes have no two different rows: they are trained and never measured"
    )
    assert stratified_note(classes_I[:2], mask_I[:2], 0.5) is None


def test_held_out_rows_of_a_classifier_are_of_every_class(tmp_path: Path):
    found = [row for label, num in zip(CLASSES, (50, 10, 2), strict=True) for row in labelled(num, label)]
    path = put(tmp_path, "rows.jsonl", json_lines(found))
    rows = rows_for(tmp_path, "classify", train=str(path), held_out=0.1)
    held = Counter(found[line - 1]["label"] for _, line in places_of(rows, rows.held_rows.tolist()))
    assert held == {"eye": 5, "ear": 1, "skin": 1}
    assert len(rows.train_rows) == 62 - 7
    assert rows.labels is not None
    assert rows.labels.names == ("ear", "eye", "skin")
    assert [choice.key for choice in rows.choices] == ["data.label_kind", "data.labels"]
    assert rows.store.row(0).labels.tolist() == [1]  # type: ignore[union-attr]


def keeps_ids_and_sides(encode: Callable[[Path, list[dict[str, Any]]], Rows], folder: Path) -> None:
    """Rows that are turned round change nothing; rows that are added move at most one other a class."""
    found = [row for label in CLASSES for row in labelled(20, label)]
    before = encode(folder, found)
    turned = encode(folder, found[::-1])
    assert before.labels is not None
    assert turned.labels is not None
    assert turned.labels.names == before.labels.names
    hashes = [sorted(rows.held_store.hashes[rows.held_rows].tolist()) for rows in (before, turned)]
    assert hashes[0] == hashes[1]
    more = encode(folder, [*found, *labelled(3, "eye", start=100)])
    again = set(more.held_store.hashes[more.held_rows].tolist())
    assert len(set(hashes[0]) - again) <= 1


def encoded(folder: Path, found: list[dict[str, Any]]) -> Rows:
    path = put(folder, "rows.jsonl", json_lines(found))
    return rows_for(folder, "classify", train=str(path), held_out=0.1)


def test_the_order_of_rows_changes_neither_ids_nor_sides(tmp_path: Path):  # trap: A12
    keeps_ids_and_sides(encoded, tmp_path)


def test_ids_by_first_appearance_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # trap: A12, planted
    monkeypatch.setattr("tunesmith.data.labels.order", lambda names: tuple(dict.fromkeys(names)))
    with pytest.raises(AssertionError):
        keeps_ids_and_sides(encoded, tmp_path)


def test_a_label_that_no_training_row_has_is_named_with_its_held_out_row(tmp_path: Path):
    train = put(tmp_path, "train.jsonl", json_lines([*labelled(3, "eye"), *labelled(3, "ear")]))
    held = put(tmp_path, "test.jsonl", json_lines([*labelled(1, "eye", start=9), *labelled(1, "eyes")]))
    with pytest.raises(DataError) as refused:
        rows_for(tmp_path, "classify", train=str(train), eval=str(held))
    (problem,) = refused.value.problems
    assert (problem.source.line, problem.code) == (2, "unknown_label")


def test_classes_that_look_alike_are_noted(tmp_path: Path):
    path = put(tmp_path, "rows.jsonl", json_lines([*labelled(3, "eye"), *labelled(3, "eye "), *labelled(3, "ear")]))
    rows = rows_for(tmp_path, "classify", train=str(path))
    assert any("'eye' and 'eye ' differ only in white space" in note for note in rows.notes)


def test_tags_are_split_by_content(tmp_path: Path):
    found = [{"tokens": ["Ann", f"sings{i}"], "tags": ["B-PER", "O"]} for i in range(40)]
    rows = rows_for(tmp_path, "tag", train=str(put(tmp_path, "rows.jsonl", json_lines(found))), held_out=0.2)
    assert rows.labels is not None
    assert (rows.labels.kind, rows.labels.names) == ("tags", ("B-PER", "O"))
    assert [choice.key for choice in rows.choices] == ["data.labels"]
    assert rows.held_rows.tolist() == sorted(
        np.flatnonzero(held_out_mask(rows.store.hashes, 0.2)).tolist(), key=lambda i: rows.store.hashes[i]
    )


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


def test_files_that_are_no_documents_are_noted_and_bad_documents_can_be_skipped(tmp_path: Path):
    folder = documents(tmp_path)
    (folder / "rows.jsonl").write_bytes(b"{}")
    (folder / "latin.txt").write_bytes("Un café.".encode("latin-1"))
    with pytest.raises(DataError, match="1 problems make rows unusable"):
        rows_for(tmp_path, "text", train=str(folder))
    rows = rows_for(tmp_path, "text", train=str(folder), bad_rows="skip")
    assert rows.skipped == 1
    assert any("left_out: 1 files are no documents" in note for note in rows.notes)
    assert any("latin.txt:1: invalid_utf8" in note for note in rows.notes)


def test_weight_of_a_folder_is_that_of_each_document(tmp_path: Path):
    rows = rows_for(tmp_path, "text", train={"path": str(documents(tmp_path)), "weight": 2})
    assert {file.weight for file in rows.data.train} == {2.0}
    assert int(rows.store.file_index.max()) == len(rows.data.train) - 1


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


def test_replay_alone_is_no_training_data(tmp_path: Path):
    train = put(tmp_path, "train.jsonl", json_lines([{"prompt": "a", "completion": ""}]))
    replay = put(tmp_path, "general.jsonl", pairs(5, "b"))
    with pytest.raises(DataError, match=r"train.jsonl: no row is left to use"):
        rows_for(tmp_path, "generate", train=str(train), replay=str(replay), bad_rows="skip")
    assert not list((tmp_path / ".rows").glob("*")) if (tmp_path / ".rows").exists() else True


def test_the_first_example_of_a_folder_is_its_first_document(tmp_path: Path):
    example = first_example(Data(train=str(documents(tmp_path))))  # type: ignore[arg-type]
    assert (example.shape, Path(example.source.path).name) == ("text", "1.txt")
