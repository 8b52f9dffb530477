"""An example as tokens, before it is a row: the parts of it that are known at a time."""

# T tokens, N targets

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tunesmith.types import LEAST_PREFIX, Problem


@dataclass(slots=True)
class Draft:
    """An example, or one window of it, as tokens."""

    ids_T: NDArray[np.int32]
    trained_T: NDArray[np.bool_]
    warnings: list[Problem] = field(default_factory=list)
    classes_N: tuple[str, ...] | None = None
    """Names of the classes that are learnt at the trained tokens; None: tokens themselves; empty: any class."""
    second: int = 0
    num_bytes: int = 0
    branches: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    keys: tuple[int, ...] = ()
    images: tuple[int, ...] = ()


Drafts: TypeAlias = list[Draft] | Problem
"""The windows of an example, mostly one, or the problem that makes it unusable."""


def join(drafts: Sequence[Draft], values: tuple[float, ...]) -> Draft:
    """Join the drafts of several lines into one, with their common beginning once. A stem that is too short to
    be computed apart stays in each line."""
    stem = min(int(np.append(draft.trained_T, True).argmax()) for draft in drafts)
    first = drafts[0].ids_T
    for other in drafts[1:]:
        shorter = min(stem, len(first), len(other.ids_T))
        stem = int(np.append(first[:shorter] != other.ids_T[:shorter], True).argmax())
    if stem < LEAST_PREFIX and len(drafts) > 1:
        stem = 0
    classes = [draft.classes_N for draft in drafts if draft.classes_N is not None]
    return Draft(
        np.concatenate([first[:stem], *(draft.ids_T[stem:] for draft in drafts)]),
        np.concatenate([drafts[0].trained_T[:stem], *(draft.trained_T[stem:] for draft in drafts)]),
        warnings=[warning for draft in drafts for warning in draft.warnings],
        classes_N=tuple(name for of_draft in classes for name in of_draft) if classes else None,
        second=drafts[0].second,
        branches=tuple(len(draft.ids_T) - stem for draft in drafts),
        values=values,
        keys=tuple(key for draft in drafts for key in draft.keys),
    )
