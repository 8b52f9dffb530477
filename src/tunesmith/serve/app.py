"""The web application: routes over one engine, the chat page at `/` and the metrics,
behind the access rules."""

from __future__ import annotations

import asyncio
import base64
import math
import re
import secrets
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from tunesmith.environment.version import __version__
from tunesmith.serve.middleware import AccessMiddleware, AccessPolicy, RequestLog
from tunesmith.serve.protocol import Engine, GenerationRequest, Modality, ModelCard, RequestError
from tunesmith.serve.request_schemas import (
    ChatBody,
    ClassifyBody,
    CompletionBody,
    EmbeddingBody,
    RerankBody,
    SampledBody,
    StrictRoute,
)
from tunesmith.serve.responses import (
    ChatFormat,
    CompletionFormat,
    Events,
    Format,
    Usage,
    event_stream,
    json_response,
    on_error,
    scored_answer,
    whole_answer,
    with_tool_calls,
)
from tunesmith.types import JsonObject

T = TypeVar("T")
_ROUTES = {
    "text": "/v1/chat/completions or /v1/completions", "labels": "/v1/classify or /v1/rerank",
    "embeddings": "/v1/embeddings",
}  # fmt: skip
_PAGE = Path(__file__).with_name("page.html").read_text("utf-8")
_STATE = {
    "alive": ("tunesmith_engine_up", "1 while the model can answer."),
    "running": ("tunesmith_running", "Answers that are being written."),
    "waiting": ("tunesmith_waiting", "Requests that wait for a place."),
    "restarts": ("tunesmith_engine_restarts_total", "Times the worker was started again."),
    "prompt_tokens": ("tunesmith_prompt_tokens_total", "Tokens read."),
    "completion_tokens": ("tunesmith_completion_tokens_total", "Tokens written."),
}
LEFT_CHECK_S = 0.5
"""Pause between two checks for a client that has gone away."""
_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


def make_app(
    engine: Engine,
    policy: AccessPolicy,
    listeners: Sequence[Callable[[RequestLog], None]] = (),
    routers: Sequence[APIRouter] = (),
) -> AccessMiddleware:
    """An ASGI app that answers with `engine` and by `routers`. Listeners are called
    for every request when it ends."""
    # No documentation pages: theirs load scripts from elsewhere. /openapi.json has the same content.
    api = FastAPI(title="tunesmith", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    for kind in (RequestError, HTTPException, RequestValidationError, Exception):
        api.add_exception_handler(kind, on_error)
    for router in (make_router(engine), *routers):
        api.include_router(router)
    api.state.sees = lambda: any(card.sees for card in engine.served)
    registry, count = make_metrics(engine)

    @api.get("/", include_in_schema=False)
    async def page() -> Response:
        # Only the page's own script and style run, and they reach this server only.
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
        return Response(re.sub("<(script|style)>", rf'<\1 nonce="{nonce}">', _PAGE), 200, headers, "text/html")

    @api.get("/health")
    async def health() -> Response:
        """200 while the model can answer, 503 while it is being restarted."""
        state = engine.state()
        body = {"status": "ok" if state.alive else "starting", "models": [card.name for card in engine.served]}
        return json_response({**body, "engine": asdict(state)}, 200 if state.alive else 503)

    @api.get("/metrics")
    async def read_metrics() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return AccessMiddleware(api, policy, (count, *listeners))


def find_model(engine: Engine, name: str, answers: Modality | None = None) -> ModelCard:
    """The model of that name. Raises RequestError if there is none, or if it answers something else."""
    model = next((card for card in engine.served if card.name == name), None)
    if model is None:
        names = ", ".join(card.name for card in engine.served)
        message = f"There is no model {name[:100]!r}. Served here: {names}."
        raise RequestError(message, status=404, code="model_not_found", param="model")
    if answers not in (None, model.answers):
        message = f"The model {name!r} answers with {model.answers}: use {_ROUTES[model.answers]}."
        raise RequestError(message, code="wrong_route", param="model")
    return model


def make_router(engine: Engine) -> APIRouter:
    """All routes of the API over one engine."""
    router = APIRouter(route_class=StrictRoute)

    @router.get("/v1/models")
    async def models() -> Response:
        """All models."""
        return json_response({"object": "list", "data": [_model(card) for card in engine.served]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One model."""
        return json_response(_model(find_model(engine, name)))

    @router.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """The answer to a conversation."""
        card, generation = find_model(engine, body.model, "text"), body.to_request()
        events = engine.generate(generation)
        if generation.tools and card.calls is not None:
            names = {str(tool.get("function", tool)["name"]) for tool in generation.tools}
            events = with_tool_calls(events, card.calls, names)
        return await _answer(events, body, request, ChatFormat(body.n), prefix="chatcmpl")

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """The continuation of a text."""
        find_model(engine, body.model, "text")
        if body.prompt_logprobs is not None:
            scored = await _connected(engine.read(body.model, body.scored, top=body.prompt_logprobs), request)
            request.state.usage = usage = Usage(len(scored["prompt_logprobs"]), 1)
            return json_response(scored_answer(scored, _head("cmpl", body.model), usage))
        prompt = str(body.scored)
        events = engine.generate(GenerationRequest(prompt=prompt, max_tokens=body.max_tokens, **body.sampling))
        return await _answer(events, body, request, CompletionFormat(), prefix="cmpl")

    add_readers(router, engine)
    return router


def add_readers(router: APIRouter, engine: Engine) -> None:
    """Add the routes of models that read and write nothing."""

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        """A vector for each text."""
        find_model(engine, body.model, "embeddings")
        settings = {"dimensions": body.dimensions, "is_query": body.input_type == "query"}
        vectors, num_tokens = await _connected(engine.read(body.model, body.input, **settings), request)
        request.state.usage = Usage(num_tokens)
        encode = _base64 if body.encoding_format == "base64" else list
        data = [{"object": "embedding", "index": i, "embedding": encode(vector)} for i, vector in enumerate(vectors)]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return json_response({"object": "list", "data": data, "model": body.model, "usage": usage})

    @router.post("/v1/rerank")
    async def rerank(body: RerankBody, request: Request) -> Response:
        """Documents in the order of their scores for a query."""
        card = find_model(engine, body.model, "labels")
        if card.labels:
            message = f"{body.model} answers with classes: /v1/rerank needs a model that gives one number"
            raise RequestError(message, code="wrong_route", param="model")
        texts = [document if isinstance(document, str) else document.text for document in body.documents]
        lines = await _connected(engine.read(body.model, [(body.query, text) for text in texts]), request)
        values = [next(float(value) for value in line.values() if isinstance(value, int | float)) for line in lines]
        results = [
            {
                "index": i,
                "relevance_score": (1 + math.tanh(values[i] / 2)) / 2,
                **({"document": {"text": texts[i]}} if body.return_documents else {}),
            }
            for i in sorted(range(len(values)), key=lambda i: -values[i])[: body.top_n]
        ]
        return json_response({"id": f"rerank-{secrets.token_hex(12)}", "model": body.model, "results": results})

    @router.post("/v1/classify")
    async def classify(body: ClassifyBody, request: Request) -> Response:
        """A label for each text, and the probability of each class."""
        find_model(engine, body.model, "labels")
        texts = [entry if isinstance(entry, str) else (entry.text, entry.text_pair) for entry in body.input]
        lines = await _connected(engine.read(body.model, texts), request)
        data = [{"object": "classification", "index": i, **line} for i, line in enumerate(lines)]
        return json_response({"object": "list", "data": data, "model": body.model})


def _model(card: ModelCard) -> JsonObject:
    fields = {"task": card.task, "answers": card.answers, "max_tokens": card.max_tokens, "base": card.is_base}
    labels = {"labels": list(card.labels)} if card.labels else {}
    calls: JsonObject = {"tool_calls": card.calls} if card.answers == "text" else {}
    calls |= {"images": True} if card.sees else {}
    return {"id": card.name, "object": "model", "created": card.created, "owned_by": "you", **fields, **labels, **calls}


def _head(prefix: str, model: str) -> JsonObject:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}


async def _answer(events: Events, body: SampledBody, request: Request, form: Format, *, prefix: str) -> Response:
    """The whole answer, or a stream. Waits for the first event, so that an early
    error still sets the status."""
    head = _head(prefix, body.model)
    request.state.usage = usage = Usage()
    if not body.stream:
        return json_response(await _connected(whole_answer(events, head, form, usage), request))
    first = await _connected(anext(events), request)
    shows_usage = (body.stream_options or {}).get("include_usage", False)
    pieces = event_stream(first, events, head, form, usage, shows_usage=shows_usage)
    # no-transform, X-Accel-Buffering: for proxies that would collect an answer before they pass it on.
    headers = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}
    return StreamingResponse(pieces, media_type="text/event-stream", headers=headers)


async def _connected(answer: Awaitable[T], request: Request) -> T:
    """An answer of the engine, which can be a long time coming. When the client has gone away, it is cancelled,
    and ClientDisconnect is raised."""
    coming = asyncio.ensure_future(answer)
    try:
        while not coming.done():
            if await request.is_disconnected():
                raise ClientDisconnect
            await asyncio.wait((coming,), timeout=LEFT_CHECK_S)
        return coming.result()
    finally:
        coming.cancel()
        await asyncio.wait((coming,))


def _base64(vector: Sequence[float]) -> str:
    """float32, little-endian: what OpenAI's client requests by default."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def make_metrics(engine: Engine) -> tuple[CollectorRegistry, Callable[[RequestLog], None]]:
    """The state of the engine when it is read, and counters of requests with the listener that counts."""

    class StateCollector(Collector):
        def collect(self) -> Iterator[Metric]:
            state = engine.state()
            for field, (name, doc) in _STATE.items():
                family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                yield family(name, doc, value=float(getattr(state, field)))

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(StateCollector())
    requests = Counter("tunesmith_requests", "Requests answered.", ("route", "status"), registry=registry)
    seconds = Histogram(
        "tunesmith_request_seconds", "Time to the end of an answer.", ("route",), registry=registry, buckets=_BUCKETS_S
    )

    def count(log: RequestLog) -> None:
        route = log.route or "none"  # never the path itself: a client can send a million different ones
        requests.labels(route, str(log.status)).inc()
        seconds.labels(route).observe(log.seconds)

    return registry, count
