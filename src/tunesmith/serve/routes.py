"""The routes: a request's body becomes asks, and what the engine tells becomes its answer."""

from __future__ import annotations

import base64
import secrets
import struct
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Literal

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from tunesmith.serve.answers import ChatShape, Collected, Counted, Head, Shape, TextShape
from tunesmith.serve.bodies import ChatBody, ClassifyBody, CompletionBody, EmbeddingBody, Sampled
from tunesmith.serve.calls import with_calls
from tunesmith.serve.protocol import Ask, Begun, Engine, Served, Told
from tunesmith.serve.refusals import Refusal
from tunesmith.serve.request_body import StrictRoute
from tunesmith.serve.streaming import EventStream, Telling, events
from tunesmith.serve.telling import tell, unless_gone

_ROUTES = {"text": "/v1/chat/completions or /v1/completions", "labels": "/v1/classify", "embeddings": "/v1/embeddings"}


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def find(engine: Engine, name: str, answers: Literal["text", "labels", "embeddings"] | None = None) -> Served:
    """The model of that name. Raises Refusal where there is none, or where it answers something else."""
    found = next((served for served in engine.served if served.name == name), None)
    if found is None:
        names = ", ".join(served.name for served in engine.served)
        message = f"There is no model {name[:100]!r}. Served here: {names}."
        raise Refusal(404, "model_not_found", message, param="model")
    if answers not in (None, found.answers):
        message = f"The model {name!r} answers with {found.answers}: ask it by {_ROUTES[found.answers]}."
        raise Refusal(400, "wrong_route", message, param="model")
    return found


def make_router(engine: Engine) -> APIRouter:
    """All routes of the API over one engine."""
    router = APIRouter(route_class=StrictRoute)

    @router.get("/v1/models")
    async def models() -> Response:
        """What is served, and by which names."""
        return json_response({"object": "list", "data": [_model(served) for served in engine.served]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One model."""
        return json_response(_model(find(engine, name)))

    @router.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """The answer to a conversation."""
        served = find(engine, body.model, "text")
        tools = () if body.tool_choice == "none" else tuple(body.tools)
        ask = Ask(
            messages=tuple(body.messages),
            tools=tools,
            json_schema=body.response_format.wanted,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            **_sampling(body, body.max_completion_tokens or body.max_tokens),
        )
        telling = tell(engine, [ask])
        if tools and served.calls is not None:
            telling = with_calls(telling, served.calls, frozenset(str(tool["function"]["name"]) for tool in tools))
        return await _answer(telling, body, request, shape=ChatShape(body.logprobs), prefix="chatcmpl")

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """How texts go on."""
        find(engine, body.model, "text")
        sampling = _sampling(body, body.max_tokens)
        asks = [Ask(prompt=prompt, logprobs=body.logprobs, **sampling) for prompt in body.prompt]
        shape = TextShape(body.logprobs is not None)
        return await _answer(tell(engine, asks), body, request, shape=shape, prefix="cmpl")

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        """A vector for each text."""
        find(engine, body.model, "embeddings")
        vectors, num_tokens = await unless_gone(request.receive, engine.embed(body.model, body.input))
        _count(request, Counted(num_tokens))
        encoded = [_base64(vector) for vector in vectors] if body.encoding_format == "base64" else vectors
        data = [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(encoded)]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return json_response({"object": "list", "data": data, "model": body.model, "usage": usage})

    @router.post("/v1/classify")
    async def classify(body: ClassifyBody, request: Request) -> Response:
        """A label for each text, and the probability of each class."""
        find(engine, body.model, "labels")
        lines = await unless_gone(request.receive, engine.classify(body.model, body.input))
        data = [{"object": "classification", "index": i, **line} for i, line in enumerate(lines)]
        return json_response({"object": "list", "data": data, "model": body.model})

    return router


def _model(served: Served) -> dict[str, Any]:
    facts = {"task": served.task, "answers": served.answers, "max_tokens": served.max_tokens, "base": served.is_base}
    labels = {"labels": list(served.labels)} if served.labels else {}
    calls = {"tool_calls": served.calls} if served.answers == "text" else {}
    return {
        "id": served.name, "object": "model", "created": served.created, "owned_by": "you", **facts, **labels, **calls,
    }  # fmt: skip


def _sampling(body: Sampled, max_tokens: int | None) -> dict[str, Any]:
    """The fields of an Ask that both ways of asking share."""
    return {
        "model": body.model,
        "max_tokens": max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": body.seed,
        "stop": tuple(body.stop),
        "n": body.n,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
    }


def _count(request: Request, counted: Counted) -> None:
    """Keep what is counted where the gate finds it when the request has ended."""
    request.state.counted = counted


async def _answer(telling: Telling, body: Sampled, request: Request, *, shape: Shape, prefix: str) -> Response:
    """The whole answer, or a stream that has begun: what refuses an ask at once still decides the status."""
    head = Head(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), body.model)
    counted = Counted()
    _count(request, counted)
    try:
        if not body.stream:
            return json_response(
                await unless_gone(request.receive, _whole(telling, head, shape, n=body.n, counted=counted))
            )
        first = await unless_gone(request.receive, _first(telling))
    except BaseException:
        await telling.aclose()
        raise
    rest = _after(first, telling)
    written = events(rest, head=head, shape=shape, n=body.n, counted=counted, tells_usage=body.tells_usage)
    return EventStream(written, telling)


async def _first(telling: Telling) -> tuple[int, Told]:
    return await anext(telling)


async def _after(first: tuple[int, Told], rest: Telling) -> AsyncGenerator[tuple[int, Told], None]:
    yield first
    async for one in rest:
        yield one


async def _whole(telling: Telling, head: Head, shape: Shape, *, n: int, counted: Counted) -> dict[str, Any]:
    collected = Collected()
    async with aclosing(telling):
        async for number, told in telling:
            counted.count(told)
            if not isinstance(told, Begun):
                collected.add(number * n + told.index, told)
    return collected.answer(head, shape, counted)


def _base64(vector: Sequence[float]) -> str:
    """float32, the lowest byte first: what OpenAI's client asks for unless told otherwise."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
