"""tunesmith keys create, list, revoke"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import Json, remember_json
from tunesmith.cli.serve import StorePlace
from tunesmith.errors import InputError

if TYPE_CHECKING:
    from tunesmith.jobs.store import Store

Project = Annotated[str, typer.Option(metavar="NAME", help="What the key's requests belong to; [a-z0-9-].")]
Scopes = Annotated[
    list[str] | None,
    typer.Option("--scope", metavar="SCOPE", help="What it may do (default: admin, which is all). Repeatable."),
]
Days = Annotated[float | None, typer.Option(min=0.01, metavar="N", help="Time until it ends (default: never).")]
Label = Annotated[str, typer.Option(metavar="TEXT", help="Who or what has it.")]
KeyName = Annotated[str, typer.Argument(metavar="KEY", help="The key's id, as `keys list` shows it.")]
COLUMNS = ("id", "project", "state", "scopes", "created_at", "expires_at", "used_at", "label")


def _open(place: str, *, is_new: bool = False) -> Store:
    """The store, also while a server works on it. Raises InputError where none is, unless it may be a new one."""
    from tunesmith.cli.server import JobPlace, import_jobs

    import_jobs()
    if not is_new and "://" not in place and not Path(place).is_dir():
        raise InputError(f"--store {place}: there is no store. Name the folder that `tunesmith serve --jobs` uses.")
    return JobPlace(place, None).open(lambda text: None, is_server=False)


def create(
    ctx: typer.Context,
    project: Project = "tunesmith",
    scope: Scopes = None,
    days: Days = None,
    label: Label = "",
    store: StorePlace = "jobs",
    as_json: Json = False,
) -> None:
    """Make a key for a server of jobs. It is printed once and kept nowhere.

    tunesmith keys create --project support --scope jobs.write --scope files.write --days 90
    """
    remember_json(ctx, as_json)
    opened = _open(store, is_new=True)
    from tunesmith.jobs.access import create_key

    try:
        row, key = create_key(opened, project=project, scopes=scope or (), days=days, label=label)
    finally:
        opened.close()
    if as_json:
        from tunesmith.cli.streams import json_page

        typer.echo(json_page({**_shown(row), "key": key}))
    else:
        typer.echo(key)
        typer.echo(f"{row['id']}, project {project}: {', '.join(row['scopes'])}. It is not shown again.", err=True)


def listed(ctx: typer.Context, store: StorePlace = "jobs", as_json: Json = False) -> None:
    """List keys, newest first, without the keys themselves."""
    remember_json(ctx, as_json)
    opened = _open(store)
    from tunesmith.cli.streams import json_page
    from tunesmith.jobs.tables import keys

    try:
        rows = [_shown(row) for row in opened.page(keys, limit=100_000)[0]]
    finally:
        opened.close()
    if as_json:
        typer.echo(json_page(rows))
        return
    typer.echo("\t".join(COLUMNS))
    for row in rows:
        typer.echo("\t".join(_cell(name, row[name]) for name in COLUMNS))


def revoke(ctx: typer.Context, key: KeyName, store: StorePlace = "jobs", as_json: Json = False) -> None:
    """End a key at once, also of a server that runs."""
    remember_json(ctx, as_json)
    opened = _open(store)
    from tunesmith.jobs.access import revoke_key

    try:
        revoke_key(opened, key)
    finally:
        opened.close()
    typer.echo(f"{key}: revoked", err=as_json)


def _shown(row: Any) -> dict[str, Any]:
    from tunesmith.jobs.access import state_of

    return {**{name: row[name] for name in COLUMNS if name != "state"}, "state": state_of(row)}


def _cell(name: str, value: Any) -> str:
    from tunesmith.cli.render import visible

    if name.endswith("_at"):
        return "-" if value is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(value))
    return ",".join(value) if isinstance(value, list) else visible(value) or "-"
