"""The tokenizer's own chat template, rendered within limits, in a process of its own.

A template is a program from the internet. transformers runs it in Jinja's immutable sandbox (no attribute access, no
ranges over 100,000), but nothing in Python stops one that raises a number to the power of a power. So it runs in a
process that is killed when it exceeds a time, a memory or an output limit; Ctrl-C works meanwhile.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple, TypeVar

import orjson

from tunesmith.environment import spawning
from tunesmith.errors import ModelError

T = TypeVar("T")
Message = Mapping[str, Any]

TEMPLATE_BYTES = 64 * 1024
"""Largest template; the largest in common use have about 20 KiB."""
OUTPUT_CHARS = 64 * 1024 * 1024
"""Longest text of one row: eight times `limits.line_bytes`."""
RENDER_S = 10.0
"""Longest time for one render; common templates need about 20 µs."""
GROWTH_BYTES = 1024**3
"""Most memory for templates, where the platform has such a limit (Linux)."""
START_S = 120.0
"""Longest time for the process to start; it needs half a second."""
TICK_S, END_S = 0.1, 5.0
MOST_REASON = 10_000
PR_SET_PDEATHSIG = 1
"""From prctl.h of Linux."""

FLUSH_S = 0.05
MOST_TOGETHER = 256
"""Answers that are ready wait at most this long for others, and for so many."""
MOST_BYTES = 16 * OUTPUT_CHARS
"""Largest message of answers."""

Kind = Literal["text", "refused", "long", "memory", "deep"]
"""A text; the template raised, and its message; a text that is too long, and its number of characters; memory ran out;
calls or brackets nest too deeply."""
Answer = tuple[Kind, str]


class TemplateRefusal(Exception):
    """The template raised: it does not take these messages. Its text is the template's own, as a sentence."""


class Request(NamedTuple):
    """One text to render."""

    messages: Sequence[Message]
    prompt: bool
    """Whether to open the assistant's next turn, as serving does (`add_generation_prompt`)."""
    tools: Sequence[Mapping[str, Any]] = ()


Rendering = Generator[Request, str, T]
"""Work that yields requests and receives texts; `TemplateRefusal` is thrown into it where the template refuses."""


class ChatTemplate:
    """The chat template of a tokenizer. `date`: the day that `strftime_now` writes (YYYY-MM-DD); None: today.

    Raises `ModelError` when there is none or it is too large.
    """

    def __init__(self, tokenizer: Any, date: str | None = None) -> None:
        self._name = tokenizer.name_or_path
        self.text = _text(tokenizer)
        size = len(self.text.encode())
        if size > TEMPLATE_BYTES:
            raise ModelError(
                f"{self._name}: its chat template has {size} bytes, more than the {TEMPLATE_BYTES} "
                "a template may have. Give a smaller one by data.template."
            )
        special_tokens = {name: _as_text(value) for name, value in tokenizer.special_tokens_map.items()}
        self._settings = {"template": tokenizer.chat_template, "special_tokens": special_tokens, "date": date}

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), prompt: bool) -> str:
        """The text of a conversation; `prompt` opens the assistant's next turn, as serving does.

        Raises `TemplateRefusal` with the template's own error, `ModelError` where it exceeds a limit.
        """
        [text] = self._texts([Request(messages, prompt, tools)])
        if isinstance(text, TemplateRefusal):
            raise text
        return text

    def render_all(self, works: Sequence[Rendering[T]]) -> list[T]:
        """The results of all works. Raises `ModelError` as `render`, and what they raise.

        Their requests are sent together: one message to the process and back costs as much as a render.
        """
        results: dict[int, T] = {}
        waiting: list[tuple[int, Request]] = []

        def advance(i: int, given: str | TemplateRefusal | None) -> None:
            work = works[i]
            try:
                refused = isinstance(given, TemplateRefusal)
                waiting.append((i, work.throw(given) if refused else work.send(given)))  # type: ignore[arg-type]
            except StopIteration as done:
                results[i] = done.value

        for i in range(len(works)):
            advance(i, None)
        while waiting:
            requests, waiting = waiting, []
            for (i, _), text in zip(requests, self._texts([request for _, request in requests]), strict=True):
                advance(i, text)
        return [results[i] for i in range(len(works))]

    def _texts(self, requests: Sequence[Request]) -> list[str | TemplateRefusal]:
        """Each text. Raises `ModelError` where one exceeds a limit."""
        items = [(list(messages), list(tools) or None, prompt) for messages, prompt, tools in requests]
        try:
            answers = PROCESS.send(_as_bytes([{**self._settings, "most_chars": OUTPUT_CHARS}, items]), len(items))
        except _Ended as ended:
            raise self._refused(str(ended)) from ended
        kinds = {kind for kind, _ in answers}
        if "memory" in kinds:
            raise self._refused(f"took more than {GROWTH_BYTES // 1024**2:,} MiB of memory")
        if "deep" in kinds:
            raise self._refused("nests or calls itself more deeply than Python can follow")
        return [_outcome(*answer) for answer in answers]

    def _refused(self, what: str) -> ModelError:
        return ModelError(
            f"{self._name}: its chat template {what}. "
            "Give another by data.template, and look at this one before you trust its source."
        )


def _outcome(kind: Kind, text: str) -> str | TemplateRefusal:
    if kind == "text":
        return text
    if kind == "long":
        return TemplateRefusal(f"it wrote {text} characters, more than {OUTPUT_CHARS}.")
    return TemplateRefusal(text if text.endswith((".", "!", "?")) else f"{text}.")


def _as_text(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


def _as_bytes(message: Any) -> bytes:
    """JSON, and before it a byte that says which library can read it."""
    try:
        return b"o" + orjson.dumps(message)
    except TypeError:  # half a surrogate pair, a number of more than 64 bits, deep nesting
        return b"j" + json.dumps(message).encode()


def _from_bytes(content: bytes) -> Any:
    return orjson.loads(memoryview(content)[1:]) if content[:1] == b"o" else json.loads(content[1:])


def _text(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # named templates: transformers takes "tool_use" when a row has tools
        return "\n".join(f"{{# {name} #}}{text}" for name, text in sorted(template.items()))
    if not template:
        raise ModelError(
            f"{tokenizer.name_or_path}: it has no chat template. Give one by data.template (a Jinja file, "
            "such as the one of the chat model you want to resemble), or train with task: generate."
        )
    return str(template)


class _Ended(Exception):
    """The process ended before it answered; its text continues "its chat template"."""


class _Late(_Ended):
    """It was killed because an answer took too long."""


class _Process:
    """The one process that renders for this one: started at the first request, and again when it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def send(self, request: bytes, num: int) -> list[Answer]:
        """Its answers. Raises `_Ended`.

        A process that has served before may have run out of the memory that earlier rows left: a new one tries again.
        """
        with self._lock:
            if self._child is not None and self._child.owner == os.getpid() and self._child.process.is_alive():
                try:
                    answers = self._answers(self._child, request, num)
                    if self._child is not None:
                        return answers
                except _Late:
                    raise
                except _Ended:
                    pass
            self._child = _Child()
            return self._answers(self._child, request, num)

    def _answers(self, child: _Child, request: bytes, num: int) -> list[Answer]:
        try:
            answers = child.answers(request, num)
        except BaseException:  # Ctrl-C too: the next answer would be that of this request
            self.end()
            raise
        if any(kind == "memory" for kind, _ in answers):
            self.end()
        return answers

    def end(self) -> None:
        """Kill it; it is started again at the next request."""
        child, self._child = self._child, None
        if child is not None and child.owner == os.getpid():
            child.end()


class _Child:
    def __init__(self) -> None:
        self.owner = os.getpid()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, GROWTH_BYTES, 2 * RENDER_S), name="tunesmith-templates", daemon=True
        )
        try:
            with spawning():
                self.process.start()
            theirs.close()
            failure = self._receive(START_S)
        except _Ended as ended:
            failure = str(ended)
        except BaseException:
            self.end()
            raise
        if failure:
            self.end()
            raise ModelError(f"the process that renders chat templates does not start: {failure}")

    def answers(self, request: bytes, num: int) -> list[Answer]:
        """Raises `_Ended`."""
        # A thread sends: a long request would wait for a process that waits to send its first answers.
        sender = threading.Thread(target=self._send, args=(request,), daemon=True)
        sender.start()
        answers: list[Answer] = []
        while len(answers) < num:
            answers += self._receive(RENDER_S)
        return answers

    def _send(self, request: bytes) -> None:
        with suppress(OSError, ValueError):  # the reader will see that it ended
            self._connection.send_bytes(request)

    def _receive(self, limit_s: float) -> Any:
        # Ticks are counted, since clocks run on while this process is stopped or the machine sleeps.
        for _ in range(max(1, round(limit_s / TICK_S))):
            try:
                if self._connection.poll(TICK_S):
                    return _from_bytes(self._connection.recv_bytes(MOST_BYTES))
            except (OSError, EOFError) as error:
                self.end()
                raise _Ended(f"ended the process that renders it (code {self.process.exitcode})") from error
        self.end()
        raise _Late(f"did not finish one row in {limit_s:g} s")

    def end(self) -> None:
        if self.process.pid is not None:
            self.process.kill()
            self.process.join(END_S)
        self._connection.close()


PROCESS = _Process()
atexit.register(PROCESS.end)


def _serve(connection: Connection, growth: int, cpu_s: float) -> None:
    """The work of the process: it answers each request, and ends when the connection or its parent does.

    It has `growth` bytes of memory above what it starts with, and ends itself after `cpu_s` seconds of processor time
    for one item. It never imports torch.
    """
    if sys.platform != "win32":
        os.setsid()  # Ctrl-C and Ctrl-Z are not for it
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)  # warnings of libraries
    try:
        run = _runner()
        _limit_memory(growth)
        _end_with_parent()
        gc.freeze()  # the collector need not look through the libraries again and again
    except Exception as error:
        connection.send_bytes(_as_bytes(repr(error)[:MOST_REASON]))
        return
    connection.send_bytes(_as_bytes(""))
    with suppress(EOFError, OSError):
        while True:
            settings, items = _from_bytes(connection.recv_bytes())
            answers, flushed = [], time.monotonic()
            for item in items:
                _limit_time(cpu_s)
                answers.append(_answer(run, settings, *item))
                _limit_time(0)
                if time.monotonic() - flushed > FLUSH_S or len(answers) == MOST_TOGETHER:
                    _send_answers(connection, answers)
                    answers, flushed = [], time.monotonic()
            if answers:
                _send_answers(connection, answers)


def _send_answers(connection: Connection, answers: Sequence[Answer]) -> None:
    try:
        content = _as_bytes(answers)
    except MemoryError:
        content = _as_bytes([("memory", "")] * len(answers))
    connection.send_bytes(content)


def _answer(run: Any, settings: Mapping[str, Any], messages: Sequence[Any], tools: Any, prompt: bool) -> Answer:
    try:
        text = run(settings, messages, tools, prompt)
        return ("long", str(len(text))) if len(text) > settings["most_chars"] else ("text", text)
    except MemoryError:
        return "memory", ""
    except RecursionError:
        return "deep", ""
    except Exception as error:  # the template is a program we did not write: it can raise anything
        return "refused", str(error)[:MOST_REASON] or type(error).__name__


def _runner() -> Any:
    """A function that renders as transformers does: (settings, messages, tools, prompt) -> text."""
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    class Templates(PreTrainedTokenizerBase):  # type: ignore[misc]
        """As much of a tokenizer as transformers needs to run a chat template."""

        def __init__(self, template: str | dict[str, str], special_tokens: dict[str, Any]) -> None:
            # Not the base's: it would want a vocabulary.
            self.chat_template = template
            self._named = special_tokens

        @property
        def special_tokens_map(self) -> dict[str, Any]:
            return self._named

    def run(settings: Mapping[str, Any], messages: Sequence[Any], tools: Any, prompt: bool) -> str:
        templates = Templates(settings["template"], settings["special_tokens"])
        compiled = chat_template_utils._compile_jinja_template(templates.get_chat_template(None, tools))
        # Its own `strftime_now` gives today, which is another day tomorrow.
        date = settings["date"]
        compiled.environment.globals["strftime_now"] = (
            datetime.fromisoformat(date) if date else datetime.now()
        ).strftime
        if messages and tools is None and all(map(_is_plain, messages)):  # half the time of apply_chat_template
            given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": prompt}
            return str(compiled.render(**given, **settings["special_tokens"]))
        return str(templates.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False))

    return run


def _is_plain(message: Any) -> bool:
    return type(message) is dict and message.keys() == {"role", "content"} and type(message["content"]) is str


def _limit_memory(growth: int) -> None:
    """macOS and Windows have no such limit."""
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
    thread that started this process: when that thread ends, a new process is started at the next request."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_time(cpu_s: float) -> None:
    """For when the parent has gone: while it is there, it kills this process sooner."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # by default SIGPROF ends a process, whatever runs in it
