"""The app: the routes over one engine, behind the gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tunesmith import __version__
from tunesmith.serve.gate import Answered, Gate, Rules
from tunesmith.serve.metrics import Metrics
from tunesmith.serve.page import page
from tunesmith.serve.protocol import Engine, Refused
from tunesmith.serve.refusals import Refusal, on_fault, on_http_error, on_invalid, on_refused
from tunesmith.serve.routes import json_response, make_router


def make_app(engine: Engine, rules: Rules, listeners: Sequence[Callable[[Answered], None]] = ()) -> Gate:
    """An ASGI app that answers with `engine`. `listeners` are told of each request that has ended."""
    # No pages of documentation: theirs load scripts from elsewhere. /openapi.json says the same.
    api = FastAPI(title="tunesmith", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    for kind, handler in (
        (Refusal, on_refused),
        (Refused, on_refused),
        (HTTPException, on_http_error),
        (RequestValidationError, on_invalid),
        (Exception, on_fault),
    ):
        api.add_exception_handler(kind, handler)
    api.include_router(make_router(engine))
    api.add_api_route("/", page, include_in_schema=False)
    metrics = Metrics(engine)

    @api.get("/health")
    async def health() -> Response:
        """Whether the model can answer: 200, or 503 while it is started again."""
        state = engine.state()
        said = {"status": "ok" if state.alive else "starting", "models": [served.name for served in engine.served]}
        return json_response({**said, "engine": asdict(state)}, 200 if state.alive else 503)

    @api.get("/metrics")
    async def read_metrics() -> Response:
        """Counters for Prometheus."""
        return metrics.response()

    return Gate(api, rules, [metrics.count, *listeners])
