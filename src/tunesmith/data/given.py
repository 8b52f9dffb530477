"""The text of rows as their file has it, for a person to read: tokens spell it otherwise, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.examples import content_hash, examples
from tunesmith.data.store import RowStore
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Example, TaskName


def given_text(example: Example) -> str | None:
    """What the example says; None for a document, of which each row is a window."""
    if example.shape == "text":
        return None
    if example.shape == "tokens_tags":
        return " ".join(part.text for part in example.parts)
    if example.plain or example.shape == "text_label":
        return "\n".join(part.text for part in example.parts)
    return "\n".join(f"{part.role}: {part.text}" for part in example.parts)


def texts_in_order(found: Iterable[Example], store: RowStore) -> Iterator[str | None]:
    """The text of each row of a store from the examples of its files, in order; None where they do not have it."""
    coming = iter(found)
    text: str | None = None
    for row in range(len(store)):
        if store.windows[row] == 0:
            source = store.source(row)
            example = next((one for one in coming if one.source == source), None)
            text = None if example is None else _verified(example, store, row)
        yield text


def texts_of(
    files: Sequence[DataFile], data: Data, task: TaskName, store: RowStore, rows_I: NDArray[np.int64]
) -> dict[int, str]:
    """The text of some rows, by their numbers; those are missing whose file is gone or says something else by now."""
    wanted = {str(store.source(row)): row for row in map(int, rows_I)}
    found: dict[int, str] = {}
    if task == "text" or not wanted:
        return found
    num_seen = 0
    try:
        for _, example in examples(files, data, lambda problem: None, task=task):
            row = wanted.get(str(example.source))
            if row is None:
                continue
            num_seen += 1
            if (text := _verified(example, store, row)) is not None:
                found[row] = text
            if num_seen == len(wanted):
                break
    except DataError:
        pass  # a file that is gone by now must not end a run: whoever asks decodes tokens instead, and says so
    return found


def _verified(example: Example, store: RowStore, row: int) -> str | None:
    return given_text(example) if content_hash(example) == int(store.hashes[row]) else None
