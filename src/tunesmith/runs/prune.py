"""Removal of runs, and of the parts of finished runs that are not needed any more.

Nothing outside a run folder is touched, nothing of a run under way, and nothing that another run of the same folder of
runs starts from. What goes is renamed first, so that an interrupted removal leaves no half of it under its name.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import InputError, RunError
from tunesmith.phrases import listed
from tunesmith.recipe.origin import typed_places
from tunesmith.runs.atomic import TEMPORARY, clean, remove, storing
from tunesmith.runs.folder import Run, made_from, runs

REMOVED = "removed"
"""Name of what is being removed, of which an interrupted removal leaves the rest."""


@dataclass(frozen=True, slots=True)
class Removable:
    """A run's folder, or a part of it, that can go."""

    run: Run
    path: Path
    reason: str
    num_bytes: int
    """What its removal frees: a file that has another name elsewhere on the disk counts nothing."""


def prunable(run: Run) -> tuple[list[Removable], list[str]]:
    """The parts of a finished run that can go, and why others stay.

    Raises RunError for a run that is not done: its checkpoints are what it resumes from.
    """
    state = run.state()
    if state != "done":
        raise RunError(
            f"{run.path.name}: it is {state}, and only finished runs are pruned. `tunesmith runs rm` removes it."
        )
    used = list(_used_places(run, runs(run.path.parent)))
    found: list[Removable] = []
    kept: list[str] = []
    for path, reason in {run.checkpoints_path: "checkpoints of a finished run", **_exports(run, kept)}.items():
        if path.is_symlink() or not path.is_dir():
            continue
        if users := sorted({other for place, other in used if place.is_relative_to(path.resolve())}):
            kept.append(f"{path.relative_to(run.path)} stays: {listed(users)} starts from it")
        else:
            found.append(Removable(run, path, reason, freed_bytes(path)))
    return found, kept


def _exports(run: Run, kept: list[str]) -> dict[Path, str]:
    """The exports of a run, where the result and the base that they were made from are there."""
    folder = run.path / "exports"
    made = [*(sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ())]
    found = {path: "an export, made anew by `tunesmith export`" for path in made if not path.name.startswith(".")}
    if run.merged_path.is_dir():
        found[run.merged_path] = "base and adapter as one, made anew when a run starts from this one"
    place = run.recipe().place
    is_hub_id = not place.startswith((".", "/", "~")) and place.count("/") == 1 and not place.endswith(".gguf")
    has_base = run.adapter_path.is_dir() and (Path(place).expanduser().exists() or is_hub_id)
    if found and not (run.model_path.is_dir() or has_base):
        kept.append(f"its exports stay: {place}, which they are made from, is not there")
        return {}
    return found


def removable(chosen: Sequence[Run]) -> list[Removable]:
    """The folders of these runs, which may start from each other.

    Raises RunError for one that cannot be removed: under way, a link, or one that another run starts from.
    """
    together = {run.path.resolve() for run in chosen}
    for run in chosen:
        if run.path.is_symlink():
            raise RunError(
                f"{run.path}: a link to {os.readlink(run.path)}: only folders of runs are removed. Remove the link."
            )
        if run.is_locked():
            raise RunError(f"{run.path}: a process works on it. Stop it first.")
        others = [other for other in runs(run.path.parent) if other.path.resolve() not in together]
        if users := sorted({other for _, other in _used_places(run, others)}):
            raise RunError(f"{run.path.name}: {listed(users)} starts from it. Remove that too, or keep both.")
    return [Removable(run, run.path, run.state(), freed_bytes(run.path)) for run in chosen]


def remove_removable(part: Removable) -> None:
    """Remove a run or a part of it; under its name it is there whole or not at all. Raises RunError if a process works
    on the run."""
    run = part.run
    if part.path != run.path:
        with run.lock(), storing(part.path):
            remove(part.path)
        return
    clean(run.path.parent, name=REMOVED)
    doomed = run.path.with_name(f"{TEMPORARY}{REMOVED}-{secrets.token_hex(4)}")
    with storing(run.path):
        with run.lock():
            if os.name != "nt":  # which renames no folder that holds an open file
                os.rename(run.path, doomed)
        if os.name == "nt":
            os.rename(run.path, doomed)
        shutil.rmtree(doomed)


def freed_bytes(folder: Path) -> int:
    """Bytes that removing a folder frees: those of files that have no other name. Links are not followed."""
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(here, name))
            total += status.st_size if status.st_nlink == 1 else 0
    return total


def _used_places(run: Run, others: Sequence[Run]) -> Iterator[tuple[Path, str]]:
    """Places inside a run that other runs were made from, each with the name of that run."""
    here = run.path.resolve()
    for other in others:
        if other.path.resolve() == here:
            continue
        try:
            places = [at for _, at in typed_places(other.recipe())]
        except InputError:  # a recipe that cannot be read: by what was recorded when it was made
            places = list(map(str, made_from(other).values()))
        resolved = (Path(place).expanduser().resolve() for place in places)
        yield from ((place, other.path.name) for place in resolved if place.is_relative_to(here))
