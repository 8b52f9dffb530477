"""Grades that were made, in memory and in a file of a run, so that none is made twice."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tunesmith.graders.grade import Grade
from tunesmith.runs.atomic import fsync_file, storing
from tunesmith.runs.keyed_lines import KeyedLines
from tunesmith.types import JsonObject


class KeptGrades(dict[str, Grade]):
    """Grades by their digests, see `Pool`; new ones wait for `flush`, so that a step
    that is not made leaves none."""

    def __init__(self) -> None:
        super().__init__()
        self._file: KeyedLines | None = None
        self._new: list[str] = []

    def __setitem__(self, key: str, grade: Grade) -> None:
        super().__setitem__(key, grade)
        self._new.append(key)

    def keep_in(self, path: Path) -> list[int]:
        """Take the grades of a file, and append new ones to it. Returns the numbers of the lines that are
        damaged, whose grades are made anew. Raises StorageError."""

        def take(key: str, entry: JsonObject) -> None:
            dict.__setitem__(self, key, Grade(**entry))

        self._file = KeyedLines(path, take)
        return self._file.damaged

    def flush(self) -> None:
        """Write the grades that are new, durably. Raises StorageError."""
        if self._file is None or not self._new:
            return
        self._file.add({key: asdict(self[key]) for key in self._new})
        with storing(self._file.path):
            fsync_file(self._file.path)
        self._new.clear()
