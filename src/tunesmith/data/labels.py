"""Classes, their order and their weights: from the words of rows to the targets of a head.

Classes come in the order of the recipe's data.labels, or sorted as the training files have them: whole numbers
first, by value, then all other words by code point. It never follows from the order of rows. Resolved, it is
written into the run's recipe, so a run that is repeated with more rows keeps every id.
"""

# C classes, I rows, N targets, V words of a store's vocabulary

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.formats import SHAPES
from tunesmith.errors import DataError, RecipeError
from tunesmith.phrases import did_you_mean, plural
from tunesmith.recipe.schema import Data
from tunesmith.types import Choice, LabelKind, Labels, Problem, Source, TaskName

ClassWeights = Literal["equal", "balanced"] | Mapping[str, float]

MOST_CLASSES = 1000
"""Most classes that rows may bring if data.labels names none."""
MOST_LABELS_LISTED = 20
"""Rows named one by one, one for each label that cannot be used."""

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """The labels of some rows."""

    names: Sequence[str]
    counts_V: NDArray[np.int64]
    """Frequency of each: number of rows, for tags number of words."""
    many: bool
    """Whether rows have lists of them."""
    place: Callable[[int], Source]
    """Returns the first place of a name, by its index."""

    @property
    def counts(self) -> dict[str, int]:
        """Frequency of each name that a row has."""
        return {name: count for name, count in zip(self.names, self.counts_V.tolist(), strict=True) if count}


def order(names: Iterable[str]) -> tuple[str, ...]:
    """Classes in the order of their ids: whole numbers by value, then all other words by code point."""
    return tuple(sorted(set(names), key=_rank))


def _rank(name: str) -> tuple[bool, int, str]:
    is_whole = _WHOLE.fullmatch(name) is not None
    return not is_whole, int(name) if is_whole else 0, name


def resolve_labels(
    *,
    task: TaskName,
    data: Data,
    class_weights: ClassWeights,
    trained: LabelCounts,
    sides: Sequence[LabelCounts],
    own_classes: Sequence[str] = (),
) -> tuple[Labels, list[Choice]]:
    """Labels that the head of a classifier or tagger learns, and what was decided for the user.

    `trained`: labels of the rows that are trained on, from which weights follow. `sides`: labels of all rows of
    the training files, then of held-out files if there are any. Classes come from the training files, or from
    `own_classes`, which the model's head has, if the rows bring no other.

    Raises:
        DataError: a label is not one of the classes, or no number; there is one class, or far too many.
        RecipeError: data.labels or train.class_weights do not fit.
    """
    is_own = not data.labels and bool(own_classes) and set(sides[0].counts) <= set(own_classes)
    if is_own:
        data = data.model_copy(update={"labels": tuple(own_classes)})
    kind, choices = find_kind(task, data, sides)
    if kind == "number":
        if data.labels or class_weights != "equal":
            option = "data.labels" if data.labels else "train.class_weights"
            raise RecipeError(
                f"{option}: labels are numbers, which have no classes. Leave it out, or set data.label_kind."
            )
        refuse_unknown(Labels("number"), *sides)
        return Labels("number"), choices
    names = data.labels or order(sides[0].counts)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RecipeError(f"data.labels: {twice!r} is there twice. Name each class once.")
    refuse_unknown(Labels(kind, names), *sides)
    if is_own:
        choices.append(Choice("data.labels", names, "the classes of the model's own head"))
    elif not data.labels:
        _refuse_too_many(names, sides[0])
        choices.append(Choice("data.labels", names, "classes of the training files, whole numbers first, then by name"))
    counts_C = count_classes(trained, names)
    if (counts_C > 0).sum() < (1 if kind == "many" else 2):
        only = next((name for name, count in zip(names, counts_C, strict=True) if count), None)
        which = f"every training row has the class {only!r}" if only else "no training row has a class"
        raise DataError(f"data.train: {which}: there is nothing to distinguish. Add rows of other classes.")
    weights_C = weights_of(class_weights, kind, names, counts_C)
    if class_weights == "balanced" and weights_C is not None:
        by_name = dict(zip(names, weights_C.tolist(), strict=True))
        choices.append(Choice("train.class_weights", by_name, "balanced: rows / (classes * rows of the class)"))
    return Labels(kind, names, weights_C), choices


def refuse_unknown(labels: Labels, *sides: LabelCounts) -> None:
    """Raise DataError for labels that are none of these, each with its first place."""
    problems: list[Problem] = []
    known = frozenset(labels.names)
    for side in sides:
        for i, name in enumerate(side.names):
            is_known = is_number(name) if labels.kind == "number" else name in known
            if side.counts_V[i] and not is_known:
                if len(problems) == MOST_LABELS_LISTED:
                    raise DataError(f"more than {MOST_LABELS_LISTED} labels cannot be used", problems)
                problems.append(Problem(side.place(i), "unknown_label", *_unknown(name, labels)))
    if problems:
        raise DataError("\n".join(map(str, problems)), problems)


def find_kind(task: TaskName, data: Data, sides: Sequence[LabelCounts]) -> tuple[LabelKind, list[Choice]]:
    """Kind of the labels, and the choice if it was made for the user. Raises DataError for unexpected lists."""
    if "tokens_tags" in SHAPES[task]:
        return "tags", []
    if not {"scored_answers", "ranked_documents"}.isdisjoint(SHAPES[task]):
        choice = Choice("data.label_kind", "number", "an answer or document gets a number")
        return "number", [choice] if data.label_kind == "auto" else []
    has_lists = [side for side in sides if side.many]
    if data.label_kind == "auto":
        if sides[0].many:
            return "many", [Choice("data.label_kind", "many", "labels are lists")]
        present = sides[0].counts
        if not data.labels and present and all(map(is_number, present)) and any(re.search("[.eE]", n) for n in present):
            return "number", [Choice("data.label_kind", "number", "labels are numbers with a decimal point")]
    if has_lists and data.label_kind != "many":
        place = has_lists[0].place(int(np.argmax(has_lists[0].counts_V))) if has_lists[0].counts else "data"
        wanted = data.label_kind if data.label_kind != "auto" else "one, as in the training files"
        raise DataError(f"{place}: label is a list, but data.label_kind is {wanted}. Set data.label_kind: many.")
    if data.label_kind == "auto":
        return "one", [Choice("data.label_kind", "one", "each row has one class")]
    return data.label_kind, []


def is_number(name: str) -> bool:
    """Whether a label is a number that float32 can hold."""
    return _NUMBER.fullmatch(name) is not None and abs(float(name)) < float(np.finfo(np.float32).max)


def similar_names_notes(names: Iterable[str]) -> list[str]:
    """Notes about classes that differ only by white space, case or Unicode form."""
    alike: dict[str, list[str]] = {}
    for name in order(names):
        alike.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    return [
        f"the classes {' and '.join(map(repr, group))} differ only in white space, case or how characters are "
        "encoded: they are learnt as different ones. If they are one, write them alike"
        for group in alike.values()
        if len(group) > 1
    ]


_MISSING = {"nan", "na", "n/a", "#n/a", "null", "none", "-", "?"}


def missing_names_note(rows_of: Mapping[str, int]) -> list[str]:
    """A note about classes that stand for a missing label in other files."""
    suspects = {name: num for name, num in rows_of.items() if name.strip().lower() in _MISSING}
    if not suspects:
        return []
    shown = ", ".join(f"{name!r} ({plural(num, 'row')})" for name, num in suspects.items())
    return [f"learnt as classes: {shown}. Remove such rows where this means that a label is missing"]


def count_classes(seen: LabelCounts, names: Sequence[str]) -> NDArray[np.int64]:
    """[C], how many rows (for tags: words) have each class."""
    counts = seen.counts
    return np.array([counts.get(name, 0) for name in names], np.int64)


def targets(labels: Labels, local_ids: NDArray[np.int64], vocabulary: Sequence[str]) -> NDArray[np.generic]:
    """Targets of a head for one row, whose labels are given as indices into `vocabulary`.

    Class ids int64 [N], a number float32 [1], or 0 and 1 for each class float32 [1, C]. Raises DataError for a
    label that is not one of the classes.
    """
    if labels.kind == "number":
        return np.array([float(vocabulary[i]) for i in local_ids], np.float32)
    classes_N: NDArray[np.int64] = _classes(labels.names, tuple(vocabulary))[local_ids]
    if (classes_N < 0).any():
        raise DataError(_unknown(vocabulary[int(local_ids[classes_N < 0][0])], labels)[0])
    if labels.kind != "many":
        return classes_N
    held_1C = np.zeros((1, len(labels.names)), np.float32)
    held_1C[0, classes_N] = 1.0
    return held_1C


@lru_cache(maxsize=16)
def _classes(names: tuple[str, ...], vocabulary: tuple[str, ...]) -> NDArray[np.int64]:
    """[V], the class of each word, -1 where it is none."""
    ids = {name: i for i, name in enumerate(names)}
    return np.array([ids.get(word, -1) for word in vocabulary], np.int64)


def weights_of(
    class_weights: ClassWeights, kind: LabelKind, names: Sequence[str], counts_C: NDArray[np.int64]
) -> NDArray[np.float64] | None:
    """[C]; balanced: rows / (classes * rows of the class), as scikit-learn's compute_class_weight."""
    if class_weights == "equal":
        return None
    if kind == "many":
        raise RecipeError("train.class_weights: a row can have several classes, which cannot be weighed. Leave it out.")
    if class_weights == "balanced":
        present = int((counts_C > 0).sum())
        return np.asarray(np.where(counts_C > 0, counts_C.sum() / (present * np.maximum(counts_C, 1)), 1.0))
    for name in class_weights:
        if name not in names:
            raise RecipeError(f"train.class_weights: {name!r} is not one of the classes.{did_you_mean(name, names)}")
    return np.array([class_weights.get(name, 1.0) for name in names], np.float64)


def first_names(names: Sequence[str]) -> str:
    """The first names of classes, and a sign that there are more."""
    return ", ".join([*names[:MOST_LABELS_LISTED], *(["..."] if len(names) > MOST_LABELS_LISTED else [])])


def _unknown(name: str, labels: Labels) -> tuple[str, str]:
    if labels.kind == "number":
        return f"the label {name[:60]!r} is not a number.", "Correct it, or set data.label_kind: one for classes."
    listed = first_names(labels.names)
    fix = f"Correct it, add training rows, or name all classes in data.labels.{did_you_mean(name, labels.names)}"
    return f"the label {name[:60]!r} is not one of the classes ({listed}).", fix


def _refuse_too_many(names: Sequence[str], seen: LabelCounts) -> None:
    total = int(seen.counts_V.sum())
    is_unique = len(names) >= 20 and len(names) > total / 2
    if len(names) <= MOST_CLASSES and not is_unique:
        return
    what = "nearly every row is a class of its own" if is_unique else f"more than {MOST_CLASSES:,} are seldom meant"
    fix = "Name them in data.labels, or if they are numbers set data.label_kind: number, or if answers task: generate."
    raise DataError(f"data.train: {len(names):,} classes in {total:,} labels: {what}. {fix}")
