"""The process that holds the models.

    python -m tunesmith.serve.worker

reads what to load and then requests from its standard input, and writes events to its standard output, as
`protocol.pack` makes them. It ends when its input ends: with the server, however that ends.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from tunesmith.environment.process import num_cpus, resident_bytes
from tunesmith.errors import InputError, TunesmithError
from tunesmith.generation.scheduler import PreparedRequest, Scheduler
from tunesmith.models.card import free_bytes
from tunesmith.serve.protocol import EngineOptions, GenerationRequest, RequestError, pack, unpack
from tunesmith.serve.registry import Registry, open_registry
from tunesmith.serve.served_model import Classifier, Embedder, ServedModel

WATCH_S = 0.5
BEAT_S, STUCK_S = 2.0, 90.0
"""Seconds between two signs of life, and without one until this process ends itself: the server does before."""
SCRATCH_BYTES, SCRATCH_ON_CARD = 256 * 1024**2, 1024 * 1024**2
"""For everything but weights, keys and values: on a card activations and logits of a step."""
USED_OF_CARD = 0.9
"""Share of a card's free memory for keys and values: pools are copied as they grow."""

Send = Callable[[Any], None]
Inbox = queue.SimpleQueue[Any]
"""Messages of the server, and calls of the second thread, to be done between two steps."""


def main() -> int:
    """Run the worker. Exit codes: 0 when its input ends; 1 if the models could not be loaded, which it
    reported."""
    send = _sender()
    names, root, options, attached = _receive()
    torch.set_num_threads(options.threads or num_cpus())
    limit = options.memory_limit_bytes or int(0.9 * psutil.virtual_memory().total)
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_watch, args=(limit,), daemon=True).start()
    wanted: set[int] = set()
    threading.Thread(target=_listen, args=(inbox, wanted), daemon=True).start()
    try:
        registry = open_registry(names, root=Path(root), options=options, note=send)
        worker = Worker(registry, options, inbox, send, wanted, limit=limit)
        for name, run in attached.items():
            try:
                registry.attach(registry.read_run(name, Path(run)))
            except TunesmithError as error:
                send(f"{name} is not served: {error}")
    except TunesmithError as error:
        send((InputError if isinstance(error, InputError) else TunesmithError)(str(error)))
        return 1
    send(tuple(model.card for model in registry.models.values()))
    threading.Thread(target=_beat, args=(send,), daemon=True).start()
    while True:
        worker.work()
        worker.step()


class Worker:
    """Answers messages, one step of all requests after another.

    Prompts are rendered and tokenized, and runs read, on a second thread: a megabyte of text takes a tokenizer
    seconds, for which the answers under way do not wait.
    """

    def __init__(
        self, registry: Registry, options: EngineOptions, inbox: Inbox, send: Send, wanted: set[int], *, limit: int
    ) -> None:
        self.inbox = inbox
        self._wanted = wanted
        self._registry = registry
        self._options = options
        self._send = send
        self._preparer = ThreadPoolExecutor(1)
        self._scores: dict[int, Iterator[Any]] = {}
        """Prompts that are scored, by the keys of their requests, see `ServedModel.score`."""
        decoders = [each for decoder in registry.decoders for each in (decoder, decoder.seeing) if each is not None]
        self._schedulers = {
            decoder: Scheduler(
                decoder,
                streams=options.streams,
                room=decoder.token_capacity(free_for_keys(decoder.model.device, limit) // len(decoders)),
            )
            for decoder in decoders
        }

    def work(self) -> None:
        """Do everything in the inbox; wait for something if there is nothing else to do."""
        with suppress(queue.Empty):
            while True:
                is_busy = self._scores or any(scheduler.is_busy for scheduler in self._schedulers.values())
                work = self.inbox.get(block=not is_busy)
                work() if callable(work) else self.take(*work)

    def take(self, key: int, verb: str, *words: Any) -> None:
        """Do, or start to do, what a message says."""
        if verb == "cancel":
            self._scores.pop(key, None)
            for scheduler in self._schedulers.values():
                scheduler.cancel(key)
        elif verb == "answer":
            self._preparer.submit(self._try, key, self._prepare, *words)
        elif verb == "attach":
            self._preparer.submit(self._try, key, self._read_run, *words)
        else:
            self._try(key, getattr(self, f"_{verb}"), *words)

    def _try(self, key: int, work: Callable[..., Any], *words: Any) -> None:
        """Call `work`. What it returns, or its error, which must not end others, is
        the answer to the request."""
        try:
            answer = work(key, *words)
        except RequestError as error:
            answer = error
        except TunesmithError as error:
            answer = RequestError(str(error), code="not_servable")
        except BaseException as error:  # libraries in Rust panic with one
            traceback.print_exc()
            if work in (self._read_run, self._attach):  # for a job, whose error says why; no request is quoted
                answer = RequestError(f"{type(error).__name__}: {error}", code="not_servable")
            else:
                message = f"the request could not be answered: {type(error).__name__}"
                answer = RequestError(message, status=500, code="internal_error")
        if answer is not None:
            self._wanted.discard(key)
            self._send(((key, answer),))

    def _prepare(self, key: int, request: GenerationRequest) -> None:
        if key in self._wanted:
            prepared = self._registry.find(request.model, ServedModel).prepare(key, request, self._options)
            self.inbox.put(partial(self._try, key, self._start, prepared))

    def _start(self, key: int, request: PreparedRequest) -> None:
        if key in self._wanted:
            self._wanted.discard(key)
            # It can have been removed meanwhile.
            model = self._registry.find(request.sampling.model, ServedModel)
            self._schedulers[model.decoder_of(request)].add(request)

    def _read_run(self, key: int, name: str, run: str) -> None:
        self.inbox.put(partial(self._try, key, self._attach, self._registry.read_run(name, Path(run))))

    def _attach(self, key: int, model: ServedModel) -> Any:
        self._registry.attach(model)
        return model.card

    def _detach(self, key: int, name: str) -> Any:
        self._registry.detach(name)
        return name

    def _read(self, key: int, model: str, texts: Sequence[Any], how: Mapping[str, Any]) -> Any:
        def done(num: int) -> None:
            if key not in self._wanted:
                raise RequestError("the client has gone away", status=499)

        done(0)
        served = self._registry.models.get(model)
        if isinstance(served, Embedder):
            return served.embed(texts, done, **how)
        if isinstance(served, ServedModel) and "top" in how:
            self._scores[key] = served.score(texts, **how)  # `step` reads it
            return None
        return self._registry.find(model, Classifier).classify(texts, done)

    def _score_on(self, key: int) -> Any:
        """The scores of a prompt, once its last piece is read; until then others have their turns."""
        reading = self._scores.pop(key)
        if (scores := next(reading)) is None:
            self._scores[key] = reading
        return scores

    def step(self) -> None:
        """One step of all answers under way, and a piece of a prompt that is scored; sends its events."""
        busy = [scheduler for scheduler in self._schedulers.values() if scheduler.is_busy]
        if self._scores:
            self._try(next(iter(self._scores)), self._score_on)
        elif not busy:
            self._registry.drop_detached()
        if events := [event for scheduler in busy for event in scheduler.step()]:
            self._send(tuple(events))


def free_for_keys(device: torch.device, limit: int) -> int:
    """Bytes for keys and values once the weights are loaded: of the card where the model is on one,
    else of what this process may hold."""
    if device.type != "cuda":
        return limit - resident_bytes() - SCRATCH_BYTES
    return int(USED_OF_CARD * (free_bytes(device) - torch.cuda.memory_allocated(device) - SCRATCH_ON_CARD))


def _receive() -> Any:
    """The next message; ends this process, whatever it does, when its input ends."""
    line = sys.stdin.buffer.readline()
    if not line:
        os._exit(0)
    return unpack(line)


def _listen(inbox: Inbox, wanted: set[int]) -> None:
    """Put messages into the inbox. `wanted`: keys of those that were not cancelled or answered yet."""
    while True:
        key, verb, *_ = message = _receive()
        (wanted.discard if verb == "cancel" else wanted.add)(key)
        inbox.put(message)


def _watch(limit: int) -> None:
    """End this process at its limit of resident memory: a limit on addresses would count mapped files."""
    while (held := resident_bytes()) <= limit:
        time.sleep(WATCH_S)
    sys.stderr.write(f"it held {held / 2**20:,.0f} MiB of memory, more than the {limit / 2**20:,.0f} it may\n")
    sys.stderr.flush()
    os._exit(1)


def _beat(send: Send) -> None:
    """Let the server hear that this process is not stuck: an operation that keeps
    Python's lock stops this thread too.

    Then it ends itself after a while, whether or not a server is left to end it.
    """
    while True:
        faulthandler.dump_traceback_later(STUCK_S, exit=True)
        send(())
        time.sleep(BEAT_S)


def _sender() -> Send:
    """A function that writes to the original standard output. From now on, what libraries print goes to
    standard error."""
    out, lock = os.fdopen(os.dup(1), "wb"), threading.Lock()
    os.dup2(2, 1)

    def send(message: object) -> None:
        try:
            with lock:
                out.write(pack(message))
                out.flush()
        except BrokenPipeError:  # the server has ended
            os._exit(0)

    return send


if __name__ == "__main__":
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)  # the interpreter's own end would wait for stdin, which `_listen` holds, and abort
