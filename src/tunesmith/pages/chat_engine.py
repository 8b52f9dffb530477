"""The engine behind the chat page: no model until somebody chats with a run, and then that run and its base."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.serve.engine import WorkerEngine
from tunesmith.serve.protocol import (
    EngineOptions,
    EngineState,
    GenerationRequest,
    ModelCard,
    RequestError,
    StreamEvent,
    ToRead,
)
from tunesmith.types import JsonObject

IDLE_S = 1200.0
"""Seconds without a question after which the model is unloaded."""
IDLE_CHECK_S = 20.0


class ChatEngine:
    """A `protocol.Engine` over the engine of the run that is loaded; one run at a time."""

    def __init__(self, root: Path, options: EngineOptions, note: Callable[[str], None]) -> None:
        self._root, self._options, self._note = root, options, note
        self._engine: WorkerEngine | None = None
        self._task: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._used = time.monotonic()
        self._beginning = asyncio.Lock()  # of two loads at once each would start an engine
        self.target = ""
        """The run that is loaded, or being loaded."""
        self.error = ""
        self.stays = False
        """Whether it is served to programs, and stays until it is unloaded."""

    @property
    def served(self) -> Sequence[ModelCard]:
        return () if self._engine is None else self._engine.served

    def deployment(self) -> JsonObject:
        """{target, state, error, stays, models}: `state` is none, loading, ready or failed."""
        is_loading = self._task is not None and not self._task.done()
        state = "loading" if is_loading else "ready" if self._engine else "failed" if self.error else "none"
        keys = ("name", "is_base", "answers", "task", "max_tokens")
        stays = self.stays and self.target != ""
        models = [{key: getattr(card, key) for key in keys} for card in self.served]
        return {"target": self.target, "state": state, "error": self.error, "stays": stays, "models": models}

    async def load(self, target: str, *, stays: bool = False) -> None:
        """Begin to load a run with its base, in place of the loaded one. `stays`: not unloaded when it is
        idle."""
        async with self._beginning:
            is_loading = self._task is not None and not self._task.done()
            if target == self.target and (is_loading or self._engine is not None):
                self.stays = self.stays or stays
                return
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
            self.target, self.error, self.stays, self._used = target, "", stays, time.monotonic()
            self._task = asyncio.create_task(self._load(target))

    async def unload(self) -> None:
        """Unload the run and free its memory."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()  # an engine that is on its way would come all the same
            await asyncio.gather(self._task, return_exceptions=True)
        engine, self._engine, self.target, self.error = self._engine, None, "", ""
        if engine is not None:
            await engine.close(0)

    async def _load(self, target: str) -> None:
        await self.unload()
        self.target = target
        try:
            settings: Any = {"root": self._root, "options": self._options, "on_note": self._note}
            self._engine = await WorkerEngine([str(self._root / target)], **settings).start()
            self._watch = self._watch or asyncio.create_task(self._give_back())
        except TunesmithError as error:
            self.error = str(error)
        except OSError as error:
            self.error = f"the engine cannot be started: {error.strerror}."

    async def _give_back(self) -> None:
        while True:
            await asyncio.sleep(IDLE_CHECK_S)
            if self._engine is not None and self._engine.state().running:
                self._used = time.monotonic()
            if self._engine is not None and not self.stays and time.monotonic() - self._used > IDLE_S:
                self._note(
                    f"{self.target}: no question for {IDLE_S / 60:.0f} min: it is unloaded, which frees its memory"
                )
                await self.unload()

    def _ready(self) -> WorkerEngine:
        """Raises RequestError 503 where no model is loaded."""
        self._used = time.monotonic()
        if self._engine is None:
            raise RequestError("No model is loaded. Choose a run to chat with.", status=503, code="engine_unavailable")
        return self._engine

    def generate(self, request: GenerationRequest) -> AsyncGenerator[StreamEvent, None]:
        return self._ready().generate(request)

    async def read(self, model: str, texts: ToRead, **how: Any) -> Any:
        return await self._ready().read(model, texts, **how)

    def state(self) -> EngineState:
        return EngineState(True, 0, 0, 0, 0, 0) if self._engine is None else self._engine.state()

    async def close(self, grace_s: float) -> None:
        tasks = [task for task in (self._task, self._watch) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._engine is not None:
            await self._engine.close(grace_s)
