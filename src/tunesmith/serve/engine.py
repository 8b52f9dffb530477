"""The server's side of the engine: a worker process that holds the models, started again when it dies."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson

from tunesmith.environment import for_child
from tunesmith.errors import InputError, TunesmithError
from tunesmith.serve.protocol import (
    Delta,
    EngineOptions,
    EngineState,
    Finished,
    GenerationRequest,
    ModelCard,
    RequestError,
    Started,
    StreamEvent,
    decode_event,
    encode_line,
)

START_TIMEOUT_S = 300.0
"""Without a message while the worker loads: importing torch from a slow disk takes longest."""
END_TIMEOUT_S = 5.0
UNHEALTHY_S, HANGS_S = 15.0, 60.0
"""Without a heartbeat, of which a worker sends several a second, or nearly one: unhealthy, then ended."""
WATCH_S = 1.0
MAX_PAUSE_S = 30.0
LONG_LIFE_S = 60.0
"""A worker that lived so long is started again at once."""
MAX_UNREAD = 32_768
"""Events and listed log probabilities that may wait for a client that does not read: some 10 MiB."""
MAX_LINE_BYTES = 1 << 28
MAX_PRINTED = 20
"""Lines of the worker's output kept for the reason of its end."""

Note = Callable[[str], None]


class WorkerProcess:
    """A worker from its start to its end, and the pipes to it. Made by `start`."""

    def __init__(self, process: asyncio.subprocess.Process, on_message: Callable[[dict[str, Any]], None]) -> None:
        self.served: Sequence[ModelCard] = ()
        self.rss_bytes = 0
        self.is_alive = True
        self.last_heard = time.monotonic()
        self.process = process
        self._on_message = on_message
        self._why_ended = ""
        self._printed: deque[str] = deque(maxlen=MAX_PRINTED)
        self._tasks = [asyncio.create_task(self._collect_output())]

    @classmethod
    async def start(
        cls, start_line: bytes, *, on_message: Callable[[dict[str, Any]], None], on_note: Note
    ) -> WorkerProcess:
        """A worker that has loaded and checked its models. Raises TunesmithError if it could not."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tunesmith.serve.worker",
            stdin=pipe, stdout=pipe, stderr=pipe,
            env=for_child(TOKENIZERS_PARALLELISM="false"),
            limit=MAX_LINE_BYTES,
            start_new_session=True,  # Ctrl-C is for the server, which finishes what is under way
        )  # fmt: skip
        worker = cls(process, on_message)
        try:
            worker._write(start_line)
            await worker._become_ready(on_note)
        except BaseException:
            await worker.end()
            raise
        worker._tasks.append(asyncio.create_task(worker._read()))
        return worker

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; does nothing if the worker has just ended."""
        self._write(encode_line(message))

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self.last_heard

    def kill(self, why: str) -> None:
        """End a worker that does not end by itself; `ended` returns the reason."""
        self._why_ended = why
        with suppress(ProcessLookupError):
            self.process.kill()

    async def ended(self) -> str:
        """The reason of the worker's end, once it has ended."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        self.is_alive = False
        if any(not task.cancelled() and task.exception() for task in done):
            self.kill("it sent a message that cannot be read")
        code = await self.process.wait()
        if self._why_ended:
            return self._why_ended
        if code < 0:
            with suppress(ValueError):
                return f"ended by {signal.Signals(-code).name}"
        return f"exit code {code}" + (f": {self._printed[-1]}" if self._printed else "")

    async def end(self) -> None:
        """Close the worker's input, which ends it, and wait."""
        self.is_alive = False
        assert self.process.stdin is not None, "it has a pipe"
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), END_TIMEOUT_S)
        except asyncio.TimeoutError:
            self.process.kill()
            await self.process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _write(self, text: bytes) -> None:
        assert self.process.stdin is not None, "it has a pipe"
        with suppress(OSError, RuntimeError):  # it has ended, which `ended` reports
            self.process.stdin.write(text)

    async def _become_ready(self, on_note: Note) -> None:
        while True:
            try:
                message = await asyncio.wait_for(self._message(), START_TIMEOUT_S)
            except asyncio.TimeoutError:
                raise TunesmithError(
                    f"the engine sent nothing for {START_TIMEOUT_S:g} s while it was loading: it hangs, perhaps in the "
                    "model's chat template."
                ) from None
            if message is None:
                raise TunesmithError(f"the engine ended before it was ready: {await self.ended()}.")
            if "failed" in message:
                raise (InputError if message["is_input"] else TunesmithError)(message["failed"])
            if "note" in message:
                on_note(message["note"])
            if "ready" in message:
                self.served = tuple(ModelCard(**card) for card in message["ready"])
                return

    async def _read(self) -> None:
        while (message := await self._message()) is not None:
            if "rss" not in message:
                self._on_message(message)
        self.is_alive = False

    async def _message(self) -> dict[str, Any] | None:
        """The worker's next message; None: it has ended."""
        assert self.process.stdout is not None, "it has a pipe"
        text = await self.process.stdout.readline()
        if not text.endswith(b"\n"):
            return None
        message: dict[str, Any] = orjson.loads(text)
        self.last_heard = time.monotonic()
        self.rss_bytes = message.get("rss", self.rss_bytes)
        self._why_ended = message.get("over_memory", self._why_ended)
        return message

    async def _collect_output(self) -> None:
        assert self.process.stderr is not None, "it has a pipe"
        while chunk := await self.process.stderr.read(1 << 16):
            self._printed.extend(line for line in chunk.decode("utf-8", "replace").splitlines() if line.strip())


@dataclass(eq=False)
class _Call:
    """A request under way; one that is not for generation has a single event, its reply."""

    n: int = 1
    is_generation: bool = True
    events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    num_unread: int = 0
    is_abandoned: bool = False
    has_started: bool = False
    num_finished: int = 0


async def start_engine(
    names: Sequence[str],
    *,
    root: Path,
    options: EngineOptions,
    attached: Mapping[str, Path] = MappingProxyType({}),
    on_note: Note = lambda text: None,
) -> WorkerEngine:
    """An engine over a worker process, ready for requests.

    `names`: run names or folders, model folders or hub ids; the runs share one base, which is served too. `root`: the
    folder of runs. `attached`: runs to attach from the start, by the names to serve them as. `on_note`: receives a line
    for each thing the user should know, such as a restart.
    Raises InputError or TunesmithError if a name cannot be served; no worker is left then.
    """
    engine = WorkerEngine(names, root=root, options=options, attached=attached, on_note=on_note)
    await engine.start()
    return engine


class WorkerEngine:
    """`protocol.Engine` over a worker process."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        root: Path,
        options: EngineOptions,
        attached: Mapping[str, Path] = MappingProxyType({}),
        on_note: Note,
    ) -> None:
        self.served: Sequence[ModelCard] = ()
        self._to_load = {"names": list(names), "root": str(root), "options": asdict(options)}
        self._attached = {name: str(run) for name, run in attached.items()}
        self._options = options
        self._note = on_note
        self._worker: WorkerProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._keys = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._is_closing = False
        self._restarts = self._prompt_tokens = self._completion_tokens = 0

    async def start(self) -> None:
        """Start the first worker; raises its error."""
        self._worker = await self._new_worker()
        self.served = self._worker.served
        self._supervisor = asyncio.create_task(self._supervise())

    async def _new_worker(self) -> WorkerProcess:
        line = encode_line({**self._to_load, "attached": self._attached})
        return await WorkerProcess.start(line, on_message=self._on_message, on_note=self._note)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StreamEvent, None]:
        """See protocol.Engine."""
        worker, key, call = self._open(_Call(request.n))
        worker.send({"key": key, "request": request})
        is_over = False
        try:
            while not is_over:
                event = await call.events.get()
                call.num_unread -= _weight(event)
                call.num_finished += isinstance(event, Finished)
                is_over = isinstance(event, RequestError) or call.num_finished == call.n
                if isinstance(event, RequestError):
                    raise event
                yield event
        finally:
            self._calls.pop(key, None)
            if not is_over and worker.is_alive:
                worker.send({"cancel": key})

    async def classify(self, model: str, texts: Sequence[str | tuple[str, str]]) -> list[Mapping[str, Any]]:
        """See protocol.Engine."""
        lines: list[Mapping[str, Any]] = await self._reply({"model": model, "texts": list(texts)})
        return lines

    async def embed(
        self, model: str, texts: Sequence[str], *, dimensions: int | None = None, is_query: bool = False
    ) -> tuple[list[list[float]], int]:
        """See protocol.Engine."""
        how = {"dimensions": dimensions, "is_query": is_query}
        vectors, num_tokens = await self._reply({"model": model, "passages": list(texts), "how": how})
        return vectors, num_tokens

    async def attach(self, name: str, run: Path) -> None:
        """Serve the result of a run on the base as `name`, without disturbing the answers under way.

        Does nothing if `name` is served already. Raises RequestError if the run cannot be served.
        """
        if name not in self._attached:
            card = await self._reply({"attach": name, "run": str(run)}, waits_in_queue=False)
            self._attached[name] = str(run)
            self.served = (*self.served, ModelCard(**card))

    async def detach(self, name: str) -> None:
        """Serve `name` no longer; answers under way in its name are finished."""
        self.served = tuple(card for card in self.served if card.name != name)
        if self._attached.pop(name, None) is not None:
            await self._reply({"detach": name}, waits_in_queue=False)

    async def _reply(self, message: Mapping[str, Any], *, waits_in_queue: bool = True) -> Any:
        worker, key, call = self._open(_Call(is_generation=False), waits_in_queue=waits_in_queue)
        try:
            worker.send({"key": key, **message})
            event = await call.events.get()
        finally:
            self._calls.pop(key, None)
        if isinstance(event, RequestError):
            raise event
        return event

    def _open(self, call: _Call, *, waits_in_queue: bool = True) -> tuple[WorkerProcess, int, _Call]:
        """Raises RequestError if there is no worker, or no room in the queue."""
        if self._is_closing:
            raise RequestError("the server is being stopped", status=503, code="shutting_down")
        if self._worker is None or not self._worker.is_alive:
            message = "the engine is being started again: try in a moment"
            raise RequestError(message, status=503, code="engine_unavailable")
        if waits_in_queue and self.state().waiting >= self._options.queue:
            message = f"{self._options.queue} requests are waiting already: try again later"
            raise RequestError(message, status=429, code="queue_full")
        key = next(self._keys)
        self._calls[key] = call
        return self._worker, key, call

    def state(self) -> EngineState:
        """See protocol.Engine."""
        started = [call for call in self._calls.values() if call.has_started]
        worker = self._worker
        is_alive = worker is not None and worker.is_alive and worker.silent_s < UNHEALTHY_S
        return EngineState(
            alive=is_alive,
            running=sum(call.n - call.num_finished for call in started),
            waiting=len(self._calls) - len(started),
            restarts=self._restarts,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            rss_bytes=worker.rss_bytes if worker is not None and is_alive else 0,
        )

    async def close(self, grace_s: float) -> None:
        """See protocol.Engine."""
        self._is_closing = True
        deadline = time.monotonic() + grace_s
        while self._calls and time.monotonic() < deadline and self._worker and self._worker.is_alive:
            await asyncio.sleep(0.02)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._fail_all("the server is being stopped", status=503, code="shutting_down")
        if self._worker is not None:
            await self._worker.end()

    def _on_message(self, message: dict[str, Any]) -> None:
        """A reply, or the events of a step."""
        if "reply" in message:
            if call := self._calls.get(message["reply"]):
                failed = RequestError(message["error"], code="not_servable") if "error" in message else None
                call.events.put_nowait(failed or message["value"])
            return
        for key, name, fields in message["events"]:
            event = decode_event(name, fields)
            if isinstance(event, Started):
                self._prompt_tokens += event.prompt_tokens
            elif isinstance(event, Finished):
                self._completion_tokens += event.completion_tokens
            call = self._calls.get(key)
            if call is None or call.is_abandoned:
                continue
            call.has_started = call.has_started or isinstance(event, Started)
            call.events.put_nowait(event)
            call.num_unread += _weight(event)
            if call.num_unread > MAX_UNREAD:
                call.is_abandoned = True
                call.events = asyncio.Queue()
                message_ = "the answer was not read, and was abandoned"
                call.events.put_nowait(RequestError(message_, status=408, code="unread"))
                if self._worker is not None:
                    self._worker.send({"cancel": key})

    async def _supervise(self) -> None:
        """Start a new worker whenever one ends, until the engine is closed."""
        num_short = 0
        while True:
            assert self._worker is not None, "it has been started"
            started = time.monotonic()
            watching = asyncio.create_task(_watch(self._worker))
            try:
                why = await self._worker.ended()
            finally:
                watching.cancel()
            self._note(f"the engine ended ({why}) and is started again")
            message = f"the engine ended during this request ({why}); it is started again"
            self._fail_all(message, status=500, code="engine_crashed")
            num_short = 0 if time.monotonic() - started > LONG_LIFE_S else num_short + 1
            num_tries = num_short
            while not self._worker.is_alive:
                await asyncio.sleep(min(MAX_PAUSE_S, 0.25 * 2**num_tries) if num_tries > 1 else 0)
                num_tries += 1
                self._restarts += 1
                try:
                    self._worker = await self._new_worker()
                except Exception as error:  # a full process table, a damaged pipe: the next try may succeed
                    self._note(f"the engine could not be started again: {error}")

    def _fail_all(self, message: str, *, status: int, code: str) -> None:
        for call in self._calls.values():
            waits = call.is_generation and not call.has_started
            error = RequestError(message, status=503 if waits else status, code=code)
            call.events.put_nowait(error)


def _weight(event: StreamEvent | RequestError) -> int:
    return 1 + sum(1 + len(token.top) for token in event.tokens) if isinstance(event, Delta) else 1


async def _watch(worker: WorkerProcess) -> None:
    """End a worker that hangs."""
    while True:
        started = time.monotonic()
        await asyncio.sleep(WATCH_S)
        if time.monotonic() - started > WATCH_S + UNHEALTHY_S / 2:
            worker.last_heard = time.monotonic()  # the server itself was stopped, and has not read yet
        elif worker.silent_s > HANGS_S:
            return worker.kill(f"it sent nothing for {HANGS_S:g} s")
