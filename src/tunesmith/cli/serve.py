"""tunesmith serve"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.options import BaseAt, Json, Offline, Quiet, Root, remember_json
from tunesmith.errors import InputError

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
Prompt = Annotated[int | None, typer.Option(min=1, help="Longest prompt (default: the model's context window).")]
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
    ctx: typer.Context,
    targets: Targets = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    key_file: KeyFile = None,
    streams: Streams = 16,
    queue: Queue = 64,
    max_prompt_tokens: Prompt = None,
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
    remember_json(ctx, as_json)
    from tunesmith.cli.server import Access, JobPlace, ServerOutput, serve_own
    from tunesmith.cli.streams import console
    from tunesmith.serve.protocol import EngineOptions

    names = _named(targets, jobs=jobs, bases=bases, ray=ray)
    access = Access(host, port, key_file, tuple(allow_host or ()), tuple(allow_origin or ()))
    memory_limit_bytes = None if memory_gib is None else int(memory_gib * 2**30)
    options = EngineOptions(
        max_prompt_tokens, max_new_tokens, streams, queue, memory_limit_bytes, threads, offline, base=model
    )
    output = ServerOutput(console(stderr=as_json), quiet, as_json)
    where = JobPlace(store, bases, store_files, may_upgrade=upgrade_store, ray=ray) if jobs else None
    serve_own(names, access, options, root=root, grace_s=grace, output=output, jobs=where)


def _named(targets: list[str] | None, *, jobs: bool, bases: Path | None, ray: str | None) -> list[str]:
    for option, given in (("--bases", bases), ("--ray", ray)):
        if given is not None and not jobs:
            raise InputError(f"{option}: is for jobs: give --jobs too.")
    if not targets and bases is None:
        raise InputError("serve: name a RUN or MODEL to serve. `tunesmith serve last` serves the newest run.")
    return targets or []
