"""The tokenizer's own chat template, rendered within limits.

A template is a program from the internet. transformers runs it in Jinja's immutable sandbox (no attribute access, no
ranges over 100,000); here it is also held to a size, an output, a time and a growth of memory.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from tunesmith.data.forms import Forms
from tunesmith.errors import ModelError

T = TypeVar("T")
Message = Mapping[str, Any]

TEMPLATE_BYTES = 64 * 1024
"""Largest template; the largest in common use have about 20 KiB."""
OUTPUT_CHARS = 64 * 1024 * 1024
"""Longest text of one row: eight times `limits.line_bytes`."""
RENDER_S = 10.0
"""Longest time for one render; common templates need about 50 µs."""
GROWTH_BYTES = 2 * 1024**3
"""Most that the process may grow while templates run."""


class TemplateRefusal(Exception):
    """The template raised: it does not take these messages. Its text is the template's own, as a sentence."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Raises `ModelError` when there is none or it is too large.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._running_since: float | None = None
        self.text = _text(tokenizer)
        size = len(self.text.encode())
        if size > TEMPLATE_BYTES:
            raise ModelError(
                f"{tokenizer.name_or_path}: its chat template has {size} bytes, more than the {TEMPLATE_BYTES} "
                "a template may have. Give a smaller one by data.template."
            )
        variables = {name: value for name, value in tokenizer.special_tokens_map.items() if name in self.text}
        self._forms = Forms(self.text, variables) if isinstance(tokenizer.chat_template, str) else None

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        """The text of a conversation; `prompt` opens the assistant's next turn, as serving does.

        Raises `TemplateRefusal` with whatever the template raised.
        """
        self._running_since = time.monotonic()
        try:
            known = None if tools or self._forms is None else self._forms.write(messages, prompt=prompt)
            text = known.text if known is not None and known.is_checked else self.run(messages, tools, prompt)
            if known is not None and not known.is_checked:
                known.check(agrees=text == known.text)
        finally:
            self._running_since = None
        if len(text) > OUTPUT_CHARS:
            raise TemplateRefusal(f"it wrote {len(text)} characters, more than {OUTPUT_CHARS}.")
        return text

    def run(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        """What `render` gives, always by the template itself."""
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, add_generation_prompt=prompt, tokenize=False
            )
        except Exception as error:  # the template is a program we did not write: it can raise anything
            reason = str(error) or type(error).__name__
            raise TemplateRefusal(reason if reason.endswith((".", "!", "?")) else f"{reason}.") from error
        return str(text)

    def bounded(self, work: Callable[[], T]) -> T:
        """The result of `work`, which renders. Raises `ModelError` when one render takes too long or too much memory.

        The work runs in a thread of its own, since nothing else can interrupt a template on every platform.
        """
        worker = _Worker(work)
        most = resident_bytes() + GROWTH_BYTES
        worker.start()
        try:
            while not worker.finished.wait(0.05):
                since = self._running_since
                if since is not None and time.monotonic() - since > RENDER_S:
                    raise self._explodes(f"did not finish one row in {RENDER_S:g} s")
                if resident_bytes() > most:
                    raise self._explodes(f"took more than {GROWTH_BYTES // 1024**3} GiB of memory")
        finally:
            if worker.is_alive() and not worker.finished.is_set():
                worker.abandon()
        if worker.error is not None:
            raise worker.error
        return worker.result

    def _explodes(self, what: str) -> ModelError:
        return ModelError(
            f"{self._tokenizer.name_or_path}: its chat template {what}. "
            "Give another by data.template, and look at this one before you trust its source."
        )


class _Worker(threading.Thread, Generic[T]):
    """One call in a daemon thread, which ends with the process should the call never return."""

    result: T

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(name="tunesmith-render", daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self.finished = threading.Event()

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:  # the outermost frame of a worker: raised again by the caller
            self.error = error
        finally:
            self.finished.set()

    def abandon(self) -> None:
        """Have the interpreter raise SystemExit in the thread at its next bytecode."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident or 0), ctypes.py_object(SystemExit))


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
