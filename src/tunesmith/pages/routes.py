"""The pages: each a template over the values of its JSON route."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlencode

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from markupsafe import Markup
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.types import Scope

from tunesmith.pages import exports, launches
from tunesmith.pages.api import SET, number, wanted_of
from tunesmith.pages.live import live_s, run_values
from tunesmith.pages.local_files import row_address
from tunesmith.pages.markup import asset_response, error_page, page
from tunesmith.pages.pictures import curves
from tunesmith.pages.run_list import PAGE
from tunesmith.pages.site import Site, answer_values, check_words
from tunesmith.phrases import command
from tunesmith.recipe.docs import options
from tunesmith.runs.folder import Run
from tunesmith.serve.protocol import RequestError
from tunesmith.serve.responses import REPORT_POLICY, error_response
from tunesmith.serve.sessions import SESSION_S
from tunesmith.summaries.live import curve_values
from tunesmith.summaries.runs import UNREADABLE
from tunesmith.types import JsonObject

ROWS_A_PAGE = 20
STILL_POINTS = 300
"""Buckets of the curve that needs no script."""
IDLE_S = 5.0
"""Seconds after which the list of runs is drawn again while none is at work."""
MOST_FORM = 4096
LETTERS = "ABCDEFGH"
"""Names of runs side by side, as many as are compared."""


class PageRoute(APIRoute):
    """A route whose refusals are pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def shown(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestError as error:
                return error_page(request, error)

        return shown


def make_pages(site: Site) -> APIRouter:
    """All pages of a site."""
    router = APIRouter(route_class=PageRoute, include_in_schema=False)
    _add_entrance(router, site)
    _add_runs(router, site)
    _add_comparison(router, site)
    _add_data(router, site)

    @router.get("/ui/chat")
    def chat(request: Request) -> Response:
        done = site.run_list.with_results()
        chosen = request.query_params.get("run") or site.engine.target
        values: dict[str, Any] = {"done": done, "chosen": chosen, "deployment": site.engine.deployment()}
        words = ("chat", str(site.root / chosen)) if chosen else ("chat", "last")
        return page(request, "chat.html", as_command=command(*words), as_json="/v1/deployments", **values)

    @router.get("/ui/{rest:path}")
    def nothing(rest: str) -> Response:
        raise RequestError(f"/ui/{rest[:100]}: there is no such page.", status=404, code="not_found")

    return router


def refused(site: Site, scope: Scope, error: RequestError) -> Response:
    """A browser without a session gets the page that leads to one; whoever else is refused gets JSON."""
    request = Request(scope)
    wants_page = request.method == "GET" and "text/html" in request.headers.get("accept", "")
    if error.status != 401 or not wants_page:
        return error_response(error)
    query = f"?{request.url.query}" if request.url.query else ""
    return _login(request, site, back=request.url.path + query, status=401)


def _login(request: Request, site: Site, *, back: str, status: int, message: str = "") -> Response:
    safe = back if back.startswith("/ui/") and "\\" not in back else "/ui/"
    return page(request, "login.html", status, has_keys=site.access.keys is not None, back=safe, message=message)


def _entered(request: Request, site: Site, token: str, back: str) -> Response:
    """A small page that goes on by itself: a strict cookie is not sent along a redirect from elsewhere."""
    answer = page(request, "opened.html", back=back if back.startswith("/ui/") else "/ui/")
    scheme = request.headers.get("x-forwarded-proto") or request.headers.get("origin") or request.url.scheme
    secure = scheme.strip().lower().startswith("https")  # also behind a proxy that speaks https for this server
    answer.set_cookie(site.access.cookie, token, max_age=SESSION_S, httponly=True, samesite="strict", secure=secure)
    return answer


def _add_entrance(router: APIRouter, site: Site) -> None:
    @router.get("/")
    @router.get("/ui")
    def home() -> Response:
        return RedirectResponse("/ui/", 303)

    @router.get("/ui/static/{digest}/{name:path}")
    def static(digest: str, name: str) -> Response:
        return asset_response(digest, name)

    @router.get("/ui/open")
    async def open_link(request: Request) -> Response:
        token = site.access.open_link(request.query_params.get("code", ""))
        if token is None:
            message = "This link was opened before, or another server made it. A link works once."
            return _login(request, site, back="/ui/", status=401, message=message)
        return _entered(request, site, token, "/ui/")

    @router.post("/ui/login")
    async def login(request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_FORM:
                raise RequestError("The form is too long.", status=413, code="too_large")
        form = {name: texts[0] for name, texts in parse_qs(body.decode("utf-8", "replace")).items()}
        back = form.get("back", "/ui/")
        token = site.access.open_by_key(form.get("key", "").strip())
        if token is None:
            return _login(request, site, back=back, status=401, message="This is not one of the server's keys.")
        return _entered(request, site, token, back)


def _add_runs(router: APIRouter, site: Site) -> None:
    @router.get("/ui/")
    def runs(request: Request) -> Response:
        find, after = request.query_params.get("find", "")[:200], number(request, "after", 0, 10**9)
        values = site.run_list.page(find, after)
        query = urlencode({"find": find, "after": after})
        older = None if values["next"] is None else f"/ui/?{urlencode({'find': find, 'after': values['next']})}"
        newer = None if after == 0 else f"/ui/?{urlencode({'find': find, 'after': max(0, after - PAGE)})}"
        words = command("runs", "--runs", site.root)
        more: dict[str, Any] = {"find": find, "older": older, "newer": newer, "after": after, "root": str(site.root)}
        more["live_s"] = min((live_s(row.get("created", time.time())) for row in values["working"]), default=IDLE_S)
        return page(request, "runs.html", **values, **more, as_command=words, as_json=f"/v1/runs?{query}")

    @router.get("/ui/runs/{name}")
    def run(name: str, request: Request) -> Response:
        if site.runs.find(name) is None:
            return _not_started(site, name, request)
        log = site.log(name)
        values = run_values(log)
        still = _drawable(site, name)
        if not still:
            values["log_problem"] = values.get("log_problem", "its steps cannot be drawn")
        more: dict[str, Any] = {"series": still, "resumable": launches.RESUMABLE}
        more["resuming"], more["refusal"] = launches.resuming(log.run)
        more["live_s"] = live_s(values["created"])
        more |= {**_handed_on(site, request, log.run), "as_json": f"/v1/runs/{name}"}
        return page(request, "run.html", run=values, as_command=command("show", log.run.path), **more)

    @router.get("/ui/runs/{name}/result")
    def result(name: str, request: Request) -> Response:
        log = site.log(name)
        values, report, drawn = run_values(log), {}, None
        if log.run.report_path.is_file():
            try:
                report = log.run.report
                drawn = answer_values(site.result(log.run))
            except UNREADABLE as error:
                report = {"problem": str(error)}
        headline = report.get("headline")
        headline = [str(line) for line in headline] if isinstance(headline, list) else []
        more = {"headline": headline, "problem": report.get("problem", ""), "drawn": drawn, "Markup": Markup}
        words = command("show", log.run.path)
        return page(request, "result.html", run=values, **more, as_command=words, as_json=f"/v1/runs/{name}")

    @router.get("/ui/runs/{name}/report.html")
    def report(name: str) -> Response:
        path = site.find(name).path / "report.html"
        if path.is_symlink() or not path.is_file():
            raise RequestError(f"{name}: it has no report yet.", status=404, code="not_found")
        return FileResponse(path, headers={"Content-Security-Policy": REPORT_POLICY}, media_type="text/html")


def _handed_on(site: Site, request: Request, run: Run) -> dict[str, Any]:
    """Values of the parts of a run's page on its exports, and on its being served."""
    deployed = site.engine.deployment()
    is_here = deployed["target"] == run.path.name
    tuned = next((card for card in reversed(site.engine.served) if is_here and not card.is_base), None)
    line = tuned.to_ask(str(request.base_url).rstrip("/"), key="YOUR-KEY") if tuned else ""
    served: dict[str, Any] = {"deployment": deployed if is_here else {"state": "none", "stays": False}, "curl": line}
    has_result = run.adapter_path.exists() or run.model_path.exists()
    served |= {"keys": site.access.keys_of_programs() if line else []}
    return {"has_result": has_result, "exports": exports.exports_of(run), "offered": exports.OFFERED, **served}


def _add_comparison(router: APIRouter, site: Site) -> None:
    @router.get("/ui/compare")
    def compare(request: Request) -> Response:
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        done = [name for name in site.run_list.with_results() if name not in names]
        more: dict[str, Any] = {"names": names, "done": done, "reply": None, "picture": "", "letters": LETTERS}
        words = ["compare", *([str(site.root / name) for name in names] or ["RUN", "RUN"])]
        as_json = f"/v1/comparisons?{urlencode({'run': names}, doseq=True)}" if len(names) > 1 else "/v1/runs"
        if len(names) > 1:
            more["reply"] = answer_values(site.compare(names))
            drawn = [(letter, _drawable(site, name)) for letter, name in zip(LETTERS, names, strict=False)]
            more["aim"] = next((values["aim"] for _, values in drawn if values), "loss")
            more["picture"] = curves([pair for pair in drawn if pair[1].get("aim") == more["aim"]])
        place = partial(row_address, site.files.places() if (more["reply"] or {}).get("state") == "done" else {})
        return page(request, "compare.html", place=place, as_command=command(*words), **more, as_json=as_json)


def _ways_on(request: Request, plan: JsonObject) -> list[tuple[str, str]]:
    """The ways on from a plan that does not fit, or that its rows do not allow: words and address of each."""
    query, links = parse_qs(request.url.query), []
    forecast = (plan["values"] or {}).get("forecast") or {}
    for way in [*forecast.get("alternatives", ()), *(plan["error"] or {}).get("ways", ())]:
        settings = way["settings"].items()
        address = urlencode(query | {SET + key: str(value) for key, value in settings}, doseq=True)
        words = way.get("words") or "Take " + " ".join(f"{key}={value}" for key, value in settings)
        links.append((words, f"/ui/new?{address}"))
    return links


def _drawable(site: Site, name: str) -> JsonObject:
    """The curve of a run; {} where its log is damaged."""
    with suppress(*UNREADABLE):
        return curve_values(site.log(name).series, STILL_POINTS)
    return {}


def _not_started(site: Site, name: str, request: Request) -> Response:
    row = launches.starting(site.root, name)
    if row is None:
        site.find(name)
        return RedirectResponse(request.url.path, 303)  # it has its folder by now
    return page(request, "not_started.html", run=row, as_command="", as_json="/v1/runs")


def _add_data(router: APIRouter, site: Site) -> None:
    @router.get("/ui/data")
    def data(request: Request) -> Response:
        query = request.query_params
        name, model = query.get("file", ""), query.get("model", "").strip()
        first = max(1, number(request, "from", 1, 10**9))
        more: dict[str, Any] = {"file": None, "model": model, "first": first, "last": first + ROWS_A_PAGE - 1}
        more |= {"check": None, "rows": None, **(listing := site.files.listing()), "left_out": listing["more"]}
        words = ["check", "DATA"]
        if name:
            path = site.files.find(name)
            words = check_words(path, model)
            more |= {"file": name, "check": answer_values(site.check(path, model))}
            more["rows"] = answer_values(site.check(path, model, (first, more["last"])))
        as_json = f"/v1/checks?{urlencode({'file': name, 'model': model})}" if name else "/v1/local_files"
        folder = str(site.files.folder)
        return page(request, "data.html", folder=folder, as_command=command(*words), **more, as_json=as_json)

    @router.get("/ui/new")
    def new(request: Request) -> Response:
        query, wanted = request.query_params, wanted_of(site, request)
        more: dict[str, Any] = {"file": query.get("file", ""), "model": query.get("model", "").strip(), "plan": None}
        more |= {**site.files.listing(), "measured": query.get("measure") == "1", "working": site.run_list.at_work()}
        more |= {"settings": {}, "options": options(), "ways": []}
        words, as_json = ["train", "MODEL", "DATA"], "/v1/local_files"
        if wanted is not None:
            words, as_json = site.train_words(wanted), f"/v1/plans?{request.url.query}"
            plan = answer_values(site.plan(wanted, measured=more["measured"]))
            more |= {"plan": plan, "settings": dict(wanted.settings)}
            more["ways"] = _ways_on(request, plan)
        more["done"] = [str(site.root / name) for name in site.run_list.with_results()]
        return page(request, "new.html", as_command=command(*words), **more, as_json=as_json)
