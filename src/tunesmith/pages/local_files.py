"""Data files and models below one folder of this machine: listed, found by name, and received from browsers."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request

from tunesmith.errors import StorageError
from tunesmith.runs.atomic import TEMPORARY, free_bytes
from tunesmith.serve.protocol import RequestError
from tunesmith.types import JsonObject

ROWS = (
    ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".conll", ".bio", ".iob", ".xlsx", ".xlsm", ".txt", ".gz",
)  # fmt: skip
"""Endings of files of rows."""
DEPTH = 3
"""Levels of folders that are searched."""
MOST_LISTED = 400
MOST_LOOKED_AT = 20_000
MOST_UPLOADED = 64 * 2**30
KEPT_FREE = 2**30
"""Bytes that an upload leaves free on the disk."""
SKIPPED = ("runs", "node_modules", "site-packages", "__pycache__", "checkpoints", "exports")
_SOURCE = re.compile(r"(?P<path>.+):(?P<line>\d{1,12})")
BEFORE = 2
"""Lines above a row that its link shows too."""


def row_address(places: Mapping[str, str], source: str) -> str:
    """The address of a row in Data by its source, FILE:LINE; empty for a file that is not in `places`."""
    match = _SOURCE.match(source)
    name = places.get(os.path.abspath(match["path"])) if match else None
    if match is None or name is None:
        return ""
    line = int(match["line"])
    return f"/ui/data?{urlencode({'file': name, 'from': max(1, line - BEFORE)})}#row-{line}"


class LocalFiles:
    """Files below `folder`. A name is compared with the listing: no other file can be asked for."""

    def __init__(self, folder: Path, runs: Path) -> None:
        self.folder, self._runs = folder, runs.absolute()

    def listing(self) -> JsonObject:
        """{files, models, more}: files of rows as {name, path, bytes, time}, newest first; folders of models
        and GGUF files by name; and a sentence on what is left out, or ""."""
        files: list[Any] = []
        models, num = [], 0
        for num, path in enumerate(self._walk(), start=1):
            if num > MOST_LOOKED_AT:
                break
            if path.name == "config.json" and any(path.parent.glob("tokenizer*")):
                models.append(path.parent)
            elif path.suffix == ".gguf":
                models.append(path)
            elif path.name.lower().endswith(ROWS) and not os.path.exists(path.parent / "config.json"):
                with contextlib.suppress(OSError, UnicodeError):  # gone, or a name that no address can hold
                    self._name(path).encode()
                    status = path.stat()
                    size, time = status.st_size, status.st_mtime
                    files.append({"name": self._name(path), "path": str(path), "bytes": size, "time": time})
        left_out = [f"the newest {MOST_LISTED:,} of {len(files):,} files of rows are listed"]
        left_out = left_out if len(files) > MOST_LISTED else []
        if num > MOST_LOOKED_AT:
            left_out.append(f"only {MOST_LOOKED_AT:,} files were looked at: start with --data and a smaller folder")
        newest = sorted(files, key=lambda file: -file["time"])[:MOST_LISTED]
        places = sorted(str(place) for place in models)[:MOST_LISTED]
        return {"files": newest, "models": places, "more": "; ".join(left_out)}

    def places(self) -> dict[str, str]:
        """Absolute path → name of each file of rows."""
        return {os.path.abspath(file["path"]): str(file["name"]) for file in self.listing()["files"]}

    def find(self, name: str) -> str:
        """The path of a file of rows by its name in the listing. Raises RequestError 404."""
        for file in self.listing()["files"]:
            if name in (file["name"], file["path"]):
                return str(file["path"])
        message = f"{name[:100]}: there is no such file in {self.folder}. Choose one from the list, or drop it here."
        raise RequestError(message, status=404, code="not_found", param="file")

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _walk(self) -> Iterator[Path]:
        for place, folders, names in os.walk(self.folder):
            depth = len(Path(place).relative_to(self.folder).parts)
            inside = [name for name in sorted(folders) if not name.startswith(".") and name not in SKIPPED]
            folders[:] = [name for name in inside if not self._is_runs(Path(place) / name)] if depth < DEPTH else []
            yield from (Path(place) / name for name in sorted(names) if not name.startswith("."))

    def _is_runs(self, path: Path) -> bool:
        return path.absolute() == self._runs or os.path.exists(path / "run.json")

    async def receive(self, name: str, request: Request) -> JsonObject:
        """Store the body of a request as a new file of that name; a name that is taken gets a number.

        Raises RequestError for a name that is not allowed, another kind of file, and a disk without room.
        """
        if not re.fullmatch(r"[^/\\\0-\x1f\x7f]{1,200}", name) or name.startswith("."):
            raise RequestError(f"{name[:100]!r}: is no name for a file.", param="name")
        if not name.lower().endswith(ROWS):
            raise RequestError(f"{name[:100]}: is not a file of rows. They end in {', '.join(ROWS)}.", param="name")
        room = min(MOST_UPLOADED, free_bytes(self.folder) - KEPT_FREE)
        if int(request.headers.get("content-length") or 0) > room:
            raise RequestError(f"{name}: the disk has no room for it.", status=507, code="storage")
        temporary = self.folder / f"{TEMPORARY}{os.getpid()}-{id(request):x}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                async for piece in request.stream():
                    room -= len(piece)
                    if room < 0:  # it came without its length
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    file.write(piece)
            path = self._link(temporary, name)
        except (OSError, StorageError) as error:
            message = f"{name}: could not be stored: {getattr(error, 'strerror', None) or error}."
            raise RequestError(message, status=507, code="storage") from error
        finally:
            temporary.unlink(missing_ok=True)
        return {"name": self._name(path), "path": str(path), "bytes": path.stat().st_size}

    def _link(self, temporary: Path, name: str) -> Path:
        """Give a complete file its name, or a numbered one if another file has it."""
        first, dot, rest = name.partition(".")
        for number in range(1, 1000):
            path = self.folder / (name if number == 1 else f"{first}-{number}{dot}{rest}")
            with contextlib.suppress(FileExistsError):
                path.open("xb").close()
                os.replace(temporary, path)  # a link is not known to every file system
                return path
        raise RequestError(f"{name}: a thousand files have this name. Rename it.", status=409, code="conflict")
