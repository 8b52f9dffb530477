"""Grades that were made, in memory and in a file of a run, so that none is made twice."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from tunesmith.graders.grade import Grade
from tunesmith.runs.atomic import from_json, storing, to_json
from tunesmith.types import JsonObject


class KeptGrades(dict[str, Grade]):
    """Grades by their digests, see `Pool`; new ones wait for `flush`, so that a step
    that is not made leaves none."""

    def __init__(self) -> None:
        super().__init__()
        self._path: Path | None = None
        self._new: list[str] = []

    def __setitem__(self, key: str, grade: Grade) -> None:
        super().__setitem__(key, grade)
        self._new.append(key)

    def keep_in(self, path: Path) -> list[int]:
        """Take the grades of a file, and append new ones to it. A last line that a killed process
        has left half is cut off. Returns the numbers of the lines that are damaged, whose grades
        are made anew. Raises StorageError.
        """
        self._path, damaged = path, list[int]()
        if not path.exists():
            return damaged
        with storing(path), open(path, "r+b") as file:
            size = 0
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                size += len(line)
                try:
                    entry: JsonObject = from_json(line)
                    super().__setitem__(entry.pop("key"), Grade(**entry))
                except (ValueError, KeyError, TypeError, AttributeError):
                    damaged.append(number)
            file.truncate(size)
        return damaged

    def flush(self) -> None:
        """Write the grades that are new, durably. Raises StorageError."""
        if self._path is None or not self._new:
            return
        lines = b"".join(to_json({"key": key, **asdict(self[key])}) + b"\n" for key in self._new)
        with storing(self._path, num_bytes=len(lines)), open(self._path, "ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self._new.clear()
