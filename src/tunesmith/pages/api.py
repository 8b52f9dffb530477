"""The values behind the pages as JSON, and every act of a page: routes of `/v1`, for programs too."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from tunesmith.pages import exports, launches
from tunesmith.pages.launches import Wanted
from tunesmith.pages.live import run_values
from tunesmith.pages.run_list import PAGE
from tunesmith.pages.site import Site, answer_values
from tunesmith.serve.protocol import RequestError
from tunesmith.serve.request_schemas import StrictModel, StrictRoute
from tunesmith.serve.responses import json_response
from tunesmith.summaries.live import MOST_POINTS, curve_values
from tunesmith.summaries.runs import UNREADABLE

SET = "set."
"""Prefix of the name of an option in an address."""


class NewRun(StrictModel):
    """A model, rows and options to train with."""

    model: str
    data: str
    settings: dict[str, str] = Field(default_factory=dict)


class Continued(StrictModel):
    """Options with which a run goes on."""

    settings: dict[str, str] = Field(default_factory=dict)


class Deployment(StrictModel):
    """A run to chat with, or to serve to programs."""

    run: str
    stays: bool = False


class NewExport(StrictModel):
    """A word of `export.to`."""

    to: str


def number(request: Request, name: str, usual: int, most: int) -> int:
    """A whole number of the address. Raises RequestError for anything else."""
    text = request.query_params.get(name, "") or str(usual)
    if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) <= most):
        raise RequestError(f"{name}: {text[:40]!r}: a whole number from 0 to {most:,}.", param=name)
    return int(text)


def wanted_of(site: Site, request: Request) -> Wanted | None:
    """Read what the address of the page of a new run names; None without a model and a file."""
    query = request.query_params
    settings = {key.removeprefix(SET): text for key, text in query.items() if key.startswith(SET) and text.strip()}
    if not (query.get("model", "").strip() and query.get("file")):
        return None
    return Wanted(query["model"].strip(), site.files.find(query["file"]), tuple(sorted(settings.items())))


def make_api(site: Site) -> APIRouter:
    """Runs, data, plans and the engine of the chat."""
    router = APIRouter(route_class=StrictRoute)
    _add_runs(router, site)
    _add_handing_on(router, site)
    _add_data(router, site)
    _add_engine(router, site)
    return router


def _add_runs(router: APIRouter, site: Site) -> None:
    @router.get("/v1/runs")
    def runs(request: Request) -> Response:
        """Runs, newest first, and all that are at work."""
        find, after = request.query_params.get("find", ""), number(request, "after", 0, 10**9)
        return json_response(site.run_list.page(find, after, number(request, "limit", PAGE, 1000)))

    @router.post("/v1/runs")
    def create(body: NewRun) -> Response:
        """Start a run: `tunesmith train` in a process of its own."""
        wanted = Wanted(body.model, site.files.find(body.data), tuple(body.settings.items()))
        with site.room_for_one():
            return json_response(launches.start(site.root, wanted, offline=site.offline))

    @router.get("/v1/runs/{run}")
    def one(run: str) -> Response:
        """One run, as far as it is."""
        return json_response(run_values(site.log(run)))

    @router.get("/v1/runs/{run}/series")
    def series(run: str, request: Request) -> Response:
        """The curves of a run between two steps, in at most `points` buckets."""
        log, points = site.log(run), number(request, "points", MOST_POINTS, MOST_POINTS)
        first, last = number(request, "from", 0, 10**9), number(request, "to", 10**9, 10**9)
        try:
            return json_response(curve_values(log.series, points, first, min(last, log.series.step)))
        except UNREADABLE as error:
            message = f"{log.run.events_path}: its curve cannot be drawn ({type(error).__name__}: {error})."
            raise RequestError(message, status=422, code="unreadable") from error

    @router.post("/v1/runs/{run}/stop")
    def stop(run: str) -> Response:
        """Let a run stop after its step, with a checkpoint; one that has no folder yet ends at once."""
        if site.runs.find(run) is None and launches.starting(site.root, run):
            return json_response(launches.stop_starting(site.root / run))
        return json_response(launches.stop(site.find(run)))

    @router.post("/v1/runs/{run}/resume")
    def resume(run: str, body: Continued) -> Response:
        """Let a run go on after its newest checkpoint."""
        with site.room_for_one():
            return json_response(launches.resume(site.find(run), body.settings.items(), offline=site.offline))

    @router.post("/v1/runs/{run}/forget")
    def forget(run: str) -> Response:
        """Take away what is left of a run that did not start."""
        if launches.starting(site.root, run) is None:
            raise RequestError(f"{run[:100]}: no run of this name failed to start.", status=404, code="not_found")
        launches.forget(site.root / run)
        return json_response({"name": run, "forgotten": True})


def _add_handing_on(router: APIRouter, site: Site) -> None:
    @router.get("/v1/comparisons")
    def compared(request: Request) -> Response:
        """The answer of `tunesmith compare` on 2 to 8 runs."""
        return json_response(answer_values(site.compare(request.query_params.getlist("run"))))

    @router.get("/v1/runs/{run}/exports")
    def exported(run: str) -> Response:
        """Exports of a run, with their proof."""
        return json_response({"exports": exports.exports_of(site.find(run))})

    @router.post("/v1/runs/{run}/exports")
    def export(run: str, body: NewExport) -> Response:
        """Begin an export: `tunesmith export` in a process of its own."""
        return json_response(exports.start(site.find(run), body.to, offline=site.offline))


def _add_data(router: APIRouter, site: Site) -> None:
    @router.get("/v1/local_files")
    def files() -> Response:
        """Files of rows and models on this machine."""
        return json_response(site.files.listing())

    @router.put("/v1/local_files/{name}")
    async def receive(name: str, request: Request) -> Response:
        """Store a file of rows."""
        return json_response(await site.files.receive(name, request))

    @router.get("/v1/checks")
    def check(request: Request) -> Response:
        """The answer of `tunesmith check` on a file, or rows of it as they are read."""
        query = request.query_params
        path, first = site.files.find(query.get("file", "")), number(request, "from", 0, 10**9)
        lines = (first, number(request, "to", first, first + 999)) if first else None
        return json_response(answer_values(site.check(path, query.get("model", ""), lines)))

    @router.get("/v1/plans")
    def plan(request: Request) -> Response:
        """The answer of `tunesmith plan`."""
        if (wanted := wanted_of(site, request)) is None:
            raise RequestError("model, file: name both.", param="model")
        measured = request.query_params.get("measure") == "1"
        return json_response(answer_values(site.plan(wanted, measured=measured)))


def _add_engine(router: APIRouter, site: Site) -> None:
    @router.get("/v1/deployments")
    async def deployed() -> Response:
        """The run that is loaded for chats and programs."""
        return json_response(site.engine.deployment())

    @router.post("/v1/deployments")
    async def deploy(body: Deployment) -> Response:
        """Load a run with its base for chats and programs, in place of another."""
        run = site.find(body.run)
        if not (run.adapter_path.exists() or run.model_path.exists()):
            raise RequestError(f"{body.run}: it has no result to chat with yet.", status=409, code="conflict")
        await site.engine.load(run.path.name, stays=body.stays)
        return json_response(site.engine.deployment())

    @router.delete("/v1/deployments")
    async def withdraw() -> Response:
        """Give the memory of the loaded run back."""
        await site.engine.unload()
        return json_response(site.engine.deployment())

    @router.post("/v1/keys")
    async def key() -> Response:
        """A key for a program, shown once."""
        return json_response({"key": site.access.new_key()})

    @router.get("/v1/keys")
    async def keys() -> Response:
        """The names of the keys for programs, with which they begin."""
        return json_response({"keys": site.access.keys_of_programs()})

    @router.delete("/v1/keys/{name}")
    async def end_key(name: str) -> Response:
        """End a key for a program."""
        if not site.access.end_key(name):
            raise RequestError(f"{name[:20]}: no key has this name.", status=404, code="not_found")
        return json_response({"name": name, "ended": True})
