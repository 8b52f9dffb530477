"""One child process from its start to its end, and the two pipes to it. Nothing heavy is imported here."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tunesmith.environment import for_child
from tunesmith.errors import TunesmithError
from tunesmith.serve import wire
from tunesmith.serve.protocol import Served

LAST_LINES = 20
"""Of what it printed, kept for the person who wants to know why it ended."""
START_S = 300.0
"""How long it may say nothing while it loads: importing torch from a slow disk is the longest."""
END_S = 5.0
"""How long it may take to end when it is told to."""


class Life:
    """A child that is ready; `begin` makes one."""

    def __init__(self, process: asyncio.subprocess.Process, on_message: Callable[[dict[str, Any]], None]) -> None:
        self.served: Sequence[Served] = ()
        self.rss_bytes = 0
        self.is_alive = True
        self.heard = time.monotonic()
        self.stuck_s = 0.0
        """How long the step under way has taken by now."""
        self._killed_for = ""
        self._process = process
        self._on_message = on_message
        self._over_memory: Mapping[str, int] | None = None
        self._printed: deque[str] = deque(maxlen=LAST_LINES)
        self._printing = asyncio.create_task(self._collect())
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def begin(
        cls, start_line: bytes, *, on_message: Callable[[dict[str, Any]], None], on_note: Callable[[str], None]
    ) -> Life:
        """A child that has loaded and proved what the line names. Raises TunesmithError where it could not."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tunesmith.serve.child",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=for_child(TOKENIZERS_PARALLELISM="false"),
            limit=wire.MOST_LINE_BYTES,
            start_new_session=True,  # Ctrl-C is for the server, which drains
        )
        life = cls(process, on_message)
        try:
            life._write(start_line)
            await life._become_ready(on_note)
        except BaseException:
            await life.end()
            raise
        life._reading = asyncio.create_task(life._read())
        return life

    def send(self, message: Mapping[str, Any]) -> None:
        """Say something to the child; nothing where it has just ended."""
        self._write(wire.line(message))

    @property
    def silent_s(self) -> float:
        """Since the child said something."""
        return time.monotonic() - self.heard

    def kill(self, why: str) -> None:
        """End a child that does not end by itself; `ended` says why."""
        self._killed_for = why
        with suppress(ProcessLookupError):
            self._process.kill()

    async def ended(self) -> str:
        """Why the child ended, once it has."""
        if self._reading is not None:
            await self._reading
        self.is_alive = False
        code = await self._process.wait()
        await self._printing
        if self._over_memory is not None:
            held, limit = (self._over_memory[key] / 1024**2 for key in ("held", "limit"))
            return f"it held {held:,.0f} MiB of memory, more than the {limit:,.0f} it may"
        if self._killed_for:
            return self._killed_for
        if code < 0:
            with suppress(ValueError):
                return f"ended by {signal.Signals(-code).name}"
        last = f": {self._printed[-1]}" if self._printed else ""
        return f"exit code {code}{last}"

    async def end(self) -> None:
        """Tell the child to end, and see that it does."""
        self.is_alive = False
        assert self._process.stdin is not None, "it has a pipe"
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), END_S)
        except asyncio.TimeoutError:
            self._process.kill()
            await self._process.wait()
        for task in (self._reading, self._printing):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    def _write(self, text: bytes) -> None:
        assert self._process.stdin is not None, "it has a pipe"
        with suppress(OSError, RuntimeError):  # it has ended, which whoever waits for it will be told
            self._process.stdin.write(text)

    async def _become_ready(self, on_note: Callable[[str], None]) -> None:
        while (message := await self._first_message()) is not None:
            if "ready" in message:
                self.served = tuple(wire.as_served(plain) for plain in message["ready"])
                return
            if "failed" in message:
                raise wire.as_error(message["failed"])
            if "note" in message:
                on_note(message["note"])
            self._hear_state(message)
        why = await self.ended()
        raise TunesmithError(f"the engine ended before it was ready: {why}.")

    async def _first_message(self) -> dict[str, Any] | None:
        try:
            return await asyncio.wait_for(self._message(), START_S)
        except asyncio.TimeoutError:
            raise TunesmithError(
                f"the engine said nothing for {START_S:g} s while it was loading: it hangs, perhaps in the model's "
                "chat template."
            ) from None

    async def _read(self) -> None:
        while (message := await self._message()) is not None:
            if not self._hear_state(message):
                self._on_message(message)
        self.is_alive = False

    def _hear_state(self, message: Mapping[str, Any]) -> bool:
        self.heard = time.monotonic()
        self.rss_bytes = message.get("rss", self.rss_bytes)
        self.stuck_s = message.get("stuck", self.stuck_s)
        self._over_memory = message.get("over_memory", self._over_memory)
        return "rss" in message or "over_memory" in message

    async def _message(self) -> dict[str, Any] | None:
        """What the child says next; None: it has ended."""
        assert self._process.stdout is not None, "it has a pipe"
        text = await self._process.stdout.readline()
        return wire.parse(text) if text.endswith(b"\n") else None

    async def _collect(self) -> None:
        assert self._process.stderr is not None, "it has a pipe"
        while chunk := await self._process.stderr.read(1 << 16):
            self._printed.extend(line for line in chunk.decode("utf-8", "replace").splitlines() if line.strip())
