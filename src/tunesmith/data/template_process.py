"""The process that runs chat templates for another.

    python -m tunesmith.data.template_process GROWTH_BYTES CPU_S

A template is a program from the internet: nothing but the end of its process stops one that raises a number to the
power of a power. This process reads requests from its standard input and writes an answer for each of their items to
its standard output. It has little memory (`GROWTH_BYTES` above what it starts with), ends itself after `CPU_S` seconds
of processor time for one item, and ends when its input or its parent does. It never imports torch.

Both are one byte that says what follows, the length of that in 8 bytes, and that: of a request the JSON of [settings of
the template, op, items].
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

import orjson
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from tunesmith.data.forms import Finder
from tunesmith.data.template import DEEP, FAST_JSON, HEAD, LONG, MEMORY, READY, REFUSED, TEXT

FLUSH_S = 0.05
"""Answers that are ready wait at most this long for others."""
MOST_REASON = 10_000
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl.h."""


class _Templates(PreTrainedTokenizerBase):  # type: ignore[misc]
    """As much of a tokenizer as transformers needs to run a chat template."""

    def __init__(self, template: str | dict[str, str], special_tokens: dict[str, Any]) -> None:
        # Not the base's: it would want a vocabulary.
        self.chat_template = template
        self._named = special_tokens

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        return self._named


def main() -> None:
    growth, cpu_s = int(sys.argv[1]), float(sys.argv[2])
    out = os.fdopen(os.dup(1), "wb", buffering=1 << 16)
    os.dup2(2, 1)  # what libraries print goes with their warnings
    _limit_memory(growth)
    _end_with_parent()
    _write(out, READY, b"")
    out.flush()
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            kind, size = HEAD.unpack(_read(sys.stdin.buffer, HEAD.size))
            content = _read(sys.stdin.buffer, size)
            settings, op, items = orjson.loads(content) if kind == FAST_JSON else json.loads(content)
            _answer(out, settings, op, items, cpu_s)


def _answer(out: BinaryIO, settings: Mapping[str, Any], op: str, items: Sequence[Any], cpu_s: float) -> None:
    flushed = time.monotonic()
    templates = _Templates(settings["template"], settings["special_tokens"])
    for item in items:
        _limit_time(cpu_s)
        try:
            kind, content = _run(templates, settings, *item) if op == "run" else _find(settings, *item)
        except MemoryError:
            kind, content = MEMORY, b""
        except RecursionError:
            kind, content = DEEP, b""
        except Exception as error:  # the template is a program we did not write: it can raise anything
            reason = str(error)[:MOST_REASON] or type(error).__name__
            kind, content = REFUSED, reason.encode("utf-8", "surrogatepass")
        _limit_time(0)
        _write(out, kind, content)
        if time.monotonic() - flushed > FLUSH_S:
            out.flush()
            flushed = time.monotonic()
    out.flush()


def _run(
    templates: _Templates, settings: Mapping[str, Any], messages: Sequence[Any], tools: Any, prompt: bool
) -> tuple[bytes, bytes]:
    """What transformers makes of the template."""
    # Its own `strftime_now` gives today, which is another day tomorrow.
    compiled = chat_template_utils._compile_jinja_template(templates.get_chat_template(None, tools))
    compiled.environment.globals["strftime_now"] = _clock(settings["date"])
    text = str(templates.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False))
    if len(text) > settings["most_chars"]:
        return LONG, str(len(text)).encode()
    return TEXT, text.encode("utf-8", "surrogatepass")


def _find(settings: Mapping[str, Any], prompt: bool, roles: Sequence[str]) -> tuple[bytes, bytes]:
    """The form of these roles, see `forms`."""
    template = settings["template"]
    names = tuple((name, value) for name, value in settings["special_tokens"].items() if name in template)
    form = _finder(template, names, settings["date"]).find(prompt, roles)
    return TEXT, json.dumps(form).encode()


@lru_cache(16)
def _finder(template: str, special_tokens: tuple[tuple[str, Any], ...], date: str | None) -> Any:
    return Finder(template, dict(special_tokens), None if date is None else _clock(date))


def _clock(date: str | None) -> Any:
    """`strftime_now` of a day, at midnight; None: of now."""
    return (datetime.now() if date is None else datetime.fromisoformat(date)).strftime


def _read(source: BinaryIO, size: int) -> bytes:
    content = source.read(size)
    if len(content) < size:
        raise EOFError
    return content


def _write(out: BinaryIO, kind: bytes, content: bytes) -> None:
    out.write(HEAD.pack(kind, len(content)))
    out.write(content)


def _limit_memory(growth: int) -> None:
    """Where the platform keeps such a limit: not on macOS and Windows."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm", "rb") as statm:
        most = int(statm.read().split()[0]) * resource.getpagesize() + growth
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with_parent() -> None:
    """On Linux at once, whatever runs here; elsewhere a template in a loop ends by its time. The kernel means the
    thread that started this process: when another thread asks later, a new process is started."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_time(cpu_s: float) -> None:
    """For when the other process is gone: while it is there, it ends this one sooner."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # by default SIGPROF ends a process, whatever it is at


if __name__ == "__main__":
    main()
