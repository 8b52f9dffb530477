"""The tokenizer's own chat template, rendered within limits.

A template is a program from the internet. transformers runs it in Jinja's immutable sandbox (no attribute access, no
ranges over 100,000), and here that happens in a process of its own (`template_process`) which may be ended at any
moment: it is held to a size, an output, a time and a memory, and whoever waits for it can always be interrupted.
"""

from __future__ import annotations

import atexit
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import orjson

from tunesmith.data.forms import Forms, Found, Written
from tunesmith.environment import for_child
from tunesmith.errors import ModelError

T = TypeVar("T")
Message = Mapping[str, Any]

TEMPLATE_BYTES = 64 * 1024
"""Largest template; the largest in common use have about 20 KiB."""
OUTPUT_CHARS = 64 * 1024 * 1024
"""Longest text of one row: eight times `limits.line_bytes`."""
RENDER_S = 10.0
"""Longest time for one render; common templates need about 50 µs."""
GROWTH_BYTES = 1024**3
"""Most memory for templates, where the platform keeps such a limit (Linux)."""
START_S = 120.0
"""Longest time for the process to start; it needs half a second."""
TICK_S, END_S = 0.1, 5.0
LAST_BYTES = 2000

HEAD = struct.Struct("<cQ")
READY, TEXT, REFUSED, LONG, MEMORY, DEEP = b"!", b"t", b"r", b"l", b"m", b"d"
"""Answers of the process: it has started; a text; the template raised, and its words; too long a text, and its number
of characters; no memory was left; calls or brackets stand too deep in each other."""
FAST_JSON, JSON = b"o", b"j"
"""What a request is: read by orjson, or by json."""


class TemplateRefusal(Exception):
    """The template raised: it does not take these messages. Its text is the template's own, as a sentence."""


class Request(NamedTuple):
    """One text to render."""

    messages: Sequence[Message]
    prompt: bool
    """Whether it opens the assistant's next turn, as serving does."""
    tools: Sequence[Mapping[str, Any]] = ()


Rendering = Generator[Request, str, T]
"""Work that asks for texts as it goes; `TemplateRefusal` is thrown into it where the template refuses."""


class ChatTemplate:
    """The chat template of a tokenizer. `date`: the day that it writes (YYYY-MM-DD); None: today.

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
        used = [value for name, value in special_tokens.items() if name in self.text]
        has_forms = isinstance(tokenizer.chat_template, str) and all(type(value) is str for value in used)
        self._forms = Forms(self._find) if has_forms else None

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        """The text of a conversation; `prompt` opens the assistant's next turn, as serving does.

        Raises `TemplateRefusal` with whatever the template raised, `ModelError` where it exceeds a limit.
        """
        [text] = self.render_all([_single(Request(messages, prompt, tools))])
        return text

    def render_all(self, works: Sequence[Rendering[T]]) -> list[T]:
        """What all the works return, each given the texts that it asks for. Raises as `render`, and what they raise.

        Those that wait for the template wait together: one message to its process and back costs as much as a render.
        """
        results: dict[int, T] = {}
        waiting: list[tuple[int, Request, Written | None]] = []

        def go_on(i: int, given: str | TemplateRefusal | None) -> None:
            work = works[i]
            try:
                while True:
                    refused = isinstance(given, TemplateRefusal)
                    request = work.throw(given) if refused else work.send(given)  # type: ignore[arg-type]
                    known = None
                    if self._forms is not None and not request.tools:
                        known = self._forms.write(request.messages, prompt=request.prompt)
                    if known is None or not known.is_checked:
                        waiting.append((i, request, known))
                        return
                    given = self._within(known.text)
            except StopIteration as done:
                results[i] = done.value

        for i in range(len(works)):
            go_on(i, None)
        while waiting:
            asked, waiting = waiting, []
            texts = self.run_all([request for _, request, _ in asked])
            for (i, _, known), text in zip(asked, texts, strict=True):
                if known is not None:
                    known.check(agrees=text == known.text)
                go_on(i, text)
        return [results[i] for i in range(len(works))]

    def run(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        """What `render` gives, always by the template itself."""
        [text] = self.run_all([Request(messages, prompt, tools)])
        if isinstance(text, TemplateRefusal):
            raise text
        return text

    def run_all(self, requests: Sequence[Request]) -> list[str | TemplateRefusal]:
        """Each text, by the template itself. Raises `ModelError` where one exceeds a limit."""
        items = [(list(messages), list(tools) or None, prompt) for messages, prompt, tools in requests]
        return [self._outcome(kind, content) for kind, content in self._ask("run", items)]

    def _find(self, prompt: bool, roles: Sequence[str]) -> Found | None:
        [(kind, content)] = self._ask("find", [(prompt, list(roles))])
        return json.loads(content) if kind == TEXT else None

    def _ask(self, op: str, items: Sequence[Any]) -> list[tuple[bytes, bytes]]:
        try:
            answers = PROCESS.ask(_framed([{**self._settings, "most_chars": OUTPUT_CHARS}, op, items]), len(items))
        except _Ended as ended:
            raise self._explodes(str(ended)) from ended
        kinds = {kind for kind, _ in answers}
        if MEMORY in kinds:
            raise self._explodes(f"took more than {GROWTH_BYTES // 1024**2:,} MiB of memory")
        if DEEP in kinds:
            raise self._explodes("nests or calls itself more deeply than Python can follow")
        return answers

    def _outcome(self, kind: bytes, content: bytes) -> str | TemplateRefusal:
        text = content.decode("utf-8", "surrogatepass")
        if kind == TEXT:
            return text
        if kind == LONG:
            return _too_long(int(text))
        return TemplateRefusal(text if text.endswith((".", "!", "?")) else f"{text}.")

    def _within(self, text: str) -> str | TemplateRefusal:
        return text if len(text) <= OUTPUT_CHARS else _too_long(len(text))

    def _explodes(self, what: str) -> ModelError:
        return ModelError(
            f"{self._name}: its chat template {what}. "
            "Give another by data.template, and look at this one before you trust its source."
        )


def _as_text(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


def _framed(request: Any) -> bytes:
    """A request as bytes, behind a head that says how to read it."""
    try:
        kind, content = FAST_JSON, orjson.dumps(request)
    except TypeError:  # half a surrogate pair, a number of more than 64 bits, deep nesting
        kind, content = JSON, json.dumps(request).encode()
    return HEAD.pack(kind, len(content)) + content


def _single(request: Request) -> Rendering[str]:
    return (yield request)


def _too_long(num_chars: int) -> TemplateRefusal:
    return TemplateRefusal(f"it wrote {num_chars} characters, more than {OUTPUT_CHARS}.")


class _Ended(Exception):
    """The process ended before it answered; its text goes on from "its chat template"."""


class _Late(_Ended):
    """It was ended, for an answer did not come in time."""


class _Process:
    """The one process that renders for this one: started when it is first asked, and anew when it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def ask(self, request: bytes, num: int) -> list[tuple[bytes, bytes]]:
        """Its answers. Raises `_Ended`.

        A process that has served before may have run out of what earlier rows left it: a new one has to fail too.
        """
        with self._lock:
            if self._child is not None and self._child.pid_of_owner == os.getpid():
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

    def _answers(self, child: _Child, request: bytes, num: int) -> list[tuple[bytes, bytes]]:
        try:
            answers = child.ask(request, num)
        except BaseException:  # also Ctrl-C: what comes from it next would answer this request
            self.end()
            raise
        if any(kind == MEMORY for kind, _ in answers):
            self.end()
        return answers

    def end(self) -> None:
        """End it, whatever it is at; it is started again when it is asked."""
        child, self._child = self._child, None
        if child is not None and child.pid_of_owner == os.getpid():
            child.end()


class _Child:
    def __init__(self) -> None:
        self.pid_of_owner = os.getpid()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._is_late = False
        self._limit_s = START_S
        self._turn = 0
        self._is_asked, self._is_over = threading.Event(), False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.data.template_process", str(GROWTH_BYTES), str(2 * RENDER_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=for_child(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
            start_new_session=True,  # Ctrl-C is for the one that asks
        )
        threading.Thread(target=self._watch, name="tunesmith-templates", daemon=True).start()
        try:
            self._is_asked.set()
            self._read()
        except _Ended as ended:
            raise ModelError(f"the process that renders chat templates does not start: {self._how()}") from ended
        except BaseException:
            self.end()
            raise
        finally:
            self._rest()

    def ask(self, request: bytes, num: int) -> list[tuple[bytes, bytes]]:
        """Raises `_Ended`."""
        assert self._process.stdin is not None
        self._limit_s = RENDER_S
        self._turn += 1
        self._is_asked.set()
        try:
            with suppress(BrokenPipeError):  # what reads nothing any more answers nothing either
                self._process.stdin.write(request)
                self._process.stdin.flush()
            return [self._read() for _ in range(num)]
        finally:
            self._rest()

    def _read(self) -> tuple[bytes, bytes]:
        assert self._process.stdout is not None
        head = self._process.stdout.read(HEAD.size)
        if len(head) == HEAD.size:
            kind, size = HEAD.unpack(head)
            content = self._process.stdout.read(size) if size <= 4 * OUTPUT_CHARS + 2**20 else b""
            self._turn += 1
            if len(content) == size:
                return kind, content
        if self._is_late:
            raise _Late(f"did not finish one row in {self._limit_s:g} s")
        raise _Ended(f"ended the process that renders it ({self._how()})")

    def _watch(self) -> None:
        """End the process when one answer takes too long. Ticks are counted, since clocks go on while this process is
        stopped or the machine sleeps."""
        turn, ticks = 0, 0
        while not self._is_over:
            self._is_asked.wait()
            time.sleep(TICK_S)
            ticks = ticks + 1 if turn == self._turn and self._is_asked.is_set() else 0
            turn = self._turn
            if ticks * TICK_S > self._limit_s:
                self._is_late = True
                self._process.kill()
                return

    def _rest(self) -> None:
        if not self._is_over:  # or its watcher would wait for ever
            self._is_asked.clear()

    def _how(self) -> str:
        """How it ended."""
        self.end()
        code = self._process.returncode
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - LAST_BYTES))
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        return f"code {code}{': ' + lines[-1] if lines else ''}"

    def end(self) -> None:
        self._is_over = True
        self._is_asked.set()
        with suppress(OSError):
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)


PROCESS = _Process()
atexit.register(PROCESS.end)


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


def resident_bytes() -> int:
    """Memory this process has now; where the platform does not tell, the most it has had, or 0."""
    if sys.platform == "linux":
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
