"""The folder of a store, where it and the database do not know the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.errors import InputError
from tunesmith.phrases import plural
from tunesmith.runs.atomic import fsync_dir, remove

DATABASE_FILE = "jobs.sqlite"
_CONTENTS = ("files", "parts", "runs")


def is_used(folder: Path) -> bool:
    """Whether it has contents or runs."""
    return any(next(folder.glob(f"{name}/*"), None) for name in _CONTENTS)


def lost(folder: Path, what: str) -> str:
    """Why a store cannot be used whose database does not know what is in its folder, and the ways out."""
    files, runs = (sum(1 for _ in folder.glob(f"{name}/[!.]*")) for name in ("files", "runs"))
    return (
        f"{folder}: {what}, but {plural(files, 'file')} and {plural(runs, 'run')} are here, which it does not know. "
        f"Put a copy of {DATABASE_FILE} back. If there is none, start a new store: --store {folder}-new. It leaves "
        f"this as it is: upload files again from {folder / 'files'}, and name runs by their paths in {folder / 'runs'}."
    )


def refuse_lost(folder: Path, database: Path) -> None:
    """Raises InputError where an empty database would be made for a folder that is used."""
    if is_used(folder) and not (database.exists() and database.stat().st_size):
        raise InputError(lost(folder, f"{DATABASE_FILE} is {'empty' if database.exists() else 'missing'}"))


def set_aside(folder: Path, unknown: Sequence[Path]) -> list[str]:
    """Move contents to unknown/; a line about it, if there are any."""
    if not unknown:
        return []
    place = folder / "unknown"
    place.mkdir(mode=0o700, exist_ok=True)
    for path in unknown:
        remove(place / path.name)
        path.replace(place / path.name)
    for changed in {place, *(path.parent for path in unknown)}:
        fsync_dir(changed)
    return [
        f"{plural(len(unknown), 'upload')} that no row of the database names: moved to {place}. A kill had "
        "interrupted it, or the database is an older copy. Delete there what nobody misses."
    ]
