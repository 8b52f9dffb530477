"""The tokenizer's own chat template, in an immutable Jinja sandbox with bounds (`sandbox`)."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from transformers.utils import chat_template_utils

from tunesmith.data.sandbox import Sandbox, TooMuch
from tunesmith.data.template_trial import fault_of, words_of
from tunesmith.errors import ModelError
from tunesmith.types import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Record

MOST_REASON = 10_000
RENDERING_S = 20.0
"""Longest time for one row, which takes microseconds."""


class TemplateRefusal(Exception):
    """Raised where the template refuses these messages. The text is the template's own, as a sentence."""


class ChatTemplate:
    """The chat template of a tokenizer. `date`: the day that `strftime_now` writes (YYYY-MM-DD); None: today.

    It is tried in a process of its own first (`template_trial`). Raises `ModelError` when there is none, and
    for one that takes too much time or memory.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> None:
        self._name = tokenizer.name_or_path
        self.text = _text(tokenizer)
        self._template = tokenizer.chat_template
        self._special_tokens = {
            name: [str(token) for token in value] if isinstance(value, (list, tuple)) else str(value)
            for name, value in tokenizer.special_tokens_map.items()
        }
        self._date = date
        texts = self._template.values() if isinstance(self._template, dict) else [self._template]
        if fault := fault_of([str(text) for text in texts], self._special_tokens):
            raise self._bad(fault)

    def _bad(self, does: str) -> ModelError:
        return ModelError(
            f"{self._name}: its chat template {does}. Give another by data.template, and look at this one "
            "before you trust its source."
        )

    def render(self, messages: Sequence[Message], *, tools: Sequence[Record] = (), prompt: bool) -> str:
        """The text of a conversation; `prompt` opens the assistant's next turn, as serving does.

        Raises `TemplateRefusal` with the template's own error, or for too long a text; `ModelError` for one
        that nests too deeply, or takes too much time or memory. A lack of memory or of a package is not the
        row's, and is raised as it is.
        """
        try:
            text = self._render(list(messages), list(tools) or None, prompt)
        except (MemoryError, ImportError):
            raise
        except (TimeoutError, RecursionError, TooMuch) as error:
            raise self._bad(words_of(error, RENDERING_S)) from error
        except Exception as error:  # the template is a program we did not write: it can raise anything
            reason = str(error)[:MOST_REASON] or type(error).__name__
            raise TemplateRefusal(reason if reason.endswith((".", "!", "?")) else f"{reason}.") from error
        return text

    def _render(self, messages: list[Message], tools: list[Record] | None, prompt: bool) -> str:
        template = self._template
        if isinstance(template, dict):
            template = template["tool_use" if tools and "tool_use" in template else "default"]
        if tools is not None or not all(map(_is_plain, messages)):  # else half the time
            messages, tools = json.loads(json.dumps([messages, tools], default=str))  # dates as text
            messages = _alias(messages)
        # The day of a rendering: `strftime_now` gives today, which is another day tomorrow.
        day = datetime.fromisoformat(self._date) if self._date else datetime.now()
        variables: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt, **self._special_tokens}
        sandbox, is_rendering = _compiled(template)
        with is_rendering:
            sandbox.begin(RENDERING_S)
            return sandbox.template.render(messages=messages, documents=None, strftime_now=day.strftime, **variables)


@lru_cache(maxsize=64)
def _compiled(text: str) -> tuple[Sandbox, threading.Lock]:
    return Sandbox(text), threading.Lock()


_alias = getattr(chat_template_utils, "_alias_reasoning_fields", list)
"""Fields of reasoning by each of their names, in the versions of transformers that show them so."""


def _is_plain(message: Any) -> bool:
    return type(message) is dict and message.keys() == {"role", "content"} and type(message["content"]) is str


def _text(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # named templates: transformers takes "tool_use" when a row has tools
        return "\n".join(f"{{# {name} #}}{text}" for name, text in sorted(template.items()))
    if not template:
        raise ModelError(
            f"{tokenizer.name_or_path}: it has no chat template. Give one by data.template (a Jinja file, "
            "such as the one of the chat model you want to resemble), or train with task: generate."
        )
    return str(template)
