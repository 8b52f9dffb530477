"""A chat template of somebody else ends in a clear error, whatever it does and whenever it does it."""

import resource
import time
from collections.abc import Iterator
from typing import Any

import pytest

from data.hostile_templates import HOSTILE
from often import often
from tiny import CHATML, tiny_tokenizer
from tunesmith.data import chat_template, sandbox, template_trial
from tunesmith.data.chat_template import ChatTemplate, TemplateRefusal
from tunesmith.errors import ModelError

MOST_S = 8
"""Of a template, on a busy machine: limits are 0.2 s of processor time here."""
FIRST = "{{% if tools %}}{}{{% endif %}}"
LATER = "{{% if messages | length > 50 %}}{}{{% endif %}}"
OFTEN = (
    "squaring", "powers", "lists compared", "lists as JSON", "views printed", "arguments kept", "doubling a text",
    "doubling by join", "doubling by format()", "a column by a number", "a repeated list", "sliced", "indented JSON",
    "loops that go on", "macros", "a block that calls itself", "a search", "texts kept", "lists added",
)  # fmt: skip
"""Run each time: one of each kind of attack and of each bound that it meets. The others before a release."""
CHAT: list[Any] = [{"role": "user", "content": "a"}] * 51


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(template_trial, "TRIAL_LIMIT_S", 0.2)
    monkeypatch.setattr(chat_template, "RENDERING_S", 0.2)
    started = time.monotonic()
    yield
    assert time.monotonic() - started < MOST_S


# trap: S26
@pytest.mark.parametrize("attack", often(HOSTILE, *OFTEN))
def test_what_any_conversation_meets_is_refused_before_a_row_is_rendered(attack: str) -> None:
    with pytest.raises(ModelError, match=r"its chat template .* look at this one before you trust its source\."):
        ChatTemplate(tiny_tokenizer(FIRST.format(HOSTILE[attack]) + CHATML))


@pytest.mark.parametrize("attack", often(HOSTILE, *OFTEN))
def test_what_a_later_row_meets_ends_within_bounds(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "fault_of", lambda texts, tokens: "")  # the trial, which meets no later row
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    template = ChatTemplate(tiny_tokenizer(LATER.format(HOSTILE[attack]) + CHATML))
    with pytest.raises((ModelError, TemplateRefusal)):
        template.render(CHAT, prompt=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # KiB
    assert template.render(CHAT[:1], prompt=False)  # the next row is not harmed


def test_a_sandbox_that_bounds_no_text_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug."""
    text = LATER.format("{% set x = 'a' * 20000 %}{{ x | length }}") + CHATML
    monkeypatch.setattr(sandbox, "TEXT_CHARS", 10_000)
    with pytest.raises(ModelError, match="makes a text of more than 10,000 characters"):
        ChatTemplate(tiny_tokenizer(text)).render(CHAT, prompt=False)
    monkeypatch.setattr(sandbox, "_room", lambda num_chars: num_chars)
    with pytest.raises(pytest.fail.Exception), pytest.raises(ModelError):
        ChatTemplate(tiny_tokenizer(text)).render(CHAT[:1] * 60, prompt=False)
