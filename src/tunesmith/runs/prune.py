"""Removal of runs, and of the parts of finished runs that are not needed any more.

Nothing outside a run folder is touched, nothing of a run under way, and nothing that another run of the same
folder of runs starts from. What goes is renamed first, so that an interrupted removal leaves no half of it
under its name.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import InputError, RunError
from tunesmith.phrases import listed
from tunesmith.recipe.origin import typed_places
from tunesmith.runs.atomic import TEMPORARY, clean, remove, storing
from tunesmith.runs.folder import Run, made_from, runs

STORE_MARK = "store-id"
"""Name of a file in the folder of a job server, whose runs are in `runs/` next to it."""
REMOVED = "removed"
"""Name of what is being removed, of which an interrupted removal leaves the rest."""


@dataclass(frozen=True, slots=True)
class Removable:
    """A run's folder, or a part of it, that can go."""

    run: Run
    path: Path
    reason: str
    num_bytes: int
    """Bytes that its removal frees: a file that has another name elsewhere on the disk counts nothing."""


def removable(chosen: Sequence[Run], *, whole: bool) -> tuple[list[Removable], list[str]]:
    """The folders of runs (`whole`; they may start from each other), or the parts of finished runs that can go,
    and why others stay.

    Raises RunError for a run that is under way or a job server's, and with parts for one that is not done: it
    resumes from them.
    """
    doomed: list[Removable] = []
    notes: list[str] = []
    others = {other: _made_from(other) for root in {run.path.parent for run in chosen} for other in runs(root)}
    going = {run.path.resolve() for run in chosen} if whole else set()
    for run in chosen:
        if (run.path.resolve().parent.parent / STORE_MARK).exists():
            way = "The server removes it by keep_runs_days in the file of --bases, when no model of it is left"
            raise RunError(f"{run.path}: belongs to a job of `tunesmith serve --jobs`, which reads it. {way}.")
        if run.is_locked():
            raise RunError(f"{run.path}: a process works on it. Stop it first.")
        if not whole and run.state() != "done":
            way = "only finished runs are pruned. `tunesmith runs rm` removes it"
            raise RunError(f"{run.path.name}: it is {run.state()}, and {way}.")
        for path, reason in ({run.path: run.state()} if whole else _parts(run, notes)).items():
            users = {
                other.path.name for other, places in others.items()
                if other.path.resolve() not in going | {run.path.resolve()}
                and any(place.is_relative_to(path.resolve()) for place in places)
            }  # fmt: skip
            name = path.relative_to(run.path.parent)
            if path.is_symlink():
                notes.append(f"{name} stays: it is a link to {os.readlink(path)}")
            elif users:
                notes.append(f"{name} stays: {listed(sorted(users))} starts from it")
            else:
                doomed.append(Removable(run, path, reason, freed_bytes(path)))
    return doomed, notes


def _parts(run: Run, notes: list[str]) -> dict[Path, str]:
    """Checkpoints, and exports if the result and the base that they were made from are there."""
    place, folder = run.recipe().place, run.path / "exports"
    exports = [path for path in sorted(folder.glob("[!.]*")) if not folder.is_symlink()] + [run.merged_path]
    reasons = {run.checkpoints_path: "checkpoints of a finished run"}
    is_hub_id = not place.startswith((".", "/", "~")) and place.count("/") == 1 and not place.endswith(".gguf")
    if run.model_path.is_dir() or is_hub_id or Path(place).expanduser().exists():
        reasons |= dict.fromkeys(exports, "made anew by `tunesmith export`, or when a run starts from this one")
    else:
        notes.append(f"{run.path.name}: its exports stay: {place}, which they are made from, is not there")
    return {path: reason for path, reason in reasons.items() if path.is_dir()}


def remove_removable(part: Removable) -> None:
    """Remove a run or a part of it; under its name it is there whole or not at all. Raises RunError if a
    process works on the run."""
    root = part.run.path.parent
    clean(root, name=REMOVED)
    doomed = root / f"{TEMPORARY}{REMOVED}-{secrets.token_hex(4)}"
    with storing(part.path):
        with part.run.lock() if os.name != "nt" else nullcontext():  # Windows renames no folder in use
            os.rename(part.path, doomed)
        remove(doomed)


def freed_bytes(folder: Path) -> int:
    """Bytes that removing a folder frees: its files that have no other name. Links are not followed."""
    files = (os.lstat(os.path.join(here, name)) for here, _, names in os.walk(folder) for name in names)
    return sum(status.st_size for status in files if status.st_nlink == 1)


def _made_from(run: Run) -> list[Path]:
    try:
        places = [at for _, at in typed_places(run.recipe())]
    except InputError:  # a recipe that cannot be read: by what was recorded when it was made
        places = list(made_from(run).values())
    return [Path(place).expanduser().resolve() for place in places]
