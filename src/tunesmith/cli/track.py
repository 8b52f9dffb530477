"""tunesmith track"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.options import Json, Offline, Root, RunName, remember_json

POLL_S = 0.5


def track(
    ctx: typer.Context,
    run: RunName,
    to: Annotated[
        list[str], typer.Option("--to", metavar="TRACKER", help="tensorboard, wandb, mlflow or trackio. Repeatable.")
    ],
    follow: Annotated[bool, typer.Option("--follow", help="Keep sending until the run ends.")] = False,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Send a run that is done or under way to an experiment tracker: what it does not have yet, and nothing twice.

    tunesmith track last --to mlflow

    tunesmith track runs/support-3f2a --to wandb --follow
    """
    remember_json(ctx, as_json)
    from tunesmith.cli.streams import console, json_line
    from tunesmith.errors import InputError, TunesmithError
    from tunesmith.runs.folder import Run
    from tunesmith.tracking.sender import SenderProcess, read_state, state_path
    from tunesmith.tracking.tracker import check_names

    names = check_names(to)
    if not names:
        raise InputError("--to: none: names no tracker. Give tensorboard, wandb, mlflow or trackio.")
    found = Run.open(run, root)
    screen = console(stderr=as_json)
    failed = []
    for name in names:
        if read_state(found, name).get("done"):
            place, path = read_state(found, name)["place"], state_path(found, name)
            screen.print(f"{name} has everything: {place}. To send all again, remove {path}.", soft_wrap=True)
            continue
        process = SenderProcess(name, offline=offline)
        try:
            process.wait_ready()
            process.begin(found)
            with screen.status(f"sending {found.path.name} to {name}"):
                while follow and found.state() in ("new", "running"):
                    time.sleep(POLL_S)
                is_sent, line = process.finish(None)
        finally:
            process.kill()
        screen.print(line, soft_wrap=True)
        failed += [] if is_sent else [line]
        if as_json:
            json_line({"kind": "track", "tracker": name, "sent": is_sent, **read_state(found, name)})
    if failed:
        raise TunesmithError("\n".join(failed))
