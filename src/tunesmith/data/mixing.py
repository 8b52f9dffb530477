"""Weights of data files: how often each row is seen, and which share of training each source has."""

# F files, I rows

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data


def times_per_epoch(data: Data, rows_F: Sequence[int]) -> NDArray[np.float64]:
    """[F], how often each row of each file of `data.train` and `data.replay` is seen in an epoch.

    `rows_F`: rows of each file that are trained. With `data.mix: times` these are the weights. With shares each source
    has its weight's share of the rows of `data.train`, and the epoch ends where the first source is used up: no row is
    seen twice in it.

    Raises DataError if a source that is to have a share has no row.
    """
    files = (*data.train, *data.replay)
    times_F = np.array([file.weight for file in files])
    if data.mix == "times":
        return times_F
    rows: dict[str, int] = {}
    for file, num in zip(data.train, rows_F, strict=False):
        rows[file.source] = rows.get(file.source, 0) + num
    if empty := [source for source, num in rows.items() if num == 0]:
        raise DataError(f"data.train: {empty[0]}: no row of it is trained, so it cannot have a share. Leave it out.")
    rates = {file.source: file.weight / rows[file.source] for file in data.train}
    most = max(rates.values())
    for at, file in enumerate(data.train):
        times_F[at] = rates[file.source] / most
    return times_F


def source_ids(data: Data) -> NDArray[np.int64]:
    """[F], the number of the source of each file of `data.train` and `data.replay`: a folder is one source."""
    names = [*(f"train {file.source}" for file in data.train), *(f"replay {file.source}" for file in data.replay)]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def mix(data: Data, rows_F: Sequence[int]) -> list[dict[str, Any]]:
    """Each source as {"path", "rows", "times", "share"}: its rows that are trained, how often each is seen per epoch,
    and its share of the rows of an epoch. Empty for a single source that is seen once."""
    times_F = times_per_epoch(data, rows_F)
    found: dict[int, dict[str, Any]] = {}
    for file, source, num, times in zip(
        (*data.train, *data.replay), source_ids(data).tolist(), rows_F, times_F.tolist(), strict=True
    ):
        one = found.setdefault(source, {"path": file.source, "rows": 0, "times": times, "share": 0.0})
        one["rows"] += int(num)
    total = sum(one["rows"] * one["times"] for one in found.values())
    for one in found.values():
        one["share"] = one["rows"] * one["times"] / total if total else 0.0
    return list(found.values()) if len(found) > 1 or any(one["times"] != 1 for one in found.values()) else []
