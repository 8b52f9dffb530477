"""Numbers from a server, which may charge for them, in a file until all are there: a resumed run does not
request them again."""

# N targets of a row, C numbers of each

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunesmith.runs.atomic import from_json, storing, to_json


def key_of(ids_T: NDArray[np.int32], trained_T: NDArray[np.bool_]) -> str:
    """The key of a row: SHA-256 of its tokens and of those that are learnt."""
    return hashlib.sha256(ids_T.astype(np.int32).tobytes() + trained_T.tobytes()).hexdigest()


class KeptReplies:
    """Numbers [N, C] of rows by their `key_of`, a line of JSON each. A line that a killed process has left half
    is cut off, and one that is damaged does not count. All of it raises StorageError."""

    def __init__(self, path: Path, num_columns: int) -> None:
        self._path, self._columns, self._places, end = path, num_columns, dict[str, int](), 0
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a+b") as file:
                file.seek(0)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    with suppress(ValueError, KeyError, TypeError):
                        self._places[str(from_json(line)["key"])] = end
                    end += len(line)
                file.truncate(end)

    def get(self, key: str) -> NDArray[np.float32] | None:
        """[N, C], or None where they were not kept."""
        if (place := self._places.get(key)) is None:
            return None
        with storing(self._path), open(self._path, "rb") as file:
            file.seek(place)
            content = b64decode(from_json(file.readline())["values"])
        return np.frombuffer(content, np.float32).reshape(-1, self._columns)

    def put(self, key: str, values_NC: NDArray[np.float32]) -> None:
        """Keep the numbers of a row: the death of this process loses none."""
        line = to_json({"key": key, "values": b64encode(values_NC.astype(np.float32).tobytes()).decode()}) + b"\n"
        with storing(self._path, num_bytes=len(line)), open(self._path, "ab") as file:
            self._places[key] = file.tell()
            file.write(line)

    def remove(self) -> None:
        """Remove the file, of which nothing is needed any more."""
        with storing(self._path):
            self._path.unlink(missing_ok=True)
