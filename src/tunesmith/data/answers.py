"""Answers that a model drew, as the rows of one step."""

# N trained tokens of a row, C numbers of each

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.row_targets import RowTargets
from tunesmith.types import Row, Source


@dataclass(frozen=True, slots=True)
class DrawnSource(Source):
    """The place of a prompt in its file, and the number of the answer, counted from 1."""

    sample: int = 1

    def __str__(self) -> str:
        return f"{Source(self.path, self.line)}, answer {self.sample}"


def answer_row(
    prompt_T: NDArray[np.int32],
    answer: Sequence[int],
    source: DrawnSource,
    values_NC: NDArray[np.float32] | None = None,
) -> Row:
    """The row of a prompt and its answer. Every token of the answer is learnt, also the token that ended it."""
    ids_T = np.concatenate([prompt_T, np.array(answer, np.int32)])
    return Row(ids_T, np.arange(len(ids_T)) >= len(prompt_T), source, values_NC=values_NC)


class AnswerStore:
    """Rows in memory that steps and batches read like a `RowStore`. `divisor`: of the loss of their step.
    Answers that teach nothing count in it, but have no row."""

    def __init__(self, rows: Sequence[Row], divisor: float) -> None:
        self.rows = list(rows)
        self.lengths = np.array([len(row.ids) for row in rows], np.int32)
        self.targets = np.array([row.trained.sum() for row in rows], np.int32)
        self.denominators = np.zeros(len(rows))
        self.denominators[0] = divisor  # whole, so that no rounding of shares moves it
        self.learnt = RowTargets()

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        """One row."""
        return self.rows[index]

    def source(self, index: int) -> Source:
        """The place of its prompt, and which answer it is."""
        return self.rows[index].source
