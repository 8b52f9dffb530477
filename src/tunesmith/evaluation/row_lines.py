"""One line a row of what an evaluation found, so that two evaluations can be compared and a person can look."""

# I rows

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.store import RowStore
from tunesmith.evaluation.outcomes import Outcomes, row_facts
from tunesmith.types import HeadName, Labels

MAX_CHARS = 10_000
"""Of a row's text that is written down."""
MOST_SURPRISING = 20
"""Training rows listed of those that were looked at."""


def row_lines(
    store: RowStore,
    rows_I: NDArray[np.int64],
    outcomes: Outcomes,
    *,
    head: HeadName,
    labels: Labels | None,
    tokenizer: Any,
    texts: Iterable[str | None],
) -> Iterator[dict[str, Any]]:
    """{"source", "hash", "text"} of each row and what `row_facts` says of it.

    `texts` are those of the rows as they were given, in the same order; None: as the tokens spell it.
    """
    for row, facts, given in zip(map(int, rows_I), row_facts(head, labels, outcomes), texts, strict=True):
        text = given
        if text is None:
            text = str(tokenizer.decode(store.row(row).ids.tolist(), skip_special_tokens=True))
        yield {
            "source": str(store.source(row)),
            "hash": f"{int(store.hashes[row]):016x}",
            "text": text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + " …",
            **facts,
        }


def looked_through(store: RowStore, rows_I: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The training rows among which surprising ones are looked for: `most` of them, the same whatever their order."""
    hashes_I = store.hashes[rows_I]
    if most < len(rows_I):  # what lies above is not sorted: a plan asks often, and of a million rows it takes long
        near_I = hashes_I <= np.partition(hashes_I, most)[most]
        rows_I, hashes_I = rows_I[near_I], hashes_I[near_I]
    return rows_I[np.argsort(hashes_I, kind="stable")][:most]


def most_surprising(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of highest loss per target, the highest first."""
    return sorted(lines, key=lambda line: -line["loss"] / line["count"])[:MOST_SURPRISING]
