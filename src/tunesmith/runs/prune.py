"""Removal of runs, and of the parts of finished runs that are not needed any more.

Nothing outside a run folder is touched, nothing of a run under way, and nothing that another run of the same folder of
runs starts from. What goes is renamed first, so that an interrupted removal leaves no half of it under its name.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import InputError, RunError
from tunesmith.phrases import listed
from tunesmith.recipe.origin import typed_places
from tunesmith.runs.atomic import TEMPORARY, clean, remove, storing
from tunesmith.runs.folder import Run, made_from, runs

REMOVED = "removed"
"""Name of what is being removed, of which an interrupted removal leaves the rest."""
EXPORTS, MERGED = "exports", "merged"


@dataclass(frozen=True, slots=True)
class Prunable:
    """A folder of a run that can go."""

    path: Path
    reason: str
    num_bytes: int
    """What its removal frees: a file that has another name elsewhere on the disk counts nothing."""


def prunable(run: Run) -> tuple[list[Prunable], list[str]]:
    """The parts of a finished run that can go, and why others stay.

    Raises RunError for a run that is not done: its checkpoints are what it resumes from.
    """
    state = run.state()
    if state != "done":
        raise RunError(
            f"{run.path.name}: it is {state}, and only finished runs are pruned. `tunesmith runs rm` removes it."
        )
    used = list(_used_places(run, others=runs(run.path.parent)))
    found: list[Prunable] = []
    kept: list[str] = []
    reasons = {run.checkpoints_path: "checkpoints of a finished run", **_exports(run, kept)}
    for path, reason in reasons.items():
        if path.is_symlink() or not path.is_dir():
            continue
        if users := sorted({other.path.name for place, other in used if _is_within(place, path)}):
            kept.append(f"{path.relative_to(run.path)} stays: {listed(users)} starts from it")
        else:
            found.append(Prunable(path, reason, freed_bytes(path)))
    return found, kept


def _exports(run: Run, kept: list[str]) -> dict[Path, str]:
    """The exports of a run, where the result and the base that they were made from are there."""
    folder = run.path / EXPORTS
    made = [*(sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ())]
    found = {path: "an export, made anew by `tunesmith export`" for path in made if not path.name.startswith(".")}
    if (run.path / MERGED).is_dir():
        found[run.path / MERGED] = "base and adapter as one, made anew when a run starts from this one"
    place = run.recipe().place
    is_hub_id = not place.startswith((".", "/", "~")) and place.count("/") == 1 and not place.endswith(".gguf")
    has_base = run.model_path.is_dir() or Path(place).expanduser().exists() or is_hub_id
    if found and not (has_base and (run.model_path.is_dir() or run.adapter_path.is_dir())):
        kept.append(f"its exports stay: {place}, which they are made from, is not there")
        return {}
    return found


def refuse_used(chosen: Sequence[Run]) -> None:
    """Raise RunError for runs that cannot be removed: one under way, a link, or one that another run starts from.

    Runs that are removed together may start from each other.
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
        if users := sorted({other.path.name for _, other in _used_places(run, others=others)}):
            raise RunError(f"{run.path.name}: {listed(users)} starts from it. Remove that too, or keep both.")


def remove_run(run: Run) -> None:
    """Remove a run folder; under its name it is there whole or not at all. Raises RunError if a process works on it."""
    clean(run.path.parent, name=REMOVED)
    doomed = run.path.with_name(f"{TEMPORARY}{REMOVED}-{secrets.token_hex(4)}")
    with storing(run.path):
        with ExitStack() as held:
            held.enter_context(run.lock())
            if os.name != "nt":  # which renames no folder that holds an open file
                os.rename(run.path, doomed)
        if os.name == "nt":
            os.rename(run.path, doomed)
        shutil.rmtree(doomed)


def remove_parts(run: Run, parts: Sequence[Prunable]) -> None:
    """Remove parts of a run, each whole. Raises RunError if a process works on it."""
    with run.lock():
        for part in parts:
            with storing(part.path):
                remove(part.path)


def freed_bytes(folder: Path) -> int:
    """Bytes that removing a folder frees: those of files that have no other name. Links are not followed."""
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(here, name))
            total += status.st_size if status.st_nlink == 1 else 0
    return total


def _used_places(run: Run, *, others: Sequence[Run]) -> Iterator[tuple[Path, Run]]:
    """Places inside a run that other runs were made from, each with that run."""
    for other in others:
        if other.path.resolve() == run.path.resolve():
            continue
        try:
            places = [at for _, at in typed_places(other.recipe())]
        except InputError:  # a recipe that cannot be read: by what was recorded when it was made
            places = list(map(str, made_from(other).values()))
        for place in places:
            path = Path(place).expanduser()
            if _is_within(path, run.path):
                yield path, other


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
