"""The server's side of the engine: a worker process that holds the models, started again when it dies."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from tunesmith.environment.children import for_child, python_words
from tunesmith.environment.process import CARD_SHARE, SERVING_SHARE, card_share
from tunesmith.errors import TunesmithError
from tunesmith.serve.protocol import (
    EngineOptions,
    EngineState,
    Finished,
    GenerationRequest,
    ModelCard,
    RequestError,
    Started,
    StreamEvent,
    ToRead,
    pack,
    unpack,
)

END_TIMEOUT_S = 5.0
LATE_S, SILENT_S = 15.0, 60.0
"""A worker sends something every two seconds. After `LATE_S` without a message it counts as down; after
`SILENT_S` it is ended, and another one is started."""
RESTART_PAUSE_S = 5.0
"""Pause after a worker that could not be started."""
MAX_LINE_BYTES = 1 << 30
"""Longest message of the worker; as much is read ahead, so that its end is always noticed."""
MAX_PRINTED = 20
"""Lines of the worker's output kept for the reason of its end."""

Note = Callable[[str], None]


class WorkerProcess:
    """A worker from its start to its end, and the pipes to it. Made by `start`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.served: Sequence[ModelCard] = ()
        self.process = process
        self.last_message_at, self._was_silent = time.monotonic(), False
        self._input, self._output, self._errors = cast(Any, (process.stdin, process.stdout, process.stderr))
        self._printed: deque[str] = deque(maxlen=MAX_PRINTED)
        self._printing = asyncio.create_task(self._collect_output())

    @classmethod
    async def start(cls, to_load: object, on_note: Note, **variables: str) -> WorkerProcess:
        """A worker that has loaded and checked its models. Raises TunesmithError if it could not."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *python_words("tunesmith.serve.worker"),
            stdin=pipe, stdout=pipe, stderr=pipe, limit=MAX_LINE_BYTES,
            env=for_child(TOKENIZERS_PARALLELISM="false", **variables),
            start_new_session=True,  # Ctrl-C is for the server, which finishes requests first
        )  # fmt: skip
        worker = cls(process)
        try:
            worker.send(to_load)
            while not worker.served:
                message = await worker.receive()
                if message is None:
                    raise TunesmithError(f"the engine ended before it was ready: {await worker.ended()}.")
                if isinstance(message, TunesmithError):
                    raise message
                if isinstance(message, str):
                    on_note(message)
                else:
                    worker.served = message
        except BaseException:
            await worker.end()
            raise
        return worker

    @property
    def is_alive(self) -> bool:
        return self.process.returncode is None

    @property
    def is_well(self) -> bool:
        """Whether it is alive and has sent something lately."""
        return self.is_alive and time.monotonic() - self.last_message_at < LATE_S

    def send(self, message: object) -> None:
        """Send a message; does nothing if the worker has just ended."""
        with suppress(OSError, RuntimeError):
            if self.is_alive:
                self._input.write(pack(message))

    async def receive(self) -> Any:
        """The worker's next message; None: it has ended."""
        line = await self._output.readline()
        self.last_message_at = time.monotonic()
        return unpack(line) if line.endswith(b"\n") else None

    async def next(self) -> Any:
        """As `receive`, but ends the worker if nothing comes for `SILENT_S`."""
        for _ in range(2):  # if this process itself was suspended, its first wait ends before it has read anything
            with suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(self.receive(), SILENT_S / 2)
        self._was_silent = True
        with suppress(ProcessLookupError):
            self.process.kill()
        return None

    async def ended(self) -> str:
        """Wait until the worker has ended. Returns why it did."""
        code = await self.process.wait()
        await asyncio.wait([self._printing], timeout=1)
        if code < 0:
            with suppress(ValueError):
                silence = f" after {SILENT_S:.0f} s without a sign of life" if self._was_silent else ""
                return f"ended by {signal.Signals(-code).name}{silence}"
        return f"exit code {code}" + (f": {self._printed[-1]}" if self._printed else "")

    async def end(self) -> None:
        """Close the worker's input, which ends it, and wait."""
        self._input.close()
        try:
            await asyncio.wait_for(self.process.wait(), END_TIMEOUT_S)
        except asyncio.TimeoutError:
            with suppress(ProcessLookupError):
                self.process.kill()
        await self.process.wait()
        self._printing.cancel()
        await asyncio.gather(self._printing, return_exceptions=True)

    async def _collect_output(self) -> None:
        while chunk := await self._errors.read(1 << 16):
            self._printed.extend(line for line in chunk.decode("utf-8", "replace").splitlines() if line.strip())


@dataclass(eq=False)
class _Call:
    """A request that waits or is answered. `num_left`: answers that are not finished; 0 from the start for a
    request with a single reply."""

    num_left: int = 0
    events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    has_started: bool = False

    async def next(self) -> Any:
        event = await self.events.get()
        if isinstance(event, RequestError):
            raise event
        return event


class WorkerEngine:
    """`protocol.Engine` over a worker process, from its `start`.

    Args:
        names: names or folders of runs, folders of models, or hub ids. The runs share one base, which is served
            too.
        root: the folder of runs.
        attached: runs to attach from the start, by the names to serve them under.
        on_note: receives a line for each thing that the user should know, such as a restart.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        root: Path,
        options: EngineOptions,
        attached: Mapping[str, Path] = MappingProxyType({}),
        on_note: Note = lambda text: None,
    ) -> None:
        self.served: Sequence[ModelCard] = ()
        self._names, self._root, self._options, self._attached = list(names), root, options, dict(attached)
        self._note = on_note
        self._worker: WorkerProcess
        self._supervisor: asyncio.Task[None]
        self._keys = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._is_closing = False
        self._restarts = self._prompt_tokens = self._completion_tokens = 0

    async def start(self) -> WorkerEngine:
        """Start the first worker, and wait until it is ready for requests.

        Raises InputError or TunesmithError if a name cannot be served; no worker is left behind.
        """
        self._worker = await self._new_worker()
        self.served = self._worker.served
        self._supervisor = asyncio.create_task(self._supervise())
        return self

    async def _new_worker(self) -> WorkerProcess:
        attached = {name: str(run) for name, run in self._attached.items()}
        variables = {}
        if self._options.attaches:  # jobs train on the same card
            variables[CARD_SHARE] = f"{card_share(SERVING_SHARE) / self._options.engines:.3g}"
        to_load = (self._names, str(self._root), self._options, attached)
        return await WorkerProcess.start(to_load, self._note, **variables)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StreamEvent, None]:
        worker, key, call = self._worker, *self._open(request.n, "answer", request)
        try:
            while call.num_left:
                event = await call.next()
                call.num_left -= isinstance(event, Finished)
                yield event
        finally:
            del self._calls[key]
            if call.num_left:
                worker.send((key, "cancel"))

    async def read(self, model: str, texts: ToRead, **how: Any) -> Any:
        return await self._reply("read", model, texts, how)

    async def attach(self, name: str, run: Path) -> None:
        """Serve the result of a run on the base as `name`. Answers that are being written go on.

        Does nothing if `name` is served already. Raises RequestError if the run cannot be served.
        """
        if name not in self._attached:
            card = await self._reply("attach", name, str(run))
            self._attached[name] = run
            self.served = (*self.served, card)

    async def detach(self, name: str) -> None:
        """Stop serving `name`. Answers that are being written in its name are finished first."""
        self.served = tuple(card for card in self.served if card.name != name)
        if self._attached.pop(name, None) is not None:
            await self._reply("detach", name)

    async def _reply(self, *message: Any) -> Any:
        worker, key, call = self._worker, *self._open(0, *message)
        try:
            return await call.next()
        except asyncio.CancelledError:
            worker.send((key, "cancel"))
            raise
        finally:
            del self._calls[key]

    def _open(self, num_answers: int, verb: str, *words: Any) -> tuple[int, _Call]:
        """Send a message. Raises RequestError if there is no worker, or no room in the queue."""
        if self._is_closing:
            raise RequestError("the server is being stopped", status=503, code="shutting_down")
        if not self._worker.is_alive:
            message = "the engine is being started again: try in a moment"
            raise RequestError(message, status=503, code="engine_unavailable")
        if verb not in ("attach", "detach") and self.state().waiting >= self._options.queue:
            message = f"{self._options.queue} requests are waiting already: try again later"
            raise RequestError(message, status=429, code="queue_full")
        key = next(self._keys)
        call = self._calls[key] = _Call(num_answers)
        self._worker.send((key, verb, *words))
        return key, call

    def state(self) -> EngineState:
        started = [call for call in self._calls.values() if call.has_started]
        return EngineState(
            alive=self._worker.is_well,
            running=sum(call.num_left for call in started),
            waiting=len(self._calls) - len(started),
            restarts=self._restarts,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
        )

    async def close(self, grace_s: float) -> None:
        self._is_closing = True
        deadline = time.monotonic() + grace_s
        while self._calls and time.monotonic() < deadline and self._worker.is_alive:
            await asyncio.sleep(0.02)
        while not self._supervisor.done():  # wait_for of Python 3.11 loses a cancellation that meets its answer
            self._supervisor.cancel()
            await asyncio.wait((self._supervisor,), timeout=0.1)
        await asyncio.gather(self._supervisor, return_exceptions=True)
        self._fail_all("the server is being stopped", status=503, code="shutting_down")
        await self._worker.end()

    def _on_event(self, key: int, event: Any) -> None:
        call = self._calls.get(key)
        if isinstance(event, Started):
            self._prompt_tokens += event.prompt_tokens
        elif isinstance(event, Finished):
            self._completion_tokens += event.completion_tokens
        if call is not None:
            call.has_started = call.has_started or isinstance(event, Started)
            call.events.put_nowait(event)

    async def _supervise(self) -> None:
        """Pass on what the worker sends, and start a new one whenever it ends, until the engine is closed."""
        while True:
            try:
                while (events := await self._worker.next()) is not None:
                    for key, event in events:
                        self._on_event(key, event)
            except Exception as error:  # nobody knows where its next message begins
                self._note(f"a message of the engine cannot be read: {type(error).__name__}: {error}")
                await self._worker.end()
            why = await self._worker.ended()
            self._note(f"the engine ended ({why}) and is started again")
            message = f"the engine ended during this request ({why}); it is started again"
            self._fail_all(message, status=500, code="engine_crashed")
            while not self._worker.is_alive:
                self._restarts += 1
                try:
                    self._worker = await self._new_worker()
                except Exception as error:  # such as a full process table: the next try may succeed
                    self._note(f"the engine could not be started again: {error}")
                    await asyncio.sleep(RESTART_PAUSE_S)

    def _fail_all(self, message: str, *, status: int, code: str) -> None:
        for call in self._calls.values():
            waits = call.num_left and not call.has_started
            call.events.put_nowait(RequestError(message, status=503 if waits else status, code=code))
