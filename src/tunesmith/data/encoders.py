"""Chunks encoded by processes beside this one, in order; what fails there is encoded here."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, TypeVar

import orjson

from tunesmith.data.chunks import Chunk, Encoded, chunk_bytes, encode, encoded_of
from tunesmith.data.encoder_process import identity, read_frame, write_frame
from tunesmith.data.render import Renderer
from tunesmith.environment import for_child, num_cpus

WORTH_BYTES = 16 * 1024**2
"""Of files from which on processes are worth their start: about five seconds of one."""
MOST = 8
"""Processes by themselves: this one reads for them and writes, and feeds no more."""
END_S = 5.0
LAST_BYTES = 2000


class HasChunk(Protocol):
    """What is encoded, and whatever else its reader has to say."""

    @property
    def chunk(self) -> Chunk: ...


R = TypeVar("R", bound=HasChunk)


def how_many(asked: int | None, *, num_bytes: int) -> int:
    """Processes for files of this size; 1: this one alone. `asked`: data.num_proc."""
    if asked is not None:
        return asked
    return min(num_cpus(), MOST) if num_bytes >= WORTH_BYTES else 1


def encode_all(
    reads: Iterator[R], renderer: Renderer, *, num_proc: int, on_note: Callable[[str], None]
) -> Generator[tuple[R, Encoded], None, None]:
    """What is read, in order, and what became of its chunk. Raises as `encode`.

    With several processes the same rows, problems and errors as with one: a chunk that a process fails at, in whatever
    way, is encoded here.
    """
    if num_proc == 1:
        for read in reads:
            yield read, encode(renderer, read.chunk)
        return
    pool = _Pool(renderer, num_proc)
    on_note(f"rows are encoded by {num_proc} processes (data.num_proc)")
    try:
        for read, encoded in pool.in_order(reads):
            while pool.failures:
                on_note(f"a process that encodes rows {pool.failures.popleft()}: its rows are encoded without it")
            yield read, encode(renderer, read.chunk) if encoded is None else encoded
    finally:
        pool.close()


class _Pool:
    """Threads that wait, each for a process."""

    def __init__(self, renderer: Renderer, num_proc: int) -> None:
        self.failures: deque[str] = deque()
        self._folder = tempfile.TemporaryDirectory(prefix="tunesmith-tokenizer-")
        self._most_ahead = 2 * num_proc
        self._threads = ThreadPoolExecutor(num_proc, thread_name_prefix="tunesmith-encoder")
        self._free: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        self._processes: list[_Process] = []
        renderer.tokenizer.save_pretrained(self._folder.name)
        options = {
            "kind": renderer.kind,
            "max_tokens": renderer.max_tokens,
            "too_long": renderer.too_long,
            "control_tokens": renderer.control_tokens,
            "stride": renderer.stride,
            "prompt": renderer.prompt,
            "date": renderer.date,
        }
        start = orjson.dumps({"folder": self._folder.name, "task": renderer.task_name, "options": options})
        expected = identity(renderer)
        for _ in range(num_proc):
            self._processes.append(_Process(start, expected))
            self._free.put(self._processes[-1])

    def in_order(self, reads: Iterator[R]) -> Iterator[tuple[R, Encoded | None]]:
        """None for a chunk that could not be encoded."""
        ahead: deque[tuple[R, Future[Encoded | None]]] = deque()
        for read in reads:
            ahead.append((read, self._threads.submit(self._encode, read.chunk)))
            if len(ahead) > self._most_ahead:
                first, result = ahead.popleft()
                yield first, result.result()
        for read, result in ahead:
            yield read, result.result()

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            process.end()
        self._threads.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def _encode(self, chunk: Chunk) -> Encoded | None:
        process = self._free.get()
        if process is None:  # one that is no more
            self._free.put(None)
            return None
        try:
            encoded = process.encode(chunk)
        except (OSError, EOFError, ValueError, _OtherRowsError) as error:
            self.failures.append(process.why(error))
            process.end()
            self._free.put(None)
            return None
        self._free.put(process)
        return encoded


class _OtherRowsError(Exception):
    """A process whose tokenizer is not that of this one."""


class _Process:
    def __init__(self, start: bytes, expected: str) -> None:
        self._start: bytes | None = start
        self._expected = expected
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.data.encoder_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=for_child(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1"),
            start_new_session=True,  # Ctrl-C is for the one that asks
        )

    def encode(self, chunk: Chunk) -> Encoded:
        """Raises OSError, EOFError or ValueError where the process ended, `_OtherRowsError` where it cannot be used."""
        if self._start is not None:
            if self._ask(self._start).decode() != self._expected:
                raise _OtherRowsError
            self._start = None
        return encoded_of(self._ask(chunk_bytes(chunk)))

    def why(self, error: Exception) -> str:
        """What became of it."""
        if isinstance(error, _OtherRowsError):
            return "reads the saved tokenizer otherwise"
        self.end()
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, size - LAST_BYTES))
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        return f"ended (code {self._process.returncode}{': ' + lines[-1] if lines else ''})"

    def end(self) -> None:
        with suppress(OSError):
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)

    def _ask(self, content: bytes) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        write_frame(self._process.stdin, content)  # type: ignore[arg-type]
        return read_frame(self._process.stdout)  # type: ignore[arg-type]
