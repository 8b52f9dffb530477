"""tunesmith jobs and keys: fine-tuning jobs of a running server over HTTP, and the keys of its store"""

from __future__ import annotations

import json
import os
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import Json
from tunesmith.cli.render import print_table
from tunesmith.cli.serve import StorePlace, check_extra, open_store
from tunesmith.cli.streams import console, json_line
from tunesmith.errors import InputError, Stopped, TunesmithError
from tunesmith.phrases import visible
from tunesmith.summaries.words import age
from tunesmith.types import JsonObject

if TYPE_CHECKING:
    from urllib.error import HTTPError

    from tunesmith.jobs.store import Store


DEFAULT = "http://127.0.0.1:8000/v1"
TIMEOUT_S = 30.0
POLL_S = 1.0
PAGE, MOST_EVENTS = 100, 1000
ENDED_STATUS = ("succeeded", "failed", "cancelled")
JOB_COLUMNS = ("job", "status", "model", "method", "made", "fine-tuned model")

Job = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, or [bold]last[/].")]
Url = Annotated[
    str,
    typer.Option(
        "--url", metavar="URL", envvar="OPENAI_BASE_URL", help="Server; its key is read from TUNESMITH_API_KEY."
    ),
]


@dataclass(frozen=True)
class JobServerClient:
    """The server, as these commands ask it."""

    url: str

    def ask(self, method: str, path: str, **query: Any) -> Any:
        """The answer as JSON. Raises InputError for what is refused and a server that is not there."""
        import urllib.error  # these two take a tenth of the time of --help
        import urllib.request

        address = f"{self.url.rstrip('/')}/fine_tuning/jobs{path}?{urllib.parse.urlencode(query)}".rstrip("?")
        key = os.environ.get("TUNESMITH_API_KEY")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        try:
            request = urllib.request.Request(address, method=method, headers=headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise _refusal(error, address) from None
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            way = "Start one with `tunesmith serve --jobs MODEL`, or pass its address with --url."
            raise InputError(f"{self.url}: no server of jobs answers: {why}. {way}") from None

    def name(self, job: str) -> str:
        """The path of a job. Raises InputError if there is none yet."""
        if job == "last":
            newest = self.ask("GET", "", limit=1)["data"]
            if not newest:
                raise InputError(f"{self.url}: there are no jobs yet. docs/guide/jobs.md shows how a script makes one.")
            job = newest[0]["id"]
        return f"/{urllib.parse.quote(job, safe='')}"

    def new_events(self, path: str, seen: set[str]) -> list[JsonObject]:
        """Events that `seen` lacks, which gets them, oldest first; of a long job first the last thousand."""
        fresh: list[JsonObject] = []
        query: dict[str, Any] = {"limit": PAGE if seen else MOST_EVENTS}
        while True:
            page = self.ask("GET", f"{path}/events", **query)
            new = [event for event in page["data"] if event["id"] not in seen]
            fresh += new
            if not seen or len(new) < len(page["data"]) or not page["has_more"]:
                break
            query["after"] = new[-1]["id"]
        seen.update(event["id"] for event in fresh)
        return fresh[::-1]


def _refusal(error: HTTPError, address: str) -> TunesmithError:
    try:
        message = str(json.load(error)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        message = f"{address}: {error.code} {error.reason}, and no answer of a server of jobs."
    return TunesmithError(message) if error.code >= 500 else InputError(message)


def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=PAGE, help="Most jobs.")] = 20,
    url: Url = DEFAULT,
    as_json: Json = False,
) -> None:
    """List jobs, newest first.

    tunesmith jobs list --url http://trainer:8000/v1
    """
    listed = JobServerClient(url).ask("GET", "", limit=limit)["data"]
    if as_json:
        json_line(listed)
        return
    if listed or not console().is_terminal:
        print_table(console(), JOB_COLUMNS, map(_cells, listed))
    else:
        console().print("no jobs yet")


def _cells(job: JsonObject) -> tuple[str, ...]:
    made = age(max(0.0, time.time() - job["created_at"]))
    return (job["id"], job["status"], job["model"], job["method"]["type"], made, job["fine_tuned_model"] or "–")


def show(job: Job = "last", url: Url = DEFAULT, as_json: Json = False) -> None:
    """Show a job: its state, numbers, files, checkpoints and newest events.

    tunesmith jobs show ftjob-8Hd2...
    """
    client = JobServerClient(url)
    path = client.name(job)
    facts = client.ask("GET", path)
    checkpoints = client.ask("GET", f"{path}/checkpoints")["data"]
    if as_json:
        json_line({**facts, "checkpoints": checkpoints})
        return
    screen = console()
    for line in (*_facts(facts, checkpoints), *map(_line, client.ask("GET", f"{path}/events", limit=10)["data"][::-1])):
        screen.print(visible(line), soft_wrap=True)


_MEASURES = ("valid_loss", "full_valid_mean_reward", "train_mean_reward")
"""Metrics of a checkpoint, of which the first that it has is shown; else its training loss."""


def _facts(job: JsonObject, checkpoints: list[JsonObject]) -> Iterator[str]:
    kind = job["method"]["type"]
    numbers = ", ".join(f"{key} {value}" for key, value in job["method"][kind]["hyperparameters"].items())
    yield f"{job['id']}: {job['status']}"
    yield f"{kind} on {job['tunesmith']['base']}: {numbers}, seed {job['seed']}"
    measured = f", measured on {job['validation_file']}" if job["validation_file"] else ""
    yield f"trained on {job['training_file']}{measured}"
    if job["error"] and job["error"]["message"]:
        yield f"{job['error']['code']}: {job['error']['message']}"
    if job["fine_tuned_model"]:
        yield f"model {job['fine_tuned_model']}, {job['trained_tokens']:,} tokens, results {job['result_files'][0]}"
    for checkpoint in checkpoints:
        metrics = checkpoint["metrics"]
        key = next((key for key in _MEASURES if key in metrics), "train_loss")
        measured = f"{key.rpartition('_')[2]} {metrics.get(key)}"
        yield f"step {checkpoint['step_number']}: {checkpoint['fine_tuned_model_checkpoint']}, {measured}"


def _line(event: JsonObject) -> str:
    mark = "" if event["level"] == "info" else f"{event['level']}: "
    return f"{time.strftime('%H:%M:%S', time.localtime(event['created_at']))} {mark}{event['message']}"


def follow(job: Job = "last", url: Url = DEFAULT, as_json: Json = False) -> None:
    """Print the events of a job until it ends. Exit code 0 if it succeeded, 3 if it is paused, else 1.

    tunesmith jobs follow last
    """
    client, seen, screen = JobServerClient(url), set[str](), console()
    path = client.name(job)
    while True:
        state = client.ask("GET", path)
        for event in client.new_events(path, seen):
            if as_json:
                json_line(event)
            else:
                screen.print(visible(_line(event)), soft_wrap=True)
        if state["status"] == "paused":
            raise Stopped(f"{state['id']}: paused; go on with: tunesmith jobs resume {state['id']}")
        if state["status"] in ENDED_STATUS:
            break
        time.sleep(POLL_S)
    if state["status"] != "succeeded":
        why = f": {state['error']['message']}" if state["error"] and state["error"]["message"] else "."
        raise TunesmithError(f"{state['id']}: {state['status']}{why}")


def _act(job: str, action: str, url: str, *, as_json: bool) -> None:
    client = JobServerClient(url)
    answer = client.ask("POST", f"{client.name(job)}/{action}")
    if as_json:
        json_line(answer)
    else:
        console().print(visible(f"{answer['id']}: {answer['status']}"), soft_wrap=True)


def cancel(job: Job, url: Url = DEFAULT, as_json: Json = False) -> None:
    """Cancel a job for good. Its run stops after its step; checkpoints that it made stay.

    tunesmith jobs cancel ftjob-8Hd2...
    """
    _act(job, "cancel", url, as_json=as_json)


def pause(job: Job, url: Url = DEFAULT, as_json: Json = False) -> None:
    """Pause a job. Its run stops after its step, and the next job may begin.

    tunesmith jobs pause last
    """
    _act(job, "pause", url, as_json=as_json)


def resume(job: Job, url: Url = DEFAULT, as_json: Json = False) -> None:
    """Let a paused job go on where it stopped, with the same result.

    tunesmith jobs resume last
    """
    _act(job, "resume", url, as_json=as_json)


def jobs(ctx: typer.Context) -> None:
    """List, show, follow and steer fine-tuning jobs of a running server (`tunesmith serve --jobs`).

    tunesmith jobs list

    tunesmith jobs follow last
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


Project = Annotated[str, typer.Option(metavar="NAME", help="What the key belongs to: letters a-z, digits and -.")]
Scopes = Annotated[
    list[str] | None,
    typer.Option("--scope", metavar="SCOPE", help="What it may do (default: admin, which is all). Repeatable."),
]
Days = Annotated[float | None, typer.Option(min=0.01, metavar="N", help="Time until it ends (default: never).")]
Label = Annotated[str, typer.Option(metavar="TEXT", help="Who or what has it.")]
KeyName = Annotated[str, typer.Argument(metavar="KEY", help="The key's id, as `keys list` shows it.")]
KEY_COLUMNS = ("id", "project", "state", "scopes", "created_at", "expires_at", "used_at", "label")


def _open(place: str, *, is_new: bool = False) -> Store:
    """The store, also while a server works on it. Raises InputError where none is, unless it may be a new
    one."""
    check_extra("jobs")
    if not is_new and "://" not in place and not Path(place).is_dir():
        raise InputError(f"--store {place}: there is no store. Name the folder that `tunesmith serve --jobs` uses.")
    return open_store(place, is_server=False)


def make_key(
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
    with closing(_open(store, is_new=True)) as opened:
        from tunesmith.jobs.access import create_key

        row, key = create_key(opened, project=project, scopes=scope or (), days=days, label=label)
    if as_json:
        json_line({**_shown(row), "key": key})
    else:
        typer.echo(key)
        typer.echo(f"{row['id']}, project {project}: {', '.join(row['scopes'])}. It is not shown again.", err=True)


def list_keys(store: StorePlace = "jobs", as_json: Json = False) -> None:
    """List keys, newest first, without the keys themselves."""
    with closing(_open(store)) as opened:
        rows = [_shown(row) for row in reversed(opened.keys().values())]
    if as_json:
        json_line(rows)
    else:
        print_table(console(), KEY_COLUMNS, [[_cell(name, row[name]) for name in KEY_COLUMNS] for row in rows])


def end_key(key: KeyName, store: StorePlace = "jobs", as_json: Json = False) -> None:
    """End a key, also of a server that runs, within a second."""
    with closing(_open(store)) as opened:
        from tunesmith.jobs.access import revoke_key

        revoke_key(opened, key)
    if as_json:
        json_line({"id": key, "state": "revoked"})
    typer.echo(f"{key}: revoked", err=as_json)


def _shown(row: Any) -> JsonObject:
    from tunesmith.jobs.access import state_of

    return {**{name: row[name] for name in KEY_COLUMNS if name != "state"}, "state": state_of(row)}


def _cell(name: str, value: Any) -> str:
    if name.endswith("_at"):
        return "-" if value is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(value))
    return ",".join(value) if isinstance(value, list) else value or "-"
