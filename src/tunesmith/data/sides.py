"""Which rows of a store are trained and which measured, and what is to be said of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.dataset import RowStore
from tunesmith.data.labels import MOST_LISTED, find_kind, order, see
from tunesmith.data.repeats import input_overlap
from tunesmith.data.split import (
    choose_share,
    crowd_note,
    has_one_input,
    held_out_mask,
    measured,
    split_note,
    stratified_mask,
    stratified_note,
)
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data, resolved
from tunesmith.types import Choice, Labels, TaskName


def never_trained(
    labels: Labels, stores: tuple[RowStore, RowStore], train: NDArray[np.int64], held: NDArray[np.int64]
) -> list[str]:
    """What to say of classes that the head has and that only held-out rows show."""
    trained, shown = (see(store, rows).counts for store, rows in zip(stores, (train, held), strict=True))
    missing = order(shown.keys() - trained.keys()) if labels.kind != "number" else ()
    if not missing:
        return []
    listed = ", ".join(map(repr, missing[:MOST_LISTED])) + (", ..." if len(missing) > MOST_LISTED else "")
    return [
        f"{len(missing):,} of {len(labels.names):,} classes stand in held-out rows alone, so they are measured and "
        f"never learnt: {listed}. Add rows of them, or choose the held-out rows yourself: --eval"
    ]


def measured_rows(
    held: NDArray[np.int64], store: RowStore, most: int | None, notes: list[str], *, by_class: bool
) -> NDArray[np.int64]:
    """The held-out rows by content hash, at most `most` of them; adds to `notes` how many are left out.

    `by_class`: of each class its share, rather than those with the smallest hashes.
    """
    size = len(held) if most is None else most
    classes_I = store.first_labels[held] if by_class else np.zeros(len(held), np.int64)
    if len(held) > size:
        how = ", each class its share" if by_class else ""
        notes.append(
            f"{size:,} of {len(held):,} held-out rows are measured{how}: {len(held) - size:,} are left out "
            "(evaluation.max_rows)"
        )
    return held[measured(store.hashes[held], classes_I, size)]


def choose_held_out(data: Data, store: RowStore) -> tuple[Data, list[Choice]]:
    """The data with a share of rows to hold out, and the choice where it was left open and no file is given for it."""
    if data.held_out != "auto" or data.eval:
        return data, []
    choice = choose_share(int((store.file_index < len(data.train)).sum()))
    return data.model_copy(update={"held_out": choice.value}), [choice]


def split(
    data: Data, store: RowStore, held_store: RowStore, task: TaskName
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """Rows to train on, rows to measure, and what to say of the split. Rows of data.replay are never held out."""
    is_replay = store.file_index >= len(data.train)
    own = np.flatnonzero(~is_replay)
    if len(own) == 0:
        raise DataError(f"{', '.join(file.path for file in data.train)}: no row is left to use")
    is_held = np.zeros(len(store), np.bool_)
    notes: list[str | None] = []
    if data.eval:
        held = np.arange(len(held_store))
        is_leaked = is_replay & np.isin(store.hashes, held_store.hashes)
    else:
        keys = store.hashes if has_one_input(store.inputs[own]) else store.inputs
        is_held[own], notes = _held_out(data, store, own, keys[own], task)
        held = np.flatnonzero(is_held)
        is_leaked = is_replay & np.isin(keys, keys[held])
    if is_leaked.any():
        notes.append(f"{int(is_leaked.sum()):,} rows of data.replay are also held out, and so not trained")
    return np.flatnonzero(~is_held & ~is_leaked), held, [note for note in notes if note]


def _held_out(
    data: Data, store: RowStore, own: NDArray[np.int64], keys: NDArray[np.uint64], task: TaskName
) -> tuple[NDArray[np.bool_], list[str | None]]:
    """Which of the training files' own rows are held out, by keys of theirs, and what to say of it."""
    share = resolved(data.held_out)
    if task == "classify" and find_kind(task, data, [see(store)])[0] == "one":
        classes = store.first_labels[own]
        mask = stratified_mask(keys, store.hashes[own], classes, share)
        note = stratified_note(classes, mask, share)
    else:
        mask, note = held_out_mask(keys, share), split_note(keys, share)
    return mask, [note, crowd_note(keys, mask, share)]


def overlap_notes(data: Data, store: RowStore, held_store: RowStore, train: NDArray[np.int64]) -> list[str]:
    """What to say of rows of the held-out files that are trained, and of those that differ in their answer only."""
    is_equal = np.isin(held_store.hashes, store.hashes[train])
    alike = input_overlap(is_equal, store.inputs[train], held_store.inputs)
    shared = np.flatnonzero(is_equal)
    if len(shared) == 0:
        return alike
    text = (
        f"{len(shared):,} of {len(held_store):,} held-out rows also stand in the training files, "
        f"the first at {held_store.source(int(shared[0]))}"
    )
    if data.overlap == "error":
        raise DataError(f"{text}. Remove them, or set data.overlap: warn.")
    return [f"{text}: the measures flatter the tuned model", *alike]
