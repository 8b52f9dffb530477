"""Division of rows into trained and held-out ones, rows that repeat each other, and notes about both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.formats import SHAPES
from tunesmith.data.labels import find_kind, first_names, order
from tunesmith.errors import DataError
from tunesmith.phrases import listed, plural
from tunesmith.recipe.schema import Data, resolved
from tunesmith.types import Choice, Labels, TaskName

if TYPE_CHECKING:
    from tunesmith.data.dataset import RowStore

FLOOR_ROWS, USUAL_SHARE, LEAST_SHARE, MOST_SHARE = 50, 0.1, 0.05, 0.2
"""By itself: a twentieth of many rows, a tenth of up to a thousand, 50 where that is a fifth or less."""
RARE = 10
"""Rows of a class below which it is neither learnt well nor measured."""
FEW_HELD = 30
"""Held-out rows below which hardly any difference is distinguishable from chance."""


def choose_share(num_rows: int) -> Choice:
    """The share of rows to hold out where none is given: enough to measure on, while most rows are learnt."""
    share = LEAST_SHARE
    if num_rows:
        share = max(LEAST_SHARE, min(USUAL_SHARE, 2 * FLOOR_ROWS / num_rows), min(MOST_SHARE, FLOOR_ROWS / num_rows))
    share = round(share, 4)
    num = max(1, round(share * num_rows))
    of = "1 row" if num_rows == 1 else f"{num_rows:,} rows"
    reason = (
        f"about {num:,} of {of}: a fifth of a small file, {FLOOR_ROWS} to {2 * FLOOR_ROWS} rows of a larger "
        "one, a twentieth of a large one"
    )
    return Choice("data.held_out", share, reason)


def held_out_mask(hashes_I: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Mask of held-out rows, by a hash of input or content; rows with an equal hash are always on one side.

    As many as the share says, those with the smallest hashes: where rows with one hash would be torn, the
    nearest number that does not. One that has more than a fifth of all rows comes last. A share that is not 0
    holds out at least one row and leaves at least one, if there are two different ones.
    """
    _, of_row_I, sizes = np.unique(hashes_I, return_inverse=True, return_counts=True)
    mask_I = np.zeros(len(hashes_I), np.bool_)
    if share == 0 or len(sizes) < 2:
        return mask_I
    order = np.lexsort((np.arange(len(sizes)), sizes > MOST_SHARE * len(hashes_I)))
    held = np.cumsum(sizes[order])[:-1]
    num = 1 + int(np.argmin(np.abs(held - round(share * len(hashes_I)))))
    return np.asarray(np.isin(of_row_I, order[:num]))


def few_note(num_held: int) -> str | None:
    """Note about the uncertainty of few held-out rows; None if there are enough, or none."""
    if not 0 < num_held < FEW_HELD:
        return None
    points = min(100, round(98 / num_held**0.5))  # half of the widest 95 % interval: 1.96 * sqrt(0.25 / n)
    rows = "1 held-out row is" if num_held == 1 else f"{num_held} held-out rows are"
    return (
        f"{rows} too few to distinguish a small change from chance: a share measured on so few is uncertain by "
        f"up to {points} points. Give more rows with --eval, or raise data.held_out: tunesmith explain "
        "may-be-chance"
    )


def has_one_input(inputs_I: NDArray[np.uint64]) -> bool:
    """Whether all rows have the same input, such as an empty prompt: then they are split by content instead."""
    return len(inputs_I) > 0 and bool((inputs_I == inputs_I[0]).all())


def stratified_mask(
    inputs_I: NDArray[np.uint64], hashes_I: NDArray[np.uint64], classes_I: NDArray[np.int64], share: float
) -> NDArray[np.bool_]:
    """Mask of held-out rows in which every class has its share: its rows with the smallest input hashes.

    Of n rows of a class round(share * n), at least one where n is 2 or more, never all. Rows with one input are
    on one side: of an input with several classes the row with the smallest content hash decides.
    """
    mask_I = np.zeros(len(inputs_I), np.bool_)
    if share == 0:
        return mask_I
    classes_I = _classes_of_inputs(inputs_I, hashes_I, classes_I)
    order_I = np.lexsort((inputs_I, classes_I))
    starts = np.flatnonzero(np.diff(classes_I[order_I], prepend=classes_I[order_I][:1] - 1))
    for rows in np.split(order_I, starts[1:]):
        if len(rows) > 1:
            num = min(max(1, round(share * len(rows))), len(rows) - 1)
            is_held = inputs_I[rows] <= inputs_I[rows[num - 1]]
            mask_I[rows] = inputs_I[rows] < inputs_I[rows[num - 1]] if is_held.all() else is_held
    return mask_I


def hold_out(
    inputs_I: NDArray[np.uint64], hashes_I: NDArray[np.uint64], classes_I: NDArray[np.int64] | None, share: float
) -> tuple[NDArray[np.bool_], list[str]]:
    """Mask of held-out rows, stratified if `classes_I` is given, and notes about it.

    Rows with one input stay together, unless all have the same: then they are split by content.
    """
    keys_I = hashes_I if has_one_input(inputs_I) else inputs_I
    if not len(keys_I):
        return np.zeros(0, np.bool_), []
    mask_I = held_out_mask(keys_I, share) if classes_I is None else stratified_mask(keys_I, hashes_I, classes_I, share)
    return mask_I, list(split_notes(keys_I, classes_I, mask_I, share)) if share else []


def split_notes(
    keys_I: NDArray[np.uint64], classes_I: NDArray[np.int64] | None, mask_I: NDArray[np.bool_], share: float
) -> Iterator[str]:
    """Notes if nothing can be held out, or none of some classes, or more than `share` as rows stay together."""
    if classes_I is None and not mask_I.any():
        yield "nothing is held out: it takes two different rows"
    if classes_I is not None and (num := len(np.setdiff1d(classes_I, classes_I[mask_I]))):
        yield f"{plural(num, 'class')} without two different texts: trained and never measured"
    most = np.unique(keys_I[mask_I], return_counts=True)[1].max(initial=0)
    if most >= 2 and most > 2 * share * len(keys_I):
        yield (
            f"{int(mask_I.sum()):,} rows are held out, where data.held_out ({share:g}) wants "
            f"{round(share * len(keys_I)):,}: {most:,} of them have the same input or document, and so stay "
            "together"
        )


def rare_note(names: Sequence[str], classes_I: NDArray[np.int64], mask_I: NDArray[np.bool_]) -> list[str]:
    """A note about classes of few rows; `names` by the ids in `classes_I`."""
    of_class, held_of_class = (
        np.bincount(some_I[some_I >= 0], minlength=len(names)).tolist() for some_I in (classes_I, classes_I[mask_I])
    )
    rare = sorted(counts for counts in zip(of_class, held_of_class, names, strict=True) if 0 < counts[0] < RARE)
    if not rare:
        return []
    shown = listed(f"{name!r} ({plural(num, 'row')}, {held} of them held out)" for num, held, name in rare)
    return [f"too few rows to be learnt well or to be measured: {shown}. Add rows, or put them into another class"]


def _classes_of_inputs(
    inputs_I: NDArray[np.uint64], hashes_I: NDArray[np.uint64], classes_I: NDArray[np.int64]
) -> NDArray[np.int64]:
    order_I = np.lexsort((hashes_I, inputs_I))
    _, first_I, of_input_I = np.unique(inputs_I[order_I], return_index=True, return_inverse=True)
    of_row_I = np.empty_like(classes_I)
    of_row_I[order_I] = classes_I[order_I[first_I]][of_input_I]
    return of_row_I


def measured(hashes_I: NDArray[np.uint64], classes_I: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """`most` of some rows, each class its share of them and at least one, by ascending content hash.

    Of a class whose rows are n, those with the smallest hashes: ceil(t * n) for one t, the largest that `most`
    allows. Where there are more classes than `most`, one row of each of the first by hash.
    """
    order_I = np.lexsort((hashes_I, classes_I))
    _, starts, of_class_I, sizes = np.unique(
        classes_I[order_I], return_index=True, return_inverse=True, return_counts=True
    )
    ranks_I = (np.arange(len(order_I)) - starts[of_class_I]) / sizes[of_class_I]
    chosen = order_I[np.lexsort((hashes_I[order_I], ranks_I))[:most]]
    return chosen[np.argsort(hashes_I[chosen], kind="stable")]


def firsts(among_I: NDArray[np.uint64], of_I: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each value in `of_I` the first place in `among_I` that holds it; -1: there is none."""
    values, places = np.unique(among_I, return_index=True)
    if not len(values):
        return np.full(len(of_I), -1)
    at = np.minimum(np.searchsorted(values, of_I), len(values) - 1)
    return np.where(values[at] == of_I, places[at], -1)


def input_overlap(is_equal_I: NDArray[np.bool_], train_I: NDArray[np.uint64], held_I: NDArray[np.uint64]) -> list[str]:
    """Note about held-out rows whose input is also trained, with another answer.

    `is_equal_I`: the held-out rows that are trained as they are; the others are hashes of inputs.
    """
    num = int((np.isin(held_I, train_I) & ~is_equal_I).sum())
    if not num:
        return []
    return [
        f"{num:,} of {len(held_I):,} held-out rows share an input with a trained row, with another answer: "
        "the model has seen these inputs, so their measures are too good"
    ]


def never_trained(
    labels: Labels, stores: tuple[RowStore, RowStore], train: NDArray[np.int64], held: NDArray[np.int64]
) -> list[str]:
    """Note about classes that only held-out rows have."""
    trained, shown = (store.count_labels(rows).counts for store, rows in zip(stores, (train, held), strict=True))
    missing = order(shown.keys() - trained.keys()) if labels.kind != "number" else ()
    if not missing:
        return []
    listed = first_names(list(map(repr, missing)))
    return [
        f"{len(missing):,} of {len(labels.names):,} classes are in held-out rows alone, so they are measured "
        f"and never learnt: {listed}. Add rows of them, or choose the held-out rows yourself: --eval"
    ]


def measured_rows(
    held: NDArray[np.int64], store: RowStore, most: int | None, notes: list[str], *, by_class: bool
) -> NDArray[np.int64]:
    """The held-out rows by content hash, at most `most` of them; adds to `notes` how many are left out.

    `by_class`: of each class its share, rather than those with the smallest hashes.
    """
    size = len(held) if most is None else most
    classes_I = store.labels.firsts()[held] if by_class else np.zeros(len(held), np.int64)
    if len(held) > size:
        are = "is" if size == 1 else "are"
        by_share = ", each class its share" if by_class else ""
        notes.append(
            f"{size:,} of {len(held):,} held-out rows {are} measured{by_share}: {len(held) - size:,} are left "
            "out (evaluation.max_rows)"
        )
    return held[measured(store.hashes[held], classes_I, size)]


def choose_held_out(data: Data, store: RowStore) -> tuple[Data, list[Choice]]:
    """The data with a share to hold out, and the choice, where it was left open and no file is given."""
    if data.held_out != "auto" or data.eval:
        return data, []
    choice = choose_share(int((store.file_index < len(data.train)).sum()))
    return data.model_copy(update={"held_out": choice.value}), [choice]


def split(
    data: Data, store: RowStore, held_store: RowStore, task: TaskName
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """Rows to train on, rows to measure, and notes on the split. Rows of data.replay are never held out."""
    is_replay = store.file_index >= len(data.train)
    own_rows = np.flatnonzero(~is_replay)
    if len(own_rows) == 0:
        raise DataError(f"{', '.join(file.path for file in data.train)}: no row is left to use")
    is_held = np.zeros(len(store), np.bool_)
    notes: list[str] = []
    if data.eval:
        held = np.arange(len(held_store))
        is_leaked = is_replay & np.isin(store.hashes, held_store.hashes)
    else:
        keys = store.hashes if has_one_input(store.inputs[own_rows]) else store.inputs
        has_classes = "text_label" in SHAPES[task] and find_kind(task, data, [store.count_labels()])[0] == "one"
        classes = store.labels.firsts()[own_rows] if has_classes else None
        is_held[own_rows], notes = hold_out(
            store.inputs[own_rows], store.hashes[own_rows], classes, resolved(data.held_out)
        )
        notes = [
            *notes,
            *(rare_note(store.labels.vocabulary, classes, is_held[own_rows]) if classes is not None else []),
        ]
        held = np.flatnonzero(is_held)
        is_leaked = is_replay & np.isin(keys, keys[held])
    if is_leaked.any():
        notes.append(f"{int(is_leaked.sum()):,} rows of data.replay are also held out, and so not trained")
    return np.flatnonzero(~is_held & ~is_leaked), held, notes


def overlap_notes(data: Data, store: RowStore, held_store: RowStore, train: NDArray[np.int64]) -> list[str]:
    """Notes about held-out rows that are also trained, and about those that differ in their answer only."""
    is_equal = np.isin(held_store.hashes, store.hashes[train])
    alike = input_overlap(is_equal, store.inputs[train], held_store.inputs)
    shared = np.flatnonzero(is_equal)
    if len(shared) == 0:
        return alike
    are = "is" if len(shared) == 1 else "are"
    text = (
        f"{len(shared):,} of {len(held_store):,} held-out rows {are} also in the training files, "
        f"the first at {held_store.source(int(shared[0]))}"
    )
    if data.overlap == "error":
        raise DataError(f"{text}. Remove them, or set data.overlap: warn.")
    return [f"{text}: the measures flatter the tuned model: tunesmith explain held-out-better-than-training", *alike]
