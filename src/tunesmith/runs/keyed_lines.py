"""Entries by key in a file that grows: what was paid for once is there when a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock

from tunesmith.runs.atomic import from_json, storing, to_json
from tunesmith.types import JsonObject, Record


class KeyedLines:
    """Entries in a file, a line of JSON with its "key" each. All of it raises StorageError.

    A last line that a killed process has left half is cut off. `take` gets the key and the entry of each line; a
    line that is no entry, or of which `take` raises ValueError, KeyError, TypeError or AttributeError, is damaged
    and does not count.
    """

    def __init__(self, path: Path, take: Callable[[str, JsonObject], object] = lambda key, entry: None) -> None:
        self.path = path
        self.damaged: list[int] = []
        """Numbers of the damaged lines."""
        self._places: dict[str, int] = {}
        self._lock = Lock()
        if not path.exists():
            return
        with storing(path), open(path, "r+b") as file:
            end = 0
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry: JsonObject = from_json(line)
                    key = entry.pop("key")
                    take(key, entry)
                    self._places[key] = end
                except (ValueError, KeyError, TypeError, AttributeError):
                    self.damaged.append(number)
                end += len(line)
            file.truncate(end)

    def get(self, key: str) -> JsonObject | None:
        """The entry of a key, None where there is none."""
        if key not in self._places:
            return None
        with storing(self.path), open(self.path, "rb") as file:
            file.seek(self._places[key])
            return dict(from_json(file.readline()))

    def add(self, entries: Mapping[str, Record]) -> None:
        """Append entries; the death of this process loses none. Threads may add at the same time."""
        lines = {key: to_json({"key": key, **entry}) + b"\n" for key, entry in entries.items()}
        places, num_bytes = dict[str, int](), sum(map(len, lines.values()))
        with self._lock, storing(self.path, num_bytes=num_bytes):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                for key, line in lines.items():
                    places[key] = file.tell()
                    file.write(line)
            self._places |= places  # now that another thread can read them

    def remove(self) -> None:
        """Remove the file, of which nothing is needed any more."""
        with storing(self.path):
            self.path.unlink(missing_ok=True)
