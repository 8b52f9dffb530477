"""Answers of commands: `check`, `plan` and the sections of a report, made by child
processes and kept in memory.

A page shows the very values that the command prints with `--json`. What takes seconds goes on while the page
waits, and a question that was answered is answered again at once, as long as its files are the same.
"""

from __future__ import annotations

import contextlib
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

from tunesmith.environment import for_child, python_words
from tunesmith.runs.atomic import from_json
from tunesmith.types import JsonObject, Record

MOST_KEPT, MOST_BYTES = 64, 2**26
"""Answers that are kept, and bytes of what was printed for them."""
AT_ONCE = 2
"""Children that work at the same time; others wait."""
AT_ONCE_S = 0.3
"""Seconds that a page waits for an answer before it shows that one is coming."""
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


class CommandRunner:
    """Children and their answers. `close` ends those that are at work."""

    def __init__(self) -> None:
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
            is_new = answer is None or time.monotonic() - answer.ended >= (FAILED_AGE_S if answer.error else age_s)
            self._answers[key] = answer = answer if answer is not None and not is_new else Reply(words)
            num_bytes = sum(kept.num_bytes for kept in self._answers.values())
            while len(self._answers) > MOST_KEPT or (num_bytes > MOST_BYTES and len(self._answers) > 1):
                num_bytes -= self._answers.popitem(last=False)[1].num_bytes
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

    def _work(self, answer: Reply, module: str) -> None:
        try:
            with self._places, tempfile.TemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
                answer._stderr = err
                with self._lock:
                    if self._is_closed:
                        return
                    child = subprocess.Popen(
                        [*python_words(module), *answer.words],
                        stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=for_child(), start_new_session=True,
                    )  # fmt: skip
                    self._children.add(child)
                code = child.wait()
                with self._lock:
                    self._children.discard(child)
                out.seek(0)
                err.seek(0)
                _take(answer, code, out.read(), err.read())
        except OSError as error:
            answer.error = {"code": "OSError", "message": f"cannot be started: {error.strerror}."}
        finally:
            answer.ended = time.monotonic()
            answer.done.set()


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


def look(path: Path) -> tuple[int, int] | None:
    """Time and size of a file, by which it is taken to be the same; None without it."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_mtime_ns, status.st_size
    return None
