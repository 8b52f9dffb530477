"""Answers of commands: `check`, `plan` and the sections of a report, made by child
processes and kept in memory.

A page shows the very values that the command prints with `--json`. What takes seconds goes on while the page
waits, and a question that was answered is answered again at once, as long as its files are the same. Whoever
asks once will ask again: the next process imports its libraries meanwhile, see spare.py.
"""

from __future__ import annotations

import contextlib
import errno
import math
import subprocess
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tunesmith.environment.children import for_child, python_words
from tunesmith.runs.atomic import from_json, to_json
from tunesmith.types import JsonObject, Record

MOST_KEPT, MOST_BYTES = 64, 2**26
"""Answers that are kept, and bytes of what was printed for them."""
AT_ONCE = 2
"""Children that work at the same time; others wait."""
AT_ONCE_S = 0.4
"""Seconds that the first page waits for an answer before it shows that one is coming; later ones only look."""
SPARE = "tunesmith.serve.spare"
SPARE_S = 120.0
"""Without a question for so long, the spare process gives its memory back."""
PAINT_S = 0.5
"""Seconds for a browser on this machine to show an answer, before the next spare process takes the
processor."""
FAILED_AGE_S = 10.0  # then a failure is tried again: what it lacked may be there
MOST_PROGRESS = 200
BAD_INPUT = 2
"""Exit code of a check that refuses the data, and of a plan that does not fit: they have answers."""


@dataclass
class Reply:
    """The output of a command, once it has ended."""

    words: Sequence[str]
    values: JsonObject | None = None
    error: Record | None = None
    done: threading.Event = field(default_factory=threading.Event)
    ended: float = math.inf
    """When, by the clock of `time.monotonic`."""
    num_bytes: int = 0
    _stderr: IO[bytes] | None = None

    @property
    def progress(self) -> str:
        """The last line that it printed for people while it works."""
        if self._stderr is None or self.done.is_set():
            return ""
        with contextlib.suppress(OSError, ValueError):
            text = Path(self._stderr.name).read_bytes()[-4000:].decode("utf-8", "replace")
            return next((line[:MOST_PROGRESS] for line in reversed(text.splitlines()) if line.strip()), "")
        return ""


class _Child:
    """A process with what it prints."""

    def __init__(self, words: Sequence[str], stdin: int = subprocess.DEVNULL) -> None:
        self.out, self.err = tempfile.TemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            words, stdin=stdin, stdout=self.out, stderr=self.err, env=for_child(), start_new_session=True
        )

    def become(self, module: str, words: Sequence[str]) -> None:
        """Let a spare process be a command."""
        assert self.process.stdin is not None
        with self.process.stdin as stdin:
            stdin.write(to_json({"module": module, "words": list(words)}) + b"\n")

    def close(self) -> None:
        """End it, if it has not ended."""
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.out, self.err):
            if file is not None:
                file.close()


class CommandRunner:
    """Children and their answers. `close` ends them."""

    def __init__(self, imports: Sequence[str] = ()) -> None:
        """`imports`: modules that a spare process imports in advance; without any there is none."""
        self._imports = imports
        self._spare: _Child | None = None
        self._spare_ends = threading.Timer(0, lambda: None)
        self._answers: OrderedDict[Any, Reply] = OrderedDict()
        self._places = threading.Semaphore(AT_ONCE)
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._is_closed = False

    def ask(self, module: str, words: Sequence[str], files: Sequence[Path] = (), age_s: float = math.inf) -> Reply:
        """The answer to a command, which may still be on its way. It holds as long as
        `files` are the same, and for `age_s`."""
        key = (module, tuple(words), tuple((str(path), look(path)) for path in files))
        with self._lock:
            answer = self._answers.pop(key, None)
            most_age_s = FAILED_AGE_S if answer is not None and answer.error else age_s
            is_new = answer is None or time.monotonic() - answer.ended >= most_age_s
            self._answers[key] = answer = answer if answer is not None and not is_new else Reply(words)
            drop_oldest(self._answers, MOST_KEPT, MOST_BYTES)
        if is_new:
            threading.Thread(target=self._work, args=(answer, module), daemon=True).start()
            answer.done.wait(AT_ONCE_S)
        return answer

    def close(self) -> None:
        """End the children that are at work: nobody waits for them."""
        with self._lock:
            self._is_closed = True
            for child in self._children:
                child.kill()
        self.end_spare()

    def _start(self, module: str, words: Sequence[str]) -> _Child:
        """The process of a command: the spare one, where there is one. Raises OSError."""
        with self._lock:
            if self._is_closed:
                raise OSError(errno.ESHUTDOWN, "the server ends")
            child, self._spare = self._spare, None
            if child is not None and child.process.poll() is None:
                child.become(module, words)
            else:
                child = _Child([*python_words(module), *words])
            self._children.add(child.process)
        return child

    def _prepare(self) -> None:
        """Start the spare process, unless it is there. Raises OSError."""
        with self._lock:
            if self._is_closed or self._spare is not None or not self._imports:
                return
            self._spare = _Child([*python_words(SPARE), *self._imports], subprocess.PIPE)
            self._spare_ends.cancel()
            self._spare_ends = threading.Timer(SPARE_S, self.end_spare)
            self._spare_ends.daemon = True
            self._spare_ends.start()

    def end_spare(self) -> None:
        """Give the memory of the spare process back."""
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()

    def _work(self, answer: Reply, module: str) -> None:
        try:
            with self._places, contextlib.closing(self._start(module, answer.words)) as child:
                answer._stderr = child.err
                code = child.process.wait()
                with self._lock:
                    self._children.discard(child.process)
                child.out.seek(0)
                child.err.seek(0)
                _take(answer, code, child.out.read(), child.err.read())
        except OSError as error:
            answer.error = {"code": "OSError", "message": f"cannot be started: {error.strerror}."}
        finally:
            answer.ended = time.monotonic()
            answer.done.set()
        time.sleep(PAINT_S)
        with contextlib.suppress(OSError):  # then the next answer takes longer
            self._prepare()


def _take(answer: Reply, code: int, printed: bytes, errors: bytes) -> None:
    """Read the last line of JSON that a child printed."""
    line = printed.strip().rpartition(b"\n")[2]
    answer.num_bytes = len(line)
    values: Any = None
    with contextlib.suppress(ValueError):
        values = from_json(line)
    if isinstance(values, dict) and values.get("kind") != "error" and code in (0, BAD_INPUT):
        answer.values = values
    elif isinstance(values, dict) and values.get("kind") == "error":
        answer.error = values
    else:
        last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2][:500]
        answer.error = {"code": "ended", "message": last or f"the process ended with code {code}, without a word."}


def drop_oldest(entries: OrderedDict[Any, Any], most: int, most_bytes: int) -> None:
    """Take the first entries out until `most` are left and these take `most_bytes` at most by their
    `num_bytes`; the last one stays, whatever it takes."""
    num_bytes = sum(entry.num_bytes for entry in entries.values())
    while len(entries) > most or (num_bytes > most_bytes and len(entries) > 1):
        num_bytes -= entries.popitem(last=False)[1].num_bytes


def look(path: Path) -> tuple[int, int] | None:
    """Time and size of a file, by which it is taken to be the same; None without it."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_mtime_ns, status.st_size
    return None
