"""The process that holds the models.

    python -m tunesmith.serve.worker

reads what to load and then requests from its standard input, and writes events to its standard output, a JSON object on
each line. It ends when its input ends: with the server, however that ends.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import psutil
import torch

from tunesmith.environment import num_cpus, resident_bytes
from tunesmith.errors import InputError, TunesmithError
from tunesmith.serve.protocol import EngineOptions, GenerationRequest, RequestError, encode_event, encode_line
from tunesmith.serve.registry import AttachableRun, Registry, open_registry
from tunesmith.serve.scheduler import PreparedRequest, Scheduler
from tunesmith.serve.served_model import Classifier, Embedder, ServedModel

WATCH_S, IDLE_WATCH_S = 0.2, 1.0
"""Idle, it leaves the cores to a run."""
SCRATCH_BYTES = 256 * 1024**2
"""For everything but weights, keys and values."""
OVER_MEMORY = 3
"""Exit code of a worker that took more memory than it may."""

Send = Callable[[Mapping[str, Any]], None]


def main() -> int:
    """0: its input ended; 1: the models could not be loaded, which was reported."""
    send = _sender()
    start = orjson.loads(sys.stdin.buffer.readline())
    options = EngineOptions(**start["options"])
    torch.set_num_threads(options.threads or num_cpus())
    limit = options.memory_limit_bytes or int(0.9 * psutil.virtual_memory().total)
    busy = threading.Event()
    busy.set()
    threading.Thread(target=_watch, args=(send, limit, busy), daemon=True).start()
    try:
        root, names = Path(start["root"]), start["names"]
        registry = open_registry(names, root=root, options=options, note=lambda text: send({"note": text}))
        worker = Worker(registry, options, send, busy, limit=limit)
        for name, run in start["attached"].items():
            try:
                registry.attach(registry.read_run(name, Path(run)))
            except (TunesmithError, RequestError) as error:
                send({"note": f"{name} is not served: {error}"})
    except TunesmithError as error:
        send({"failed": str(error), "is_input": isinstance(error, InputError)})
        return 1
    send({"ready": [model.card for model in registry.models.values()]})
    threading.Thread(target=_listen, args=(worker.inbox,), daemon=True).start()
    while True:
        for message in worker.messages():
            worker.take(message)
        worker.step()


class Worker:
    """Answers messages, one step of all requests after another.

    Prompts are rendered and tokenized on a second thread, and those with a schema to compile on a third: a megabyte of
    text takes a tokenizer seconds, for which the answers under way do not wait, nor does a prompt for a schema.
    """

    def __init__(
        self, registry: Registry, options: EngineOptions, send: Send, busy: threading.Event, *, limit: int
    ) -> None:
        """`busy` is set but while there is nothing to do."""
        self.inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._registry = registry
        self._options = options
        self._send = send
        self._busy = busy
        self._preparing: set[int] = set()
        self._plain_preparer, self._schema_preparer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        decoders = registry.decoders
        free = limit - resident_bytes() - SCRATCH_BYTES
        self._schedulers = {
            decoder: Scheduler(decoder, streams=options.streams, room=decoder.token_capacity(free // len(decoders)))
            for decoder in decoders
        }

    def messages(self) -> Iterator[dict[str, Any]]:
        """Everything in the inbox; waits for something if there is nothing else to do."""
        with suppress(queue.Empty):
            while True:
                is_idle = not any(scheduler.is_busy for scheduler in self._schedulers.values())
                if is_idle:
                    self._busy.clear()
                message = self.inbox.get(block=is_idle)
                self._busy.set()
                yield message

    def take(self, message: dict[str, Any]) -> None:
        """Do, or start to do, what a message says."""
        if "cancel" in message:
            self._preparing.discard(message["cancel"])
            for scheduler in self._schedulers.values():
                scheduler.cancel(message["cancel"])
        elif "request" in message:
            self._preparing.add(message["key"])
            has_schema = message["request"].get("json_schema") is not None
            (self._schema_preparer if has_schema else self._plain_preparer).submit(self.prepare, message)
        elif "attach" in message:
            self._plain_preparer.submit(self.read_run, message)
        elif "attachable" in message:
            self._attach(message["key"], message["attachable"])
        elif "detach" in message:
            self._registry.detach(message["detach"])
            self._send({"reply": message["key"], "value": None})
        elif "prepared" in message:
            if message["key"] in self._preparing:
                self._preparing.discard(message["key"])
                self._start(message["key"], message["prepared"])
        else:
            try:
                self._send({"reply": message["key"], "value": self._read(message)})
            except RequestError as error:
                self._refuse(message["key"], error)

    def prepare(self, message: Mapping[str, Any]) -> None:
        """Put a request, ready for its scheduler, or its error into the inbox. Runs on a thread of its own."""
        key = message["key"]
        if key not in self._preparing:
            return
        prepared: Any
        try:
            request = GenerationRequest(**message["request"])
            model = self._registry.find(request.model, ServedModel)
            prepared = model, model.prepare(key, request, self._options)
        except RequestError as error:
            prepared = error
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # another shape than it should have
            prepared = RequestError(f"the request cannot be read: {error}")
        except BaseException as error:  # one request's error must not end the others
            traceback.print_exc()
            message_ = f"the request could not be prepared: {type(error).__name__}"
            prepared = RequestError(message_, status=500, code="internal_error")
        self.inbox.put({"key": key, "prepared": prepared})

    def read_run(self, message: Mapping[str, Any]) -> None:
        """Put a run, read and checked, or the reason why it cannot be served into the inbox. Runs on a thread."""
        found: Any
        try:
            found = self._registry.read_run(message["attach"], Path(message["run"]))
        except Exception as error:  # a damaged run must not end the answers of others
            found = error
        self.inbox.put({"key": message["key"], "attachable": found})

    def _attach(self, key: int, found: AttachableRun | Exception) -> None:
        try:
            if isinstance(found, Exception):
                raise found
            self._registry.attach(found)
        except Exception as error:  # as above
            self._send({"reply": key, "error": str(error) or type(error).__name__})
        else:
            self._send({"reply": key, "value": found.model.card})

    def _start(self, key: int, prepared: tuple[ServedModel, PreparedRequest] | RequestError) -> None:
        if isinstance(prepared, RequestError):
            return self._refuse(key, prepared)
        model, request = prepared
        if self._registry.models.get(model.card.name) is not model:
            message = f"the model {model.card.name} was removed"
            return self._refuse(key, RequestError(message, status=404, code="model_not_found", param="model"))
        scheduler = self._schedulers[model.decoder]
        if scheduler.could_hold(request):
            return scheduler.add(request)
        message = (
            f"{request.n} answers of up to {request.max_new_tokens:,} tokens to a prompt of {len(request.prompt):,} do "
            "not fit into the memory of this server: lower max_tokens or n"
        )
        self._refuse(key, RequestError(message, code="context_length_exceeded", param="max_tokens"))

    def _read(self, message: Mapping[str, Any]) -> Any:
        if "texts" in message:
            texts = [text if isinstance(text, str) else (text[0], text[1]) for text in message["texts"]]
            return self._registry.find(message["model"], Classifier).classify(texts)
        return self._registry.find(message["model"], Embedder).embed(message["passages"], **message["how"])

    def _refuse(self, key: int, error: RequestError) -> None:
        self._send({"events": [[key, *encode_event(error)]]})

    def step(self) -> None:
        """One step of all answers under way; sends its events."""
        busy = [scheduler for scheduler in self._schedulers.values() if scheduler.is_busy]
        if not busy:
            self._registry.drop_detached()
        if events := [event for scheduler in busy for event in scheduler.step()]:
            self._send({"events": [[key, *encode_event(event)] for key, event in events]})


def _listen(inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass on all messages until the input ends: then this process ends, whatever it does."""
    for line in sys.stdin.buffer:
        inbox.put(orjson.loads(line))
    os._exit(0)


def _watch(send: Send, limit: int, busy: threading.Event) -> None:
    """Send heartbeats with the resident memory; end at the limit, since one on addresses would count mapped files."""
    while True:
        held = resident_bytes()
        send({"rss": held})
        if held > limit:
            mib, most = held / 2**20, limit / 2**20
            send({"over_memory": f"it held {mib:,.0f} MiB of memory, more than the {most:,.0f} it may", "rss": held})
            os._exit(OVER_MEMORY)
        busy.wait(IDLE_WATCH_S)
        time.sleep(WATCH_S)


def _sender() -> Send:
    """A function that writes to the original standard output; what libraries print goes to standard error from now."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(message: Mapping[str, Any]) -> None:
        text = memoryview(encode_line(message))
        try:
            with lock:
                while text:
                    text = text[out.write(text) or 0 :]
        except BrokenPipeError:  # the server has ended
            os._exit(0)

    return send


if __name__ == "__main__":
    sys.exit(main())
