"""tunesmith push"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.options import Json, Root, RunName, remember_json


def push(
    ctx: typer.Context,
    run: RunName,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name on the hub: owner/name.")],
    folder: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Exported folder (default: the run's export of --to).")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="TARGET", help="Export of the run; made if it does not exist.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make it public (default: private).")] = False,
    root: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """Upload an export to the Hugging Face hub. No other command uploads anything.

    tunesmith push last me/support-lora

    tunesmith push last me/support --to merged --public
    """
    remember_json(ctx, as_json)
    from dataclasses import asdict

    from tunesmith.cli.display import phases
    from tunesmith.cli.export import PHASES
    from tunesmith.cli.streams import console, json_line
    from tunesmith.export.export_run import export_run
    from tunesmith.export.push import push as upload
    from tunesmith.export.targets import default_folder
    from tunesmith.formatting import plural, size
    from tunesmith.runs.folder import Run

    found = Run.open(run, root)
    if folder is None:
        target = to or ("adapter" if found.adapter_path.exists() else "merged")
        folder = default_folder(found, target)
        if not folder.exists():
            with phases(console(stderr=True), PHASES) as progress:
                folder = export_run(found, target, on_progress=progress).path
    done = upload(folder, name, private=not public)
    if as_json:
        json_line({"kind": "push", "folder": str(folder), "name": name, "private": not public, **asdict(done)})
        return
    screen = console()
    if not done.is_proven:
        screen.print("note: it was exported with --no-verify, and its card says so", style="yellow")
    whose = "everybody can see it" if public else "only you can see it (--public shows it to all)"
    screen.print(f"{plural(done.num_files, 'file')}, {size(done.num_bytes)}, at {done.url}; {whose}")
