"""Where the assistant's turns stand in a rendered conversation, found by rendering and never guessed.

Two ways, tried in this order for each turn i of the whole text S:

prefix    P = messages before i, with the opening of an assistant's turn, as serving feeds it; E = messages to i.
          When S starts with both, the turn is what lies between.
sentinel  S again with the turn replaced by a word that occurs nowhere. When the text around that word is the text
          around the turn in S, the turn is what the word stood for.

A template that allows neither is an error: nothing is trained on a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.data.template import Message, Rendering, Request, TemplateRefusal

SENTINEL = "tunesmithQ7vAnswerZ3kHere"
"""One word, letters and digits only: no template trims, splits or escapes it."""

Render = Callable[[Sequence[Message], bool], str]
"""(messages, whether to open the assistant's turn) -> text"""
Ask = Callable[[Sequence[Message], bool], Request]
"""The same of a text that is rendered later, with those of other rows."""


class Ambiguous(Exception):
    """The template changes a turn in a way that hides where it stands."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One trained turn, in characters of the whole text."""

    index: int
    """Of its message."""
    prompt: int | None
    """How much of the whole text is what serving feeds before this turn. None: the text does not begin with that."""
    start: int
    """First character that the message, not the template, contributed."""
    close: int | None
    """Where the text that closes the turn begins. None: unknown, it ends at `limit`."""
    limit: int
    """End of the text of this turn, closing included; only needed where `close` is None."""
    shortened: bool = False
    """Whether the template shows only a part of the message's text."""


def find_turn(ask: Ask, messages: Sequence[Message], index: int, *, whole: str, ends: Sequence[str]) -> Rendering[Turn]:
    """Where the turn `index` stands in `whole`, the text of all messages; `ends` are the texts that close a turn.

    Raises `Ambiguous`, or `TemplateRefusal` when the template does not take the messages before the turn.
    """
    # No serving prompt exists for a conversation that the assistant opens: templates refuse an empty list.
    prompt = (yield ask(messages[:index], True)) if index else None
    if prompt is not None and whole.startswith(prompt):
        turn = _verbatim(messages[index], index, prompt, whole, ends)
        if turn is None:
            turn = yield from _by_prefix(ask, messages, index, prompt, whole)
        if turn is not None:
            return turn
    else:
        prompt = None
    return (yield from _by_sentinel(ask, messages, index, prompt, whole))


def closings(render: Render, question: Message) -> tuple[str, str]:
    """The text behind an answer to `question`: at the end of a conversation, and before a next question.

    The second is "" for a template that takes one question only.
    """
    answer = _bare("assistant")
    _, last = _around(render([question, answer], False))
    try:
        _, middle = _around(render([question, answer, question], False))
    except (Ambiguous, TemplateRefusal):
        middle = ""
    return last, middle


def _verbatim(message: Message, index: int, prompt: str, whole: str, ends: Sequence[str]) -> Turn | None:
    """The common case without a further render: prompt, the message as it is, a text that closes a turn."""
    text = message.get("content")
    if not isinstance(text, str) or not text or len(message) > 2 or not whole.startswith(text, len(prompt)):
        return None
    close = len(prompt) + len(text)
    if not whole[close : close + 256].lstrip().startswith(tuple(ends)):
        return None
    return Turn(index, len(prompt), start=len(prompt), close=close, limit=len(whole))


def _by_prefix(ask: Ask, messages: Sequence[Message], index: int, prompt: str, whole: str) -> Rendering[Turn | None]:
    until = yield ask(messages[: index + 1], False)
    if not whole.startswith(until) or len(until) < len(prompt):
        return None
    turn = until[len(prompt) :]
    try:
        before, after = _around((yield ask([*messages[:index], _bare(messages[index]["role"])], False)))
    except (TemplateRefusal, Ambiguous):
        before, after = prompt, ""
    start = _start(prompt, before) if until.startswith(before) else len(prompt)
    known = after and turn.endswith(after) and len(until) - len(after) >= start
    close = len(until) - len(after) if known else None
    return Turn(index, len(prompt), start=start, close=close, limit=len(until))


def _by_sentinel(ask: Ask, messages: Sequence[Message], index: int, prompt: str | None, whole: str) -> Rendering[Turn]:
    bare = _bare(messages[index]["role"])
    try:
        before, after = _around((yield ask([*messages[:index], bare, *messages[index + 1 :]], False)))
    except TemplateRefusal as refusal:
        raise Ambiguous(str(refusal)) from refusal
    start, close = len(before), len(whole) - len(after)
    if start > close or not whole.startswith(before) or not whole.endswith(after):
        raise Ambiguous("the text around it changes with it.")
    found, text = whole[start:close], messages[index].get("content") or ""
    if not _is_of(found, text, messages[index]):
        raise Ambiguous("what stands in its place is not its text.")
    served = None if prompt is None else len(prompt)
    shortened = text.strip() not in found
    return Turn(index, served, start=_start(prompt, before), close=close, limit=close, shortened=shortened)


def _start(prompt: str | None, before: str) -> int:
    """Where training begins: behind what the template puts before any answer, such as an empty <think> block.

    White space alone is trained: served the prompt, the model has to write it, mostly as part of its first token.
    """
    if prompt is None:
        return len(before)
    return len(prompt) if not before[len(prompt) :].strip() else len(before)


def _is_of(found: str, text: str, message: Message) -> bool:
    """Whether `found` is the message's text or a part of it; with tool calls or reasoning, whether it holds it."""
    if len(message) > 2 and found.strip() and text.strip() in found:
        return True
    return found in text and bool(found.strip() or not text.strip())


def not_shown(message: Message, text: str) -> list[str]:
    """The fields of a message, of those that hold what the assistant wrote, that a rendered text leaves out."""
    calls = message.get("tool_calls") or ()
    names = [str(call.get("function", call).get("name", "")) for call in calls if isinstance(call, Mapping)]
    fields = ["tool_calls"] if any(name not in text for name in names) else []
    for key in ("reasoning_content", "reasoning", "thinking"):
        value = message.get(key)
        if isinstance(value, str) and value.strip() not in text:
            fields.append(key)
    return fields


def _bare(role: str) -> Message:
    return {"role": role, "content": SENTINEL}


def _around(text: str) -> tuple[str, str]:
    if text.count(SENTINEL) != 1:
        raise Ambiguous("it does not show the text of the message as it is.")
    before, _, after = text.partition(SENTINEL)
    return before, after
