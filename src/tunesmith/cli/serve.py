"""tunesmith serve: the command, a server from its start to its end, and its output"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from tunesmith.cli.options import BaseAt, Json, Offline, Quiet, Root, named, refuse_missing
from tunesmith.cli.signals import stopping_on_signals
from tunesmith.cli.streams import console, json_line
from tunesmith.environment.packages import install_command
from tunesmith.errors import InputError
from tunesmith.phrases import one_line, plural, visible
from tunesmith.runs.folder import is_run
from tunesmith.serve.protocol import Engine, EngineOptions, ModelCard
from tunesmith.types import Record

if TYPE_CHECKING:
    from fastapi import APIRouter

    from tunesmith.jobs.bases import Bases
    from tunesmith.jobs.store import Store
    from tunesmith.serve.http import BoundSocket
    from tunesmith.serve.middleware import AccessPolicy, RequestLog

LOOPBACK = "127.0.0.1"

Targets = Annotated[
    list[str] | None,
    typer.Argument(metavar="RUN|MODEL...", help="Runs of one base, or a model; each is served by its name."),
]
Host = Annotated[str, typer.Option(metavar="ADDRESS", help="Address; one that other machines reach needs a key.")]
KeyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Accepted API keys, one a line; or one in TUNESMITH_API_KEY.")
]
Memory = Annotated[
    float | None, typer.Option(min=0.1, help="Memory at which the model is restarted (default: 90 % of the machine).")
]
Origins = Annotated[
    list[str] | None, typer.Option(metavar="URL", help="Origin of web pages that may send requests. Repeatable.")
]
Jobs = Annotated[bool, typer.Option("--jobs", help="Take files and fine-tuning jobs too, in OpenAI's shape, on MODEL.")]
StorePlace = Annotated[
    str,
    typer.Option("--store", metavar="PLACE", help="Files, jobs and models of --jobs: a folder, or postgresql://..."),
]
StoreFiles = Annotated[
    Path, typer.Option("--store-files", metavar="DIR", help="Contents and runs of a store on PostgreSQL.")
]
Upgrade = Annotated[bool, typer.Option("--upgrade-store", help="Upgrade an older PostgreSQL store. Back it up first.")]
PythonGraders = Annotated[
    bool, typer.Option("--python-graders", help="Let clients' graders run Python here, as the user of this server.")
]
BasesFile = Annotated[Path | None, typer.Option("--bases", metavar="FILE", help="Models that jobs may tune, in YAML.")]
RayAt = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="Run jobs at once on Ray (extra ray): local, auto or HOST:PORT."),
]


def serve(
    targets: Targets = None,
    host: Host = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    key_file: KeyFile = None,
    streams: Annotated[int, typer.Option(min=1, help="Answers written at once.")] = 16,
    queue: Annotated[int, typer.Option(min=0, help="Most requests that wait for a place.")] = 64,
    max_new_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")] = 4096,
    memory_gib: Memory = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the model (default: one a core).")] = None,
    grace: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Time for requests at the end.")] = 30.0,
    allow_host: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Another name of this server.")] = None,
    allow_origin: Origins = None,
    jobs: Jobs = False,
    store: StorePlace = "jobs",
    store_files: StoreFiles = Path("jobs"),
    upgrade_store: Upgrade = False,
    ray: RayAt = None,
    bases: BasesFile = None,
    python_graders: PythonGraders = False,
    model: BaseAt = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Serve tuned models and their base over HTTP, with OpenAI's API.

    tunesmith serve last

    tunesmith serve support-3f2a sales-91c0 --port 8001 --host 0.0.0.0 --key-file keys

    tunesmith serve --jobs HuggingFaceTB/SmolLM2-135M-Instruct
    """
    _refuse_nothing(targets, bases, ray, jobs=jobs, python_graders=python_graders)
    check_extra("jobs" if jobs else "serve")
    from tunesmith.serve import http
    from tunesmith.serve.middleware import AccessPolicy, ApiKeys, read_keys

    memory_limit_bytes = None if memory_gib is None else int(memory_gib * 2**30)
    options = EngineOptions(max_new_tokens, streams, queue, memory_limit_bytes, threads, offline, base=model)
    keys, bound = ApiKeys.of(read_keys(key_file, os.environ)), http.bind(host, port)
    machine = () if bound.is_loopback else (socket.gethostname(),)
    names = frozenset(name.lower() for name in ("localhost", host, *machine, *(allow_host or ())))
    policy = AccessPolicy(keys, names, frozenset(origin.rstrip("/") for origin in allow_origin or ()))
    output = ServerOutput(console(stderr=as_json), quiet, as_json)
    work = None
    if jobs:
        models = read_bases(bases, targets or [], root)
        if python_graders:
            models = models.model_copy(update={"graders": models.graders.model_copy(update={"python": True})})
        opened = open_store(store, store_files, may_upgrade=upgrade_store, on_note=output.note)
        work = ServedJobs(opened, models, ray)
    serve_own(targets or [], bound, policy, options, root=root, grace_s=grace, output=output, work=work)


def _refuse_nothing(
    targets: Sequence[str] | None, bases: Path | None, ray: str | None, *, jobs: bool, python_graders: bool
) -> None:
    """Raise InputError where nothing to serve was named, and for options of jobs without jobs."""
    for option, value in (("--bases", bases), ("--ray", ray), ("--python-graders", python_graders or None)):
        if value is not None and not jobs:
            raise InputError(f"{option}: is for jobs: give --jobs too.")
    if not targets and bases is None and jobs:
        raise InputError(
            "serve: --jobs: name the model that jobs tune, `tunesmith serve --jobs MODEL`, or several by --bases FILE."
        )
    if not targets and bases is None:
        raise InputError("serve: name a RUN or MODEL to serve. `tunesmith serve last` serves the newest run.")


PATH_WIDTH, ERROR_WIDTH = 60, 300


@dataclass
class ServerOutput:
    """Output of a server: lines for people, or JSON lines."""

    screen: Console
    quiet: bool
    as_json: bool
    has_started: bool = False
    last: tuple[str, str, int] = ("", "", 0)
    """Method, path and status of the last request that was shown."""

    def note(self, text: str) -> None:
        if self.as_json:
            json_line({"kind": "note", "message": text})
        elif not self.quiet:
            self.screen.print(visible(text), style="bright_black")

    def serving(self, bound: BoundSocket, served: Sequence[ModelCard], *, has_key: bool) -> None:
        self.has_started = True
        if self.as_json:
            json_line(
                {"kind": "serving", "url": bound.url, "key": has_key, "models": [asdict(card) for card in served]}
            )
            return
        if self.quiet:
            self.screen.print(bound.url)
            return
        width = max(len(card.name) for card in served)
        for card in served:
            what = "the untouched base" if card.is_base else "tuned"
            does = "ranks documents" if card.task == "rank" else f"answers with {card.answers}"
            self.screen.print(
                f"  {visible(card.name):<{width}}  {card.task}, {what}, {does}, "
                f"{plural(card.max_tokens, 'token')} at most"
            )
        who = "from this machine only" if bound.is_loopback else "from every machine that reaches this address"
        key = "with a key" if has_key else "without a key"
        self.screen.print(f"\n{bound.url}/v1 answers requests {who}, {key}. Ctrl-C ends it. Try:\n", style="bold")
        # Not wrapped, so that a line can be copied at any width.
        line = served[0].to_ask(bound.url, key="$TUNESMITH_API_KEY" if has_key else "")
        self.screen.print(f"  {line}\n", soft_wrap=True)
        if any(card.answers == "text" for card in served):
            self.screen.print(f"Or open {bound.url}/ in a browser. Give a temperature: without one it is 1.\n")

    def job(self, runs: Path, job: Record) -> None:
        """A line for each state that a job comes to; its run lies in `runs`."""
        status, run = job["status"], runs / job["id"]
        tuned, error = job["tuned_name"] if status == "succeeded" else None, job["error"]
        if self.as_json:
            shown = {"id": job["id"], "model": job["model"], "status": status, "run": str(run)}
            json_line({"kind": "job", **shown, "fine_tuned_model": tuned, "error": error})
        elif not self.quiet:
            more = {"running": f" in {os.path.relpath(run)}", "succeeded": f": {tuned}"}.get(status, "")
            more = one_line(f": {error['message']}", ERROR_WIDTH) if status == "failed" else more
            self.screen.print(f"{job['id']} on {visible(job['model'])}: {status}{more}", soft_wrap=True)

    def request(self, log: RequestLog) -> None:
        """A line for each request, with nothing of its content or its answer, but one for equal GETs in a row:
        a client that waits polls."""
        path, usage = one_line(log.path, PATH_WIDTH), log.usage
        milliseconds = round(log.seconds * 1000)
        if self.as_json:
            json_line({
                "kind": "request", "id": log.id, "method": log.method, "path": log.route or path, "status": log.status,
                "ms": milliseconds, "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
                "failed": usage.failed, "fault": log.fault,
            })  # fmt: skip
        elif log.fault:
            self.screen.print(f"{log.id}: {log.fault}. This is a fault in tunesmith; please report it.", style="red")
        elif not self.quiet and (log.method != "GET" or self.last != (log.method, path, log.status)):
            counts = (usage.prompt_tokens, usage.completion_tokens)
            tokens = f", {counts[0]} + {counts[1]} tokens" if any(counts) else ""
            failed = f", {usage.failed}" if usage.failed else ""
            self.last = (log.method, path, log.status)
            self.screen.print(f"{log.method} {path} {log.status} {milliseconds} ms{tokens}{failed}")


def check_extra(extra: Literal["serve", "jobs"]) -> None:
    """Raises InputError naming a missing package of an extra."""
    if extra == "jobs" and os.name != "posix":
        raise InputError("--jobs: runs on Linux and macOS only.")
    try:
        from tunesmith.serve import app, http  # noqa: F401

        if extra == "jobs":
            from tunesmith.jobs import access, server  # noqa: F401
    except ModuleNotFoundError as error:
        message = f"{extra} needs the package {error.name}, which is not installed. Run {install_command(extra)}"
        raise InputError(message) from None


@dataclass(frozen=True)
class ServedJobs:
    """The store of a server's jobs, the models that they may tune, and the address of their cluster."""

    store: Store
    bases: Bases
    ray: str | None


def open_store(place: str, files: Path = Path("jobs"), **how: Any) -> Store:
    """The store in a folder, or at postgresql://… with contents and runs in `files`. Raises InputError."""
    from tunesmith.jobs.store import Store

    return Store(files, place, **how) if "://" in place else Store(Path(place), **how)


def read_bases(file: Path | None, targets: Sequence[str], root: Path) -> Bases:
    """The models that jobs may tune. Raises InputError."""
    from tunesmith.jobs.bases import bases_of_file, bases_of_model

    if file is not None and targets:
        raise InputError(f"{targets[0]}: --bases {file} names the models already. Give one of the two.")
    if file is not None:
        return bases_of_file(file)
    if len(targets) != 1 or is_run(targets[0], root):
        raise InputError(f"{', '.join(targets)}: --jobs takes one MODEL, no run; several models: --bases FILE.")
    return bases_of_model(targets[0])


def serve_own(
    targets: Sequence[str],
    bound: BoundSocket,
    policy: AccessPolicy,
    options: EngineOptions,
    *,
    root: Path,
    grace_s: float,
    output: ServerOutput,
    work: ServedJobs | None,
) -> None:
    """Serve until Ctrl-C or SIGTERM. Everything that can be refused is refused before a model is loaded."""
    import asyncio

    from tunesmith.serve import http
    from tunesmith.serve.app import make_app
    from tunesmith.serve.engine import WorkerEngine
    from tunesmith.serve.middleware import KEY_VARIABLE, MAKE_KEY

    has_key = policy.keys is not None or (work is not None and work.store.keys() != {})
    if not (has_key or bound.is_loopback):
        raise InputError(
            f"--host {bound.host}: other machines can reach that address, so it needs an API key: --key-file "
            f"FILE, or {KEY_VARIABLE}, or with --jobs one of `tunesmith keys create`. {MAKE_KEY}"
        )
    if work is not None:
        from tunesmith.jobs.access import ProjectKeys
        from tunesmith.jobs.kept_answers import KeptAnswers

        work.store.on_job = partial(output.job, work.store.runs_path)
        admission = ProjectKeys(work.store, policy.keys, may_be_open=bound.is_loopback).admit
        policy = replace(policy, keys=None, admission=admission, known=KeptAnswers(work.store).find)
    targets = [named(target, root) for target in targets]
    for target in targets if work is None else ():
        refuse_missing(target, root, offline=options.offline)
    output.note(f"loading {', '.join(targets if work is None else work.bases.bases)}")

    async def run() -> None:
        async with AsyncExitStack() as stack:
            if work is None:
                engine: Engine = await WorkerEngine(targets, root=root, options=options, on_note=output.note).start()
                routers: Sequence[APIRouter] = ()
            else:
                engine, routers = await start_jobs(work, options, root, output.note, stack)
            app = make_app(engine, policy, [output.request], routers)
            output.serving(bound, engine.served, has_key=has_key)
            await http.HttpServer(app, engine, grace_s=grace_s, should_stop=should_stop).serve([bound.socket])

    words = f"stopping: what is under way has {grace_s:g} s to end. Once more to leave at once."
    signals = stopping_on_signals(has_begun=lambda: output.has_started, say=output.note, words=words)
    with bound.socket, signals as should_stop:
        asyncio.run(run())
    if not output.as_json and not output.quiet:
        output.screen.print("ended")


async def start_jobs(
    work: ServedJobs, options: EngineOptions, root: Path, note: Callable[[str], None], stack: AsyncExitStack
) -> tuple[Engine, Sequence[APIRouter]]:
    """The engine and the routes of a server of jobs, which ends with `stack`. Raises InputError."""
    from tunesmith.jobs.server import JobServer
    from tunesmith.parallel.cluster import connected

    stack.callback(work.store.close)
    ray = None if work.ray is None else stack.enter_context(connected(work.ray))
    server = await JobServer.start(work.store, work.bases, options, root=root, on_note=note, ray=ray)
    stack.push_async_callback(server.close)
    return server.engines, server.routers
