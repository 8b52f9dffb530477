"""Classes keep their ids whatever the order of rows, and labels that cannot be learnt are named with their place."""

import itertools
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from tunesmith.data.dataset import LabelColumn, RowStore
from tunesmith.data.labels import order, resolve_labels, similar_names_notes, targets
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data
from tunesmith.types import Choice, Labels, Source, TaskName


class FakeStore:
    """What `labels` asks of a row store: words by first appearance, and each row's as indices."""

    def __init__(self, rows: Sequence[str | Sequence[str]], path: str = "train.csv") -> None:
        lists = [[row] if isinstance(row, str) else list(row) for row in rows]
        vocabulary = tuple(dict.fromkeys(itertools.chain(*lists)))
        ids = [[vocabulary.index(name) for name in row] for row in lists]
        self.labels = LabelColumn(pa.table({"labels": pa.array(ids, pa.list_(pa.int64()))}), vocabulary)
        self._num = len(lists)
        self.summary = SimpleNamespace(many=any(not isinstance(row, str) for row in rows))
        self._path = path

    def __len__(self) -> int:
        return self._num

    def source(self, index: int) -> Source:
        return Source(self._path, index + 2)

    count_labels = RowStore.count_labels


def decided(
    rows: Sequence[Any],
    held: Sequence[Any] | None = None,
    *,
    task: TaskName = "classify",
    class_weights: Any = "equal",
    train_rows: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Labels, list[Choice]]:
    store: Any = FakeStore(rows)
    held_store: Any = store if held is None else FakeStore(held, "test.csv")
    chosen = np.array(range(len(rows)) if train_rows is None else train_rows)
    sides = [store.count_labels()] if held is None else [store.count_labels(), held_store.count_labels()]
    return resolve_labels(
        task=task,
        data=Data(**options),
        class_weights=class_weights,
        trained=store.count_labels(chosen),
        sides=sides,
    )


def refused(*args: Any, **options: Any) -> list[str]:
    with pytest.raises(DataError) as error:
        decided(*args, **options)
    return [str(problem) for problem in error.value.problems] or [str(error.value)]


# order

NAMES = ["2", "10", "b", "a"]
ORDERED = ("2", "10", "a", "b")


def keeps_ids(ordered: Callable[[Sequence[str]], Sequence[str]]) -> None:
    rows = NAMES * 5
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert tuple(ordered(rows)) == ORDERED


def test_ids_do_not_follow_the_order_of_rows():  # trap: A12
    keeps_ids(lambda rows: decided(rows)[0].names)


@pytest.mark.parametrize(
    "ordered",
    [
        pytest.param(lambda rows: sorted(set(rows)), id="by text"),  # "10" before "2"
        pytest.param(lambda rows: list(dict.fromkeys(rows)), id="by first appearance"),
    ],
)
def test_other_orders_would_be_caught(ordered: Callable[[Sequence[str]], Sequence[str]]):  # trap: A12, planted
    with pytest.raises(AssertionError):
        keeps_ids(ordered)


@given(st.lists(st.text(max_size=4) | st.integers().map(str), min_size=1))
def test_order_is_one_of_all_names_and_repeats(names: list[str]):
    ordered = order(names)
    assert sorted(ordered) == sorted(set(names))
    assert order(reversed(names)) == ordered
    assert order(ordered) == ordered


def test_rows_that_are_added_change_no_id_once_the_order_is_in_the_recipe():  # trap: A12
    labels, choices = decided(["b", "a", "c"])
    (resolved,) = [choice.value for choice in choices if choice.key == "data.labels"]
    assert resolved == labels.names == ("a", "b", "c")
    assert decided(["c", "b", "a"] * 9, labels=resolved)[0].names == ("a", "b", "c")
    assert "'aa' is not one of the classes (a, b, c)" in refused(["c", "b", "a", "aa"], labels=resolved)[0]


# kinds


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (["a", "b"], "one"),
        (["1", "2"], "one"),
        (["1.5", "2", "3e-1"], "number"),
        (["1.5", "two"], "one"),
        ([["a"], ["a", "b"], []], "many"),
        (["true", "false"], "one"),
        (["nan", "1.5"], "one"),
    ],
)
def test_kind_is_read_from_the_labels_and_said(rows: Sequence[Any], kind: str):
    labels, choices = decided(rows)
    assert labels.kind == kind
    assert ("data.label_kind", kind) in [(choice.key, choice.value) for choice in choices]
    assert labels.num_outputs == (1 if kind == "number" else len(labels.names))


# refusals


def test_a_label_that_only_a_held_out_row_has_is_refused_with_its_place():  # trap: A12
    (problem,) = refused(["eye", "ear", "eye"], held=["eye", "eyes"])
    assert problem == (
        "test.csv:3: unknown_label: the label 'eyes' is not one of the classes (ear, eye). "
        "Correct it, add training rows, or name all classes in data.labels. Did you mean eye?"
    )


def test_labels_that_no_list_names_are_listed_with_the_first_place_of_each():
    problems = refused(["a", "x", "b", "y", "x"], held=["z"], labels=("a", "b"))
    assert [problem.split(" is not one of")[0] for problem in problems] == [
        "train.csv:3: unknown_label: the label 'x'",
        "train.csv:5: unknown_label: the label 'y'",
        "test.csv:2: unknown_label: the label 'z'",
    ]
    assert len(refused([f"x{i}" for i in range(50)], labels=("a", "b"))) == 20


def test_labels_that_are_no_numbers_are_refused():
    problems = refused(["1.5", "high", "2"], held=["inf"], label_kind="number")
    assert [problem.split(". ")[0] for problem in problems] == [
        "train.csv:3: unknown_label: the label 'high' is not a number",
        "test.csv:2: unknown_label: the label 'inf' is not a number",
    ]


def test_one_class_teaches_nothing():
    assert "every training row has the class 'a'" in refused(["a", "a"])[0]
    assert "every training row has the class 'a'" in refused(["a", "a"], labels=("a", "b"))[0]
    assert "no training row has a class" in refused([[], []])[0]
    assert "every training row has the class 'O'" in refused([["O"], ["O", "O"]], task="tag")[0]


def test_too_many_classes_are_refused_with_what_may_have_been_meant():
    (text,) = refused([f"Answer {i}" for i in range(30)], columns={"text": "q", "label": "a"})
    assert "30 classes in 30 labels: nearly every row is a class of its own" in text
    assert "data.label_kind: number, or if answers task: generate" in text
    (text,) = refused([f"c{i % 1500}" for i in range(6000)])
    assert "1,500 classes" in text
    names = [f"c{i}" for i in range(30)]
    assert decided(names, labels=tuple(names))[0].num_outputs == 30


# weights


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=50).filter(lambda rows: len(set(rows)) > 1))
def test_balanced_weights_are_those_of_scikit_learn(rows: list[str]):
    labels, _ = decided(rows, class_weights="balanced")
    expected = compute_class_weight("balanced", classes=np.array(labels.names), y=np.array(rows))
    np.testing.assert_allclose(labels.weights_C, expected, rtol=1e-15)


def test_balanced_weights_by_hand_from_the_rows_that_are_trained():
    rows = ["a", "a", "a", "b", "b", "c"]
    labels, _ = decided(rows, class_weights="balanced", train_rows=[0, 1, 2, 3])
    # 4 rows, 2 classes present: 4 / (2 * 3), 4 / (2 * 1); a class without a row weighs 1
    assert labels.weights_C.tolist() == [4 / 6, 2.0, 1.0]
    assert decided(rows, class_weights={"b": 2.5})[0].weights_C.tolist() == [1.0, 2.5, 1.0]  # type: ignore[union-attr]
    assert decided(rows)[0].weights_C is None


# targets


def test_targets_are_what_the_head_learns():
    vocabulary = ("b", "a", "c")
    ids = np.array([0, 2], np.int64)
    one = targets(Labels("tags", ("a", "b", "c")), ids, vocabulary)
    assert (one.tolist(), one.dtype) == ([1, 2], np.int64)
    many = targets(Labels("many", ("a", "b", "c")), ids, vocabulary)
    assert (many.tolist(), many.dtype) == ([[0.0, 1.0, 1.0]], np.float32)
    none = targets(Labels("many", ("a", "b", "c")), ids[:0], vocabulary)
    assert none.tolist() == [[0.0, 0.0, 0.0]]
    number = targets(Labels("number"), np.array([1]), ("1", "-2.5"))
    assert (number.tolist(), number.dtype) == ([-2.5], np.float32)
    with pytest.raises(DataError, match="'c' is not one of the classes"):
        targets(Labels("one", ("a", "b")), np.array([2]), vocabulary)


# remarks


@pytest.mark.parametrize(
    ("names", "num"),
    [
        (("eye", "eye "), 1),
        (("Eye", "eye", "EYE", "ear"), 1),
        (("caf\u00e9", "cafe\u0301"), 1),
        (("a b", "a  b", "c", "C"), 2),
        (("eye", "eyes"), 0),
    ],
)
def test_classes_that_look_alike_are_remarked_on(names: tuple[str, ...], num: int):
    assert len(similar_names_notes(names)) == num
