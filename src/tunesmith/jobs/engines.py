"""The engines of all bases as one: every public name and alias is answered by the engine of its base."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.jobs.bases import Bases
from tunesmith.jobs.names import project_of
from tunesmith.serve.engine import WorkerEngine
from tunesmith.serve.middleware import PROJECT
from tunesmith.serve.protocol import EngineState, GenerationRequest, ModelCard, StreamEvent, ToRead

ATTACH_TIMEOUT_S = 600.0


class Engines:
    """`protocol.Engine` over an engine for each base. A tuned model is attached to the engine of its base."""

    def __init__(self, engines: Mapping[str, WorkerEngine], bases: Bases) -> None:
        self._engines = engines
        self._bases = bases
        self.readers: dict[str, set[str]] = {}
        """Other projects that may ask a tuned model, by its name."""

    @property
    def served(self) -> Sequence[ModelCard]:
        """Bases by all of their names, then the tuned models that the project of the request may ask."""
        card_of_base = {
            base: next(card for card in engine.served if card.is_base) for base, engine in self._engines.items()
        }
        named = [replace(card_of_base[base], name=name) for name, (base, _) in self._bases.names.items()]
        tuned = (card for engine in self._engines.values() for card in engine.served if not card.is_base)
        return (*named, *(card for card in tuned if self._may_ask(card.name)))

    def _may_ask(self, tuned: str) -> bool:
        project = PROJECT.get()
        return project in (None, project_of(tuned)) or project in self.readers.get(tuned, ())

    def _find(self, name: str) -> tuple[WorkerEngine, str]:
        """The engine that answers for a name, and the name there."""
        if name in self._bases.names:
            engine = self._engines[self._bases.names[name][0]]
            return engine, next(card.name for card in engine.served if card.is_base)
        first = next(iter(self._engines.values()))
        engines = self._engines.values()
        owners = (engine for engine in engines if name in [card.name for card in engine.served])
        return next(owners, first), name

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StreamEvent, None]:
        engine, name = self._find(request.model)
        events = engine.generate(replace(request, model=name))
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def read(self, model: str, texts: ToRead, **how: Any) -> Any:
        engine, name = self._find(model)
        return await engine.read(name, texts, **how)

    async def attach(self, base: str, name: str, run: Path) -> None:
        """Serve a run as `name` on its base; see WorkerEngine."""
        await self._engines[base].attach(name, run)

    async def detach(self, name: str) -> None:
        await self._find(name)[0].detach(name)

    def state(self) -> EngineState:
        """Sums; alive if all are."""
        states = [engine.state() for engine in self._engines.values()]
        alive, *counts = zip(*map(astuple, states), strict=True)
        return EngineState(all(alive), *map(sum, counts))

    async def close(self, grace_s: float) -> None:
        await asyncio.gather(*(engine.close(grace_s) for engine in self._engines.values()))


@dataclass(frozen=True)
class EnginesFromThread:
    """The engines, for the thread of the dispatcher."""

    engines: Engines
    loop: asyncio.AbstractEventLoop

    def attach(self, base: str, name: str, run: Path) -> None:
        """Serve a run as `name`; returns when it can be used. Raises what the engine says against it."""
        self._wait(self.engines.attach(base, name, run))

    def detach(self, name: str) -> None:
        """Serve it no longer."""
        self._wait(self.engines.detach(name))

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        reply = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            reply.result(ATTACH_TIMEOUT_S)
        except concurrent.futures.TimeoutError as error:
            reply.cancel()  # what is said to be not served must not be served later
            raise TimeoutError(f"the engine did not answer within {ATTACH_TIMEOUT_S:g} s") from error
