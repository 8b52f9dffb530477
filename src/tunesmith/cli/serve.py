"""tunesmith serve: the command, a server from its start to its end, and its output"""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from tunesmith.cli.options import BaseAt, Json, Offline, Quiet, Root
from tunesmith.cli.signals import stopping_on_signals
from tunesmith.cli.streams import console, json_line
from tunesmith.environment import install_command
from tunesmith.errors import InputError
from tunesmith.phrases import one_line, plural, visible
from tunesmith.runs.folder import is_run
from tunesmith.serve.protocol import Engine, EngineOptions, ModelCard

if TYPE_CHECKING:
    from fastapi import APIRouter

    from tunesmith.jobs.bases import Bases
    from tunesmith.jobs.store import Store
    from tunesmith.serve.http import BoundSocket
    from tunesmith.serve.middleware import AccessPolicy, RequestLog


Targets = Annotated[
    list[str] | None,
    typer.Argument(metavar="RUN|MODEL...", help="Runs of one base, or a model; each is served by its name."),
]
Host = Annotated[str, typer.Option(metavar="ADDRESS", help="Others than this machine's own need a key.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")]
KeyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Accepted API keys, one a line; or one in TUNESMITH_API_KEY.")
]
Streams = Annotated[int, typer.Option(min=1, help="Answers written at once.")]
Queue = Annotated[int, typer.Option(min=0, help="Most requests that wait for a place.")]
Answer = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")]
Memory = Annotated[
    float | None, typer.Option(min=0.1, help="Memory at which the model is restarted (default: 90 % of the machine).")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the model (default: one a core).")]
Grace = Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Time for requests under way at the end.")]
Hosts = Annotated[list[str] | None, typer.Option(metavar="NAME", help="A further name of this server.")]
Jobs = Annotated[bool, typer.Option("--jobs", help="Take files and fine-tuning jobs too, in OpenAI's shape, on MODEL.")]
StorePlace = Annotated[
    str, typer.Option("--store", metavar="DIR|postgresql://...", help="Files, jobs and models of --jobs.")
]
StoreFiles = Annotated[
    Path, typer.Option("--store-files", metavar="DIR", help="Contents and runs of a store on PostgreSQL.")
]
Upgrade = Annotated[bool, typer.Option("--upgrade-store", help="Upgrade an older PostgreSQL store. Back it up first.")]
BasesFile = Annotated[Path | None, typer.Option("--bases", metavar="FILE", help="Models that jobs may tune, in YAML.")]
RayAt = Annotated[
    str | None, typer.Option("--ray", metavar="local|auto|HOST:PORT", help="Run jobs at once on Ray (extra ray).")
]
Origins = Annotated[list[str] | None, typer.Option(metavar="URL", help="A web page that may send requests.")]


def serve(
    targets: Targets = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    key_file: KeyFile = None,
    streams: Streams = 16,
    queue: Queue = 64,
    max_new_tokens: Answer = 4096,
    memory_gib: Memory = None,
    threads: Threads = None,
    grace: Grace = 30.0,
    allow_host: Hosts = None,
    allow_origin: Origins = None,
    jobs: Jobs = False,
    store: StorePlace = "jobs",
    store_files: StoreFiles = Path("jobs"),
    upgrade_store: Upgrade = False,
    ray: RayAt = None,
    bases: BasesFile = None,
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
    for option, given in (("--bases", bases), ("--ray", ray)):
        if given is not None and not jobs:
            raise InputError(f"{option}: is for jobs: give --jobs too.")
    if not targets and bases is None:
        raise InputError("serve: name a RUN or MODEL to serve. `tunesmith serve last` serves the newest run.")
    check_extra("serve")
    if jobs:
        check_extra("jobs")
    memory_limit_bytes = None if memory_gib is None else int(memory_gib * 2**30)
    options = EngineOptions(max_new_tokens, streams, queue, memory_limit_bytes, threads, offline, base=model)
    where = JobPlace(store, bases, store_files, may_upgrade=upgrade_store, ray=ray) if jobs else None
    access = Access(host, port, key_file, tuple(allow_host or ()), tuple(allow_origin or ()))
    output = ServerOutput(console(stderr=as_json), quiet, as_json)
    serve_own(targets or [], access, options, root=root, grace_s=grace, output=output, jobs=where)


PATH_WIDTH, ERROR_WIDTH = 60, 300


@dataclass(frozen=True)
class Access:
    """The address of a server and who may use it, from the command line."""

    host: str
    port: int
    key_file: Path | None = None
    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobPlace:
    """The store of a server that takes jobs, and the file of the models they may tune."""

    store: str
    """A folder, or postgresql://…"""
    bases: Path | None
    files: Path = Path("jobs")
    """Folder of contents and runs, if the store is no folder."""
    may_upgrade: bool = False
    ray: str | None = None
    """Address of the cluster that runs are started on; None: on this machine."""

    def cluster(self) -> AbstractContextManager[Any]:
        """Ray, or None. Raises InputError if it is not reached."""
        from tunesmith.parallel.cluster import connected

        return nullcontext() if self.ray is None else connected(self.ray)

    def open(self, on_note: Callable[[str], None], *, is_server: bool = True) -> Store:
        """Raises InputError."""
        from tunesmith.jobs.store import Store

        folder, url = (self.files, self.store) if "://" in self.store else (Path(self.store), None)
        return Store(folder, url, is_server=is_server, may_upgrade=self.may_upgrade, on_note=on_note)


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
            json_line({"kind": "serving", "url": bound.url, "key": has_key, "models": [asdict(one) for one in served]})
            return
        if self.quiet:
            self.screen.print(bound.url)
            return
        width = max(len(one.name) for one in served)
        for one in served:
            what = "the untouched base" if one.is_base else "tuned"
            self.screen.print(
                f"  {visible(one.name):<{width}}  {one.task}, {what}, answers with {one.answers}, "
                f"{plural(one.max_tokens, 'token')} at most"
            )
        who = "only this machine" if bound.is_loopback else "every machine that reaches it"
        key = "with a key" if has_key else "without a key"
        self.screen.print(f"\n{bound.url}/v1 for {who}, {key}. Ctrl-C ends it. To try it:\n", style="bold")
        # Not wrapped, so that a line can be copied at any width.
        self.screen.print(to_try(bound.url, served[0], has_key=has_key) + "\n", soft_wrap=True)
        if any(one.answers == "text" for one in served):
            self.screen.print(f"Or open {bound.url}/ in a browser. Give a temperature: without one it is 1.\n")

    def job(self, runs: Path, job: Mapping[str, Any]) -> None:
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
        """A line for each request, with nothing of its content or its answer, but one for equal GETs in a row: a client
        that waits polls."""
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


def to_try(url: str, served: ModelCard, *, has_key: bool) -> str:
    """A line for a shell that asks the model."""
    import orjson

    path = {"text": "chat/completions", "embeddings": "embeddings", "labels": "classify"}[served.answers]
    text = {"messages": [{"role": "user", "content": "Hello"}]} if served.answers == "text" else {"input": "Hello"}
    key = ' -H "Authorization: Bearer $TUNESMITH_API_KEY"' if has_key else ""
    data = shlex.quote(orjson.dumps({"model": served.name, **text}).decode())
    return f"  curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d {data}"


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


def read_bases(jobs: JobPlace, targets: Sequence[str], root: Path) -> Bases:
    """The models that jobs may tune. Raises InputError."""
    from tunesmith.jobs.bases import bases_of_file, bases_of_model

    if jobs.bases is not None:
        if targets:
            raise InputError(f"{targets[0]}: --bases {jobs.bases} names the models already. Give one of the two.")
        return bases_of_file(jobs.bases)
    if len(targets) != 1 or is_run(targets[0], root):
        raise InputError(f"{', '.join(targets)}: --jobs takes one MODEL, no run; several models: --bases FILE.")
    return bases_of_model(targets[0])


def make_policy(access: Access, bound: BoundSocket, store: Store | None, keys: Sequence[str]) -> AccessPolicy:
    """Who may use this server: those with a key from outside, or with one of a store, which says their project too.

    Raises InputError for an address that other machines reach, without a key.
    """
    from tunesmith.serve.middleware import KEY_VARIABLE, MAKE_KEY, AccessPolicy, ApiKeys

    if not (keys or bound.is_loopback or (store is not None and store.keys())):
        raise InputError(
            f"--host {access.host}: other machines can reach that address, so it needs an API key: --key-file FILE, or "
            f"{KEY_VARIABLE}, or with --jobs one of `tunesmith keys create`. {MAKE_KEY}"
        )
    machine = () if bound.is_loopback else (socket.gethostname(),)
    hosts = (name.lower() for name in ("localhost", access.host, *machine, *access.names))
    origins = (origin.rstrip("/") for origin in access.origins)
    policy = AccessPolicy(ApiKeys.of(keys), frozenset(hosts), frozenset(origins))
    if store is None:
        return policy
    from tunesmith.jobs.access import ProjectKeys
    from tunesmith.jobs.kept_answers import KeptAnswers

    admission = ProjectKeys(store, policy.keys, may_be_open=bound.is_loopback).admit
    return replace(policy, keys=None, admission=admission, known=KeptAnswers(store).find)


def serve_own(
    targets: Sequence[str],
    access: Access,
    options: EngineOptions,
    *,
    root: Path,
    grace_s: float,
    output: ServerOutput,
    jobs: JobPlace | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM. Everything that can be refused is refused before a model is loaded."""
    import asyncio

    from tunesmith.serve import http
    from tunesmith.serve.app import make_app
    from tunesmith.serve.engine import start_engine
    from tunesmith.serve.middleware import read_keys

    bases = None if jobs is None else read_bases(jobs, targets, root)
    keys = read_keys(access.key_file, os.environ)
    bound = http.bind(access.host, access.port)
    store = None if jobs is None else jobs.open(output.note)
    if store is not None:
        store.on_job = partial(output.job, store.runs_path)
    policy = make_policy(access, bound, store, keys)
    has_key = bool(keys) or (store is not None and store.keys() != {})
    output.note(f"loading {', '.join(targets if bases is None else bases.bases)}")

    async def run() -> None:
        async with AsyncExitStack() as stack:
            routers: Sequence[APIRouter] = ()
            if bases is None or store is None or jobs is None:
                engine: Engine = await start_engine(targets, root=root, options=options, on_note=output.note)
            else:
                from tunesmith.jobs.server import JobServer

                stack.callback(store.close)
                ray = stack.enter_context(jobs.cluster())
                working = await JobServer.start(store, bases, options, root=root, on_note=output.note, ray=ray)
                stack.push_async_callback(working.close)
                engine, routers = working.engines, working.routers
            try:
                server = http.make_server(make_app(engine, policy, [output.request], routers), grace_s=grace_s)
                output.serving(bound, engine.served, has_key=has_key)
            except BaseException:
                await engine.close(0)
                raise
            await http.serve(server, bound, engine, grace_s=grace_s, should_stop=should_stop)

    words = f"stopping: what is under way has {grace_s:g} s to end. Once more to leave at once."
    with (
        bound.socket,
        stopping_on_signals(has_begun=lambda: output.has_started, say=output.note, words=words) as should_stop,
    ):
        asyncio.run(run())
    if not output.as_json and not output.quiet:
        output.screen.print("ended")
