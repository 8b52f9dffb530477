"""A run from its recipe to its exports: the one way in which runs are trained and resumed.

    several devices? ─▶ a process for each, which comes here again
    card ─▶ watcher ─▶ exports refused? ─▶ trackers ─▶ trainer.train or .resume ─▶ exports

The command line and `api` call it; sweeps, jobs and Ray's workers start one of these. Callers differ in two
things only: their `Watcher`, and how they start the processes of several devices (`Several`). It imports no
torch before the card is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.parallel.launch import devices_of
from tunesmith.parallel.own_card import take_card
from tunesmith.parallel.world import place_of
from tunesmith.phrases import plural
from tunesmith.recipe.load import load
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.folder import Run, refuse_done, refuse_taken
from tunesmith.trackers.sender import Say, tracked
from tunesmith.types import OnProgress

if TYPE_CHECKING:
    from tunesmith.export.export_run import Exported
    from tunesmith.training.progress import Listener

OnRun = Callable[[Run], None]


@dataclass(frozen=True)
class Watcher:
    """Callbacks that follow a run, from its first event to its last export."""

    listener: Callable[[OnRun], Listener]
    """Takes a callback and returns the listener of the run, whose `on_run` also calls that callback."""
    tracked: Say
    """Gets whether a tracker has all that was sent to it, and a line."""
    say: Callable[[str], None]
    """Receives a line for each thing that was done besides training."""
    exported: Callable[[Exported], None]
    export_note: Callable[[str], None]
    """Receives each note on an export while it is made."""
    export_progress: Callable[[], AbstractContextManager[OnProgress]]
    done: Callable[[Run], None] = lambda run: None
    """Called with the finished run, before its exports are made."""


OpenWatcher = Callable[[bool], AbstractContextManager[Watcher]]
"""Opens the watcher of this process; called with False on every rank but the first, which receives no event."""
Several = Callable[[int], Run]
"""Runs the same job in one process for each device, and returns its run."""


def train_run(
    recipe: Recipe, *, watch: OpenWatcher, several: Several, root: Path, out: Path | None = None, offline: bool = False
) -> Run:
    """Train a recipe, send its events to its trackers, and make its exports. Returns the finished run.

    Raises:
        InputError: recipe, data, model, a tracker or an export cannot be used; no run folder was made.
        And whatever `trainer.train` and an export raise.
    """
    if place_of(os.environ).size == 1:
        refuse_taken(out)  # before torch is imported; of a group its first rank looks
    if (devices := devices_of(recipe)) > 1:
        return several(devices)
    is_first = _take_part(recipe.device)
    with watch(is_first) as watcher:
        if is_first and recipe.export.to:
            from tunesmith.export.export_run import refuse_planned

            refuse_planned(recipe, offline=offline)
        with tracked(recipe.track if is_first else (), offline=offline, say=watcher.tracked) as on_run:
            from tunesmith.training import trainer

            run = trainer.train(recipe, root=root, out=out, offline=offline, listener=watcher.listener(on_run))
            return _finish(run, watcher) if is_first else run


def resume_run(
    run: Run,
    *,
    watch: OpenWatcher,
    several: Several,
    settings: Sequence[str] = (),
    trackers: Sequence[str] = (),
    offline: bool = False,
) -> Run:
    """Continue a run: train the rest, send it to these trackers and to its recipe's, and make its exports. A
    run that is done gets the exports that it lacks.

    Raises:
        RunError: the run is done with all its exports, or cannot go on.
        And whatever `trainer.resume` and an export raise.
    """
    is_alone = place_of(os.environ).size == 1  # ranks would all make the same exports
    if is_alone and run.state() == "done" and _missing_exports(run):
        with watch(True) as watcher:
            made = plural(len(_make_exports(run, watcher)), "export")
            unused_options = {"--track (see `tunesmith track`)": trackers, "--set": settings}
            unused = " and ".join(option for option, words in unused_options.items() if words)
            ignored = f". {unused} had no effect" if unused else ""
            watcher.say(f"{run.path}: it was done except for {made}, made now{ignored}")
        return run
    if is_alone:
        refuse_done(run)
    recipe = load(str(run.recipe_path), settings)
    if (devices := devices_of(recipe)) > 1:
        return several(devices)
    is_first = _take_part(recipe.device)
    of_recipe = run.recipe().track if is_first else ()
    with (
        watch(is_first) as watcher,
        tracked(trackers if is_first else (), offline=offline, say=watcher.tracked, optional=of_recipe) as on_run,
    ):
        from tunesmith.training import trainer

        done = trainer.resume(run, settings=settings, offline=offline, listener=watcher.listener(on_run))
        return _finish(done, watcher) if is_first else done


def _take_part(device: str) -> bool:
    """Take the card of this process, before an import can list cards. Returns whether this process is the first
    of its group."""
    place = place_of(os.environ)
    take_card(place, device, os.environ)
    return place.rank == 0


def _finish(run: Run, watcher: Watcher) -> Run:
    watcher.done(run)
    _make_exports(run, watcher)
    return run


def _missing_exports(run: Run) -> list[str]:
    return [word for word in run.recipe().export.to if not run.export_path(word).exists()]


def _make_exports(run: Run, watcher: Watcher) -> list[str]:
    """Make the exports of a finished run's recipe that are not there, and return them."""
    missing = _missing_exports(run)
    for word in missing:
        from tunesmith.export.export_run import export_planned

        with watcher.export_progress() as on_progress:
            done = export_planned(run, word, on_progress=on_progress, on_note=watcher.export_note)
        watcher.exported(done)
    return missing
