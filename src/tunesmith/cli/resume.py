"""tunesmith resume"""

from __future__ import annotations

import os
from pathlib import Path

import typer

from tunesmith.cli.options import BaseAt, Json, Offline, Quiet, Root, RunName, Settings, Track, remember_json
from tunesmith.errors import RunError


def resume(
    ctx: typer.Context,
    run: RunName,
    settings: Settings = None,
    model: BaseAt = None,
    track: Track = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a run that was stopped, failed or killed, with the same result as if it had not been.

    tunesmith resume runs/support-3f2a

    tunesmith resume last --track mlflow    (those of the recipe continue by themselves; --track none: without any)

    tunesmith resume last --set train.tokens_per_pass=512 --set train.checkpointed_layers=30
    """
    remember_json(ctx, as_json)
    from tunesmith.cli.display import run_display
    from tunesmith.cli.export import make_planned
    from tunesmith.cli.train import launch_ranks
    from tunesmith.parallel.world import place_of
    from tunesmith.recipe import load
    from tunesmith.runs.folder import Run
    from tunesmith.tracking.sender import tracked

    found = Run.open(run, root, base=model)
    try:
        earlier = list(found.events())
    except RunError:  # a damaged log, which training.resume puts right or refuses
        earlier = []
    recipe = load.load(str(found.recipe_path), settings or [])
    alone = recipe.model_copy(update={"devices": 1}) if recipe.devices == "auto" else recipe  # of an earlier version
    launch_ranks(alone)
    first = place_of(os.environ).rank == 0
    trackers = [*found.recipe().track, *(track or [])] if first else []
    with (
        run_display(as_json=as_json and first, quiet=quiet or not first, follows=not first, earlier=earlier) as display,
        tracked(trackers, offline=offline, say=display.tracked) as on_run,
    ):
        from tunesmith.training import trainer as training

        done = training.resume(found, settings=settings or [], offline=offline, listener=display.listener(on_run))
        if first:
            display.done(done)
            make_planned(done, as_json=as_json)
