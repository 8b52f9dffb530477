"""The tokenizer's own chat template, in the immutable Jinja sandbox of transformers."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from typing import Any

from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from tunesmith.errors import ModelError

Message = Mapping[str, Any]

OUTPUT_CHARS = 64 * 1024 * 1024
"""Longest text of one row: eight times `limits.line_bytes`."""
MOST_REASON = 10_000
RENDERING_S = 20.0
"""Longest time for one row, which takes microseconds: the sandbox limits each loop, but not loops within loops."""
_RENDERING = threading.Lock()
"""transformers compiles a template once for all tokenizers; its date is set before each rendering."""


class TemplateRefusal(Exception):
    """The template raised: it does not take these messages. Its text is the template's own, as a sentence."""


class ChatTemplate:
    """The chat template of a tokenizer. `date`: the day that `strftime_now` writes (YYYY-MM-DD); None: today.

    Raises `ModelError` when there is none, and for one that computes powers.
    """

    def __init__(self, tokenizer: Any, date: str | None = None) -> None:
        self._name = tokenizer.name_or_path
        self.text = _text(tokenizer)
        _refuse_powers(self._name, self.text)
        self._template = tokenizer.chat_template
        self._special_tokens = {name: _as_text(value) for name, value in tokenizer.special_tokens_map.items()}
        self._date = date

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), prompt: bool) -> str:
        """The text of a conversation; `prompt` opens the assistant's next turn, as serving does.

        Raises `TemplateRefusal` with the template's own error, or for a text of more than `OUTPUT_CHARS`; `ModelError`
        for one that nests too deeply. A lack of memory or of a package is not the row's, and is raised as it is.
        """
        try:
            text = self._render(list(messages), list(tools) or None, prompt)
        except (MemoryError, ImportError):
            raise
        except (RecursionError, TimeoutError) as error:
            nests = "nests or calls itself more deeply than Python can follow"
            does = nests if isinstance(error, RecursionError) else f"ran for more than {RENDERING_S:g} s, in a loop"
            raise ModelError(
                f"{self._name}: its chat template {does}. Give another by data.template, and look at this one before "
                "you trust its source."
            ) from error
        except Exception as error:  # the template is a program we did not write: it can raise anything
            reason = str(error)[:MOST_REASON] or type(error).__name__
            raise TemplateRefusal(reason if reason.endswith((".", "!", "?")) else f"{reason}.") from error
        if len(text) > OUTPUT_CHARS:
            raise TemplateRefusal(f"it wrote {len(text)} characters, more than {OUTPUT_CHARS}.")
        return text

    def _render(self, messages: list[Message], tools: list[Mapping[str, Any]] | None, prompt: bool) -> str:
        template = self._template
        if isinstance(template, dict):
            template = template["tool_use" if tools and "tool_use" in template else "default"]
        compiled = _compile_jinja_template(template)  # once: it keeps what it made
        given: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt, **self._special_tokens}
        with _RENDERING:
            if type(compiled.globals) is not dict:  # but a ChainMap, which takes a fifth of the time of a short chat
                _watch(compiled, template)
                compiled.globals = dict(compiled.globals)
            # The environment's own `strftime_now` gives today, which is another day tomorrow.
            day = datetime.fromisoformat(self._date) if self._date else datetime.now()
            compiled.globals["strftime_now"] = day.strftime
            compiled.environment.deadline = time.thread_time() + RENDERING_S
            try:
                if tools is None and all(map(_is_plain, messages)):  # half the time
                    return str(compiled.render(messages=messages, documents=None, **given))
                messages, given["tools"] = json.loads(json.dumps([messages, tools], default=str))  # dates as text
                return str(render_jinja_template([messages], chat_template=template, **given)[0][0])
            finally:
                compiled.environment.deadline = math.inf


def _watch(compiled: Any, text: str) -> None:
    """Compile a template again, so that each turn of a loop and each call of a macro calls `environment.turn`, which
    raises TimeoutError once the thread has computed until `environment.deadline`."""
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator

    environment, num_turns = compiled.environment, 0

    class Watched(CodeGenerator):
        def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
            repeated: Any
            for repeated in node.find_all((nodes.For, nodes.Macro)):
                repeated.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("turn")))
            super().visit_Template(node, frame)

        def visit_EnvironmentAttribute(self, node: nodes.EnvironmentAttribute, frame: Any) -> None:
            self.write(f"environment.{node.name}()")

    def turn() -> None:
        nonlocal num_turns
        num_turns += 1
        if not num_turns % 100 and time.thread_time() > environment.deadline:
            raise TimeoutError

    environment.turn, environment.code_generator_class = turn, Watched
    watched = environment.from_string(text)
    compiled.root_render_func, compiled.blocks = watched.root_render_func, watched.blocks


def _refuse_powers(name: str, text: str) -> None:
    """Raise `ModelError` for a template with x ** y: nothing ends a process that computes 9**9**9, and jinja does so
    while it compiles. `f(**options)` is not a power."""
    from jinja2 import Environment, TemplateSyntaxError

    with suppress(TemplateSyntaxError):  # which rendering reports
        tokens = ((kind, value) for _, kind, value in Environment().lex(text) if kind != "whitespace")
        if any(now == ("operator", "**") and before not in ("(", ",") for (_, before), now in pairwise(tokens)):
            raise ModelError(
                f"{name}: its chat template computes a power (**), which may take for ever and no template needs. Give "
                "another by data.template, and look at this one before you trust its source."
            )


def _is_plain(message: Any) -> bool:
    return type(message) is dict and message.keys() == {"role", "content"} and type(message["content"]) is str


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
