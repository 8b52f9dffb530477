"""The engine as the server sees it: a child process that holds the models, started again when it dies. Nothing heavy is
imported here."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.serve import wire
from tunesmith.serve.life import Life
from tunesmith.serve.protocol import Ask, Begun, Ended, Engine, EngineOptions, EngineState, Piece, Refused, Served, Told

LONGEST_PAUSE_S = 30.0
MOST_UNREAD = 32_768
"""Pieces and tokens with their probability that may wait for a client that does not read: some 10 MiB."""
UNHEARD_S, HANGS_S = 15.0, 60.0
"""A child says several times a second that it lives. Silent for so long it is not healthy; it hangs, and is ended."""
STUCK_S = 900.0
"""Longest time for one step, or one call of a model that reads; a long prompt on a slow machine takes a minute."""
WATCH_S = 1.0
LONG_LIFE_S = 60.0
"""A child that lived so long is started again at once."""

Note = Callable[[str], None]


async def start_engine(
    names: Sequence[str], *, root: Path, options: EngineOptions, on_note: Note = lambda text: None
) -> Engine:
    """An engine that is ready to be asked; `EngineOptions` says what is started and what is told.

    Raises InputError or TunesmithError where what is named cannot be served; no child is left then.
    """
    engine = ChildEngine(names, root=root, options=options, on_note=on_note)
    await engine.start()
    return engine


@dataclass(eq=False)
class _Call:
    """An ask under way."""

    n: int
    news: asyncio.Queue[Told | Refused] = field(default_factory=asyncio.Queue)
    num_unread: int = 0
    is_given_up: bool = False
    has_begun: bool = False
    num_ended: int = 0


class ChildEngine:
    """`asking.Engine` over a child process."""

    def __init__(self, names: Sequence[str], *, root: Path, options: EngineOptions, on_note: Note) -> None:
        self.served: Sequence[Served] = ()
        self._start_line = wire.line({"names": list(names), "root": str(root), "options": asdict(options)})
        self._options = options
        self._note = on_note
        self._life: Life | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._keys = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._is_closing = False
        self._restarts = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0

    async def start(self) -> None:
        """The first life; raises what its start failed of."""
        self._life = await Life.begin(self._start_line, on_message=self._hear, on_note=self._note)
        self.served = self._life.served
        self._keeper = asyncio.create_task(self._keep())

    async def ask(self, ask: Ask) -> AsyncIterator[Told]:
        """See asking.Engine."""
        life = self._alive()
        self._refuse_more()
        key, call = next(self._keys), _Call(ask.n)
        self._calls[key] = call
        life.send({"key": key, "ask": wire.ask_fields(ask)})
        is_over = False
        try:
            while not is_over:
                told = await call.news.get()
                call.num_unread -= _weight(told)
                if isinstance(told, Refused):
                    is_over = True
                    raise told
                call.num_ended += isinstance(told, Ended)
                is_over = call.num_ended == call.n
                yield told
        finally:
            self._calls.pop(key, None)
            if not is_over and life.is_alive:
                life.send({"cancel": key})

    async def classify(self, model: str, texts: Sequence[str | tuple[str, str]]) -> list[Mapping[str, Any]]:
        """See asking.Engine."""
        lines: list[Mapping[str, Any]] = await self._reply({"model": model, "classify": list(texts)})
        return lines

    async def embed(self, model: str, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """See asking.Engine."""
        vectors, num_tokens = await self._reply({"model": model, "embed": list(texts)})
        return vectors, num_tokens

    def state(self) -> EngineState:
        """See asking.Engine."""
        begun = [call for call in self._calls.values() if call.has_begun]
        life = self._life
        is_alive = life is not None and life.is_alive and life.silent_s < UNHEARD_S and life.stuck_s < STUCK_S
        return EngineState(
            alive=is_alive,
            running=sum(call.n - call.num_ended for call in begun),
            waiting=len(self._calls) - len(begun) + len(self._replies),
            restarts=self._restarts,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            rss_bytes=life.rss_bytes if life is not None and is_alive else 0,
        )

    async def close(self, grace_s: float) -> None:
        """See asking.Engine."""
        self._is_closing = True
        until = time.monotonic() + grace_s
        while (self._calls or self._replies) and time.monotonic() < until and self._life and self._life.is_alive:
            await asyncio.sleep(0.02)
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        self._end_all("the server is being stopped", status=503, code="shutting_down")
        if self._life is not None:
            await self._life.end()

    async def _reply(self, message: dict[str, Any]) -> Any:
        life = self._alive()
        self._refuse_more()
        key = next(self._keys)
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._replies[key] = reply
        try:
            life.send({"key": key, **message})
            return await reply
        finally:
            self._replies.pop(key, None)

    def _alive(self) -> Life:
        if self._is_closing:
            raise Refused("the server is being stopped", status=503, code="shutting_down")
        if self._life is None or not self._life.is_alive:
            raise Refused("the engine is being started again: try in a moment", status=503, code="engine_unavailable")
        return self._life

    def _refuse_more(self) -> None:
        """Raise Refused where as many wait as may."""
        if self.state().waiting >= self._options.queue:
            raise Refused(
                f"{self._options.queue} requests are waiting already: try again later", status=429, code="queue_full"
            )

    def _hear(self, message: dict[str, Any]) -> None:
        """What the child says, but for its state."""
        if "reply" in message:
            reply = self._replies.get(message["reply"])
            if reply is not None and not reply.done():
                reply.set_result(message["value"])
            return
        for key, plain in message["news"]:
            told = wire.as_told(plain)
            if isinstance(told, Begun):
                self._prompt_tokens += told.prompt_tokens
            elif isinstance(told, Ended):
                self._completion_tokens += told.completion_tokens
            call, reply = self._calls.get(key), self._replies.get(key)
            if call is not None:
                call.has_begun = call.has_begun or isinstance(told, Begun)
                self._pass_on(key, call, told)
            elif reply is not None and isinstance(told, Refused) and not reply.done():
                reply.set_exception(told)

    def _pass_on(self, key: int, call: _Call, told: Told | Refused) -> None:
        """Keep what is told for the one who asked, unless too much waits for a client that does not read."""
        if call.is_given_up:
            return
        call.num_unread += _weight(told)
        if call.num_unread <= MOST_UNREAD:
            call.news.put_nowait(told)
            return
        call.is_given_up = True
        while not call.news.empty():
            call.news.get_nowait()
        call.news.put_nowait(Refused("the answer was not read, and was given up", status=408, code="unread"))
        if self._life is not None and self._life.is_alive:
            self._life.send({"cancel": key})

    async def _keep(self) -> None:
        """A child after a child, until the engine is closed."""
        num_short = 0
        while True:
            assert self._life is not None, "it has been started"
            begun = time.monotonic()
            watching = asyncio.create_task(_watch(self._life))
            try:
                why = await self._life.ended()
            finally:
                watching.cancel()
            self._note(f"the engine ended ({why}) and is started again")
            what = f"the engine ended while it was at this ({why}); it is started again"
            self._end_all(what, status=500, code="engine_crashed")
            num_short = 0 if time.monotonic() - begun > LONG_LIFE_S else num_short + 1
            await self._start_again(num_short)

    async def _start_again(self, num_short: int) -> None:
        while True:
            await asyncio.sleep(min(LONGEST_PAUSE_S, 0.25 * 2**num_short) if num_short > 1 else 0)
            num_short += 1
            self._restarts += 1
            try:
                self._life = await Life.begin(self._start_line, on_message=self._hear, on_note=self._note)
                return
            except TunesmithError as error:
                self._note(f"the engine could not be started again: {error}")

    def _end_all(self, message: str, *, status: int, code: str) -> None:
        """Tell everyone whose answer is under way, or who waits for one, that none comes."""
        for call in self._calls.values():
            told = Refused(message, status=status if call.has_begun else 503, code=code)
            call.news.put_nowait(told)
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(Refused(message, status=status, code=code))


def _weight(told: Told | Refused) -> int:
    return 1 + sum(1 + len(token.top) for token in told.tokens) if isinstance(told, Piece) else 1


async def _watch(life: Life) -> None:
    """End a child that hangs."""
    while True:
        begun = time.monotonic()
        await asyncio.sleep(WATCH_S)
        if time.monotonic() - begun > WATCH_S + UNHEARD_S / 2:
            life.heard = time.monotonic()  # this process has been stopped itself, and has not read yet
        elif life.silent_s > HANGS_S:
            life.kill(f"it said nothing for {HANGS_S:g} s")
            return
        elif life.stuck_s > STUCK_S:
            life.kill(f"one step took more than {STUCK_S:g} s")
            return
