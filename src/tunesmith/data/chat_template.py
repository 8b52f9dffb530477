"""The tokenizer's own chat template, rendered within limits, in a process of its own.

A template is a program from the internet. transformers runs it in Jinja's immutable sandbox (no attribute access, no
ranges over 100,000), but nothing in Python stops one that raises a number to the power of a power. So it runs in a
process that is killed when it exceeds a time, a memory or an output limit; Ctrl-C works meanwhile.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple, TypeVar

from tunesmith.environment import spawning
from tunesmith.errors import ModelError

T = TypeVar("T")
Message = Mapping[str, Any]

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

MOST_TOGETHER = 64
"""Texts that the process renders before it answers, in at most `RENDER_S` together."""
MOST_BYTES = 16 * OUTPUT_CHARS
"""Largest message of answers."""

Kind = Literal["text", "refused", "long", "memory", "deep"]
"""A text; the template raised, and its message; a text that is too long, and its number of characters; memory ran out;
calls or brackets nest too deeply."""
Answer = tuple[Kind, str]
Item = tuple[list[Message], "list[Mapping[str, Any]] | None", bool]
"""Messages, tools, and whether to open the assistant's next turn."""


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

    Raises `ModelError` when there is none.
    """

    def __init__(self, tokenizer: Any, date: str | None = None) -> None:
        self._name = tokenizer.name_or_path
        self.text = _text(tokenizer)
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
        found: list[Answer] = []
        try:
            for at in range(0, len(items), MOST_TOGETHER):
                found += PROCESS.answers({**self._settings, "most_chars": OUTPUT_CHARS}, items[at : at + MOST_TOGETHER])
        except (_Ended, _Late) as ended:
            raise self._refused(str(ended)) from ended
        return [_outcome(*answer) for answer in found]

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
    """The process ended, or gave up, before it answered; its text continues "its chat template"."""


class _Late(Exception):
    """The process was killed because an answer took too long."""


class _Process:
    """The one process that renders for this one: started at the first request, and again when it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0
        self._is_here = False
        self.process: Any = None
        self._connection: Any = None

    def answers(self, settings: Mapping[str, Any], items: Sequence[Item]) -> list[Answer]:
        """The answer to each item. Raises `_Ended`, `_Late`.

        A process that has served before may have run out of the memory that earlier rows left: a new one tries again.
        """
        if self._is_here:
            return _checked(_answers(settings, list(map(_as_sent, items)), cpu_s=2 * RENDER_S))
        request = json.dumps([settings, items], default=str)
        with self._lock:
            if self.process is not None and self._owner == os.getpid() and self.process.is_alive():
                with suppress(_Ended):
                    return self._ask(request)
            self._start()
            return self._ask(request)

    def render_here(self) -> None:
        """Render in this process itself from now on, with a limit to its memory, and end it when a text takes too long.

        For processes whose end is an error of their parent. Windows cannot end them so, and keeps the other process.
        """
        self._is_here = sys.platform != "win32"
        _limit_memory(2 * GROWTH_BYTES)

    def _ask(self, request: str) -> list[Answer]:
        try:
            with suppress(OSError):  # that it ended is seen below
                self._connection.send_bytes(request.encode())
            return _checked(self._receive(RENDER_S))
        except BaseException:  # Ctrl-C too: the next answer would be that of this request
            self.end()
            raise

    def _start(self) -> None:
        self._owner = os.getpid()
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
        except (_Ended, _Late) as ended:
            failure = str(ended)
        except BaseException:
            self.end()
            raise
        if failure:
            self.end()
            raise ModelError(f"the process that renders chat templates does not start: {failure}")

    def _receive(self, limit_s: float) -> Any:
        # Ticks are counted, since clocks run on while this process is stopped or the machine sleeps.
        for _ in range(max(1, round(limit_s / TICK_S))):
            try:
                if self._connection.poll(TICK_S):
                    return json.loads(self._connection.recv_bytes(MOST_BYTES))
            except (OSError, EOFError) as error:
                self.process.join(END_S)
                raise _Ended(f"ended the process that renders it (code {self.process.exitcode})") from error
        raise _Late(f"did not finish one row, or {MOST_TOGETHER} together, in {limit_s:g} s")

    def end(self) -> None:
        """Kill it; it is started again at the next request."""
        process, self.process = self.process, None
        if process is not None and self._owner == os.getpid():
            if process.pid is not None:
                process.kill()
                process.join(END_S)
            self._connection.close()


PROCESS = _Process()
atexit.register(PROCESS.end)


def _checked(answers: list[Answer]) -> list[Answer]:
    kinds = {kind for kind, _ in answers}
    if "memory" in kinds:
        raise _Ended(f"took more than {GROWTH_BYTES // 1024**2:,} MiB of memory")
    if "deep" in kinds:
        raise _Ended("nests or calls itself more deeply than Python can follow")
    return answers


def _serve(connection: Connection, growth: int, cpu_s: float) -> None:
    """The work of the process: it answers each request, and ends with the connection.

    It has `growth` bytes of memory above what it starts with, and ends itself after `cpu_s` seconds of processor time
    for one item. It never imports torch.
    """
    if sys.platform != "win32":
        os.setsid()  # Ctrl-C and Ctrl-Z are not for it
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)  # warnings of libraries
    try:
        import transformers.utils.chat_template_utils  # noqa: F401 (before memory is limited)

        _limit_memory(growth)
        gc.freeze()  # the collector need not look through the libraries again and again
    except Exception as error:
        connection.send_bytes(json.dumps(repr(error)[:MOST_REASON]).encode())
        return
    connection.send_bytes(b'""')
    with suppress(EOFError, OSError):
        while True:
            settings, items = json.loads(connection.recv_bytes())
            answers = _answers(settings, items, cpu_s=cpu_s)
            try:
                content = json.dumps(answers).encode()
            except MemoryError:
                content = b'[["memory", ""]]'
            connection.send_bytes(content)


def _answers(settings: Mapping[str, Any], items: Sequence[Item], *, cpu_s: float) -> list[Answer]:
    found = []
    for item in items:
        _limit_time(cpu_s)
        found.append(_answer(settings, *item))
    _limit_time(0)
    return found


def _answer(settings: Mapping[str, Any], messages: Sequence[Any], tools: Any, prompt: bool) -> Answer:
    try:
        text = _render(settings, messages, tools, prompt)
        return ("long", str(len(text))) if len(text) > settings["most_chars"] else ("text", text)
    except MemoryError:
        return "memory", ""
    except RecursionError:
        return "deep", ""
    except Exception as error:  # the template is a program we did not write: it can raise anything
        return "refused", str(error)[:MOST_REASON] or type(error).__name__


def _render(settings: Mapping[str, Any], messages: Sequence[Any], tools: Any, prompt: bool) -> str:
    """The text that transformers makes of messages."""
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    template, date = settings["template"], settings["date"]
    if isinstance(template, dict):
        template = template["tool_use" if tools and "tool_use" in template else "default"]
    compiled = _compile_jinja_template(template)  # once: it keeps what it made
    # Its own `strftime_now` gives today, which is another day tomorrow.
    compiled.environment.globals["strftime_now"] = (datetime.fromisoformat(date) if date else datetime.now()).strftime
    given: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt, **settings["special_tokens"]}
    if tools is None and all(map(_is_plain, messages)):  # half the time
        return str(compiled.render(messages=messages, documents=None, **given))
    return str(render_jinja_template([messages], chat_template=template, **given)[0][0])


def _is_plain(message: Any) -> bool:
    return type(message) is dict and message.keys() == {"role", "content"} and type(message["content"]) is str


def _as_sent(item: Item) -> Item:
    """An item as another process would receive it."""
    is_plain = item[1] is None and all(map(_is_plain, item[0]))
    return item if is_plain else tuple(json.loads(json.dumps(item, default=str)))


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


def _limit_time(cpu_s: float) -> None:
    """For when the parent has gone: while it is there, it kills this process sooner."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # by default SIGPROF ends a process, whatever runs in it
