"""From an engine's iterators to one: several prompts of a request at once, and a client that may go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect

from tunesmith.serve.protocol import Ask, Engine, Told

AT_ONCE = 8
"""Prompts of one request that are asked together: its own do not fill the queue."""
AHEAD = 64
"""What is told ahead of a client that reads slowly."""

T = TypeVar("T")
Receive = Callable[[], Awaitable[Any]]


async def tell(engine: Engine, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Told], None]:
    """What the engine tells of each ask, with the ask's number. Closing this frees their places.

    Raises what the engine raises for the first of them that fails; the others are then given up.
    """
    told: asyncio.Queue[tuple[int, Told] | BaseException | None] = asyncio.Queue(AHEAD)
    waiting = iter(enumerate(asks))

    async def work() -> None:
        try:
            for number, ask in waiting:
                async with aclosing(cast(AsyncGenerator[Told, None], engine.ask(ask))) as telling:
                    async for one in telling:
                        await told.put((number, one))
        except Exception as error:
            await told.put(error)
        else:
            await told.put(None)

    workers = [asyncio.create_task(work()) for _ in range(min(AT_ONCE, len(asks)))]
    try:
        at_work = len(workers)
        while at_work:
            one = await told.get()
            if isinstance(one, BaseException):
                raise one
            if one is None:
                at_work -= 1
            else:
                yield one
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is given up when the client goes away. Raises ClientDisconnect then."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
