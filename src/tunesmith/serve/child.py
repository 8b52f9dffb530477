"""The process that holds the models.

    python -m tunesmith.serve.child

reads what to load and then asks from its standard input, and writes what comes of them to its standard output, a line
each (`wire`). It ends when its input does: with the server, however that ends.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tunesmith.environment import num_cpus, resident_bytes
from tunesmith.errors import TunesmithError
from tunesmith.serve import wire
from tunesmith.serve.ahead import Ahead, Made, Ready
from tunesmith.serve.batch import Batch, Job
from tunesmith.serve.protocol import EngineOptions, Refused
from tunesmith.serve.serving import Serving, open_serving

WATCH_S = 0.2
SCRATCH_BYTES = 256 * 1024**2
"""For all that is not weights, keys and values."""
OVER_MEMORY = 3
"""Exit code of a child that took more memory than it may."""

Send = Callable[[Mapping[str, Any]], None]


def main() -> int:
    """0: its input ended; 1: what was named cannot be served, which was said."""
    send = _sender()
    told = wire.parse(sys.stdin.buffer.readline())
    options = wire.as_options(told["options"])
    torch.set_num_threads(options.threads or num_cpus())
    limit = options.memory_limit_bytes or int(0.9 * _machine_bytes())
    _be_the_first_to_go()
    pulse = _Pulse()
    threading.Thread(target=_watch, args=(send, limit, pulse), daemon=True).start()
    try:
        serving = open_serving(
            told["names"], root=Path(told["root"]), options=options, note=lambda text: send({"note": text})
        )
        worker = _Worker(serving, options, send, limit=limit)
    except TunesmithError as error:
        send({"failed": wire.error_fields(error)})
        return 1
    send({"ready": [asdict(served) for served in serving.served]})
    inbox: queue.SimpleQueue[dict[str, Any] | Made] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, Ahead(worker.job, inbox.put), inbox), daemon=True).start()
    while True:
        for message in _messages(inbox, wait=not worker.is_busy):
            with pulse.beating():
                worker.take(message)
        with pulse.beating():
            worker.step()


class _Pulse:
    """How long what this process does now has taken."""

    def __init__(self) -> None:
        self._since: float | None = None

    @contextmanager
    def beating(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    @property
    def seconds(self) -> float:
        since = self._since
        return 0.0 if since is None else time.monotonic() - since


class _Worker:
    """What is asked, answered."""

    def __init__(self, serving: Serving, options: EngineOptions, send: Send, *, limit: int) -> None:
        self._serving = serving
        self._options = options
        self._send = send
        free = limit - resident_bytes() - SCRATCH_BYTES
        decoders = serving.decoders
        self._batches = {
            decoder: Batch(decoder, streams=options.streams, room=decoder.tokens_in(free // len(decoders)))
            for decoder in decoders
        }

    @property
    def is_busy(self) -> bool:
        return any(batch.is_busy for batch in self._batches.values())

    def job(self, message: Mapping[str, Any], is_wanted: Callable[[], bool]) -> Ready:
        """The ask of a message as the batch takes it, on any thread. Raises Refused."""
        ask = wire.as_ask(message["ask"])
        voice = _named(self._serving.voices, ask.model, "answers in text")
        job: Job = voice.job(message["key"], ask, self._options, is_wanted)
        batch = self._batches[voice.decoder]
        if not batch.could_hold(job):
            raise Refused(
                f"{job.n} answers of up to {job.max_new_tokens:,} tokens to a prompt of {len(job.prompt):,} do not fit "
                "into the memory of this server: lower max_tokens or n",
                status=400, code="context_length_exceeded", param="max_tokens",
            )  # fmt: skip
        return batch, job

    def take(self, message: dict[str, Any] | Made) -> None:
        """Do, or begin to do, what a message asks."""
        if isinstance(message, tuple):
            key, made = message
            if isinstance(made, Refused):
                self._refuse(key, made)
            else:
                batch, job = made
                batch.add(job)
        elif "cancel" in message:
            for batch in self._batches.values():
                batch.cancel(message["cancel"])
        else:
            try:
                self._send({"reply": message["key"], "value": self._read(message)})
            except Refused as refusal:
                self._refuse(message["key"], refusal)

    def _read(self, message: Mapping[str, Any]) -> Any:
        """What models that read say of texts. Raises Refused."""
        if "classify" in message:
            texts = [text if isinstance(text, str) else (text[0], text[1]) for text in message["classify"]]
            return _named(self._serving.labellers, message["model"], "answers with labels").classify(texts)
        return _named(self._serving.embedders, message["model"], "gives embeddings").embed(message["embed"])

    def _refuse(self, key: int, refusal: Refused) -> None:
        self._send({"news": [[key, wire.told_fields(refusal)]]})

    def step(self) -> None:
        """One step of all answers under way, and word of it."""
        news = [one for batch in self._batches.values() if batch.is_busy for one in batch.step()]
        if news:
            self._send({"news": [[key, wire.told_fields(told)] for key, told in news]})


def _named(models: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in models:
        raise Refused(f"no model {name} here {what}", status=404, code="model_not_found", param="model")
    return models[name]


def _messages(inbox: queue.SimpleQueue[Any], *, wait: bool) -> Iterator[Any]:
    """What has come in; with `wait` at least one."""
    if wait:
        yield inbox.get()
    with suppress(queue.Empty):
        while True:
            yield inbox.get_nowait()


def _listen(source: BinaryIO, ahead: Ahead, inbox: queue.SimpleQueue[Any]) -> None:
    """Everything that the server says, until it says nothing any more: then this process ends, whatever it is at."""
    for line in source:
        message = wire.parse(line)
        if "ask" in message:
            ahead.add(message)
        elif "cancel" not in message or not ahead.cancel(message["cancel"]):
            inbox.put(message)
    os._exit(0)


def _watch(send: Send, limit: int, pulse: _Pulse) -> None:
    """Say that this process lives, and how much memory it holds; end at the limit.

    A limit on addresses would count files that are only mapped.
    """
    while True:
        held = resident_bytes()
        send({"rss": held, "stuck": pulse.seconds})
        if held > limit:
            send({"over_memory": {"held": held, "limit": limit}})
            os._exit(OVER_MEMORY)
        time.sleep(WATCH_S)


def _sender() -> Send:
    """Writes messages to what was the standard output; what libraries print goes with their warnings from now on."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(message: Mapping[str, Any]) -> None:
        text = memoryview(wire.line(message))
        try:
            with lock:
                while text:
                    text = text[out.write(text) or 0 :]
        except BrokenPipeError:  # nobody listens any more
            os._exit(0)

    return send


def _be_the_first_to_go() -> None:
    """Where the machine runs out of memory, Linux ends this process and not the server."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def _machine_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 1 << 62


if __name__ == "__main__":
    sys.exit(main())
