"""How a chat template closes an assistant's turn, found by rendering a question and an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from tunesmith.data.spans import Ambiguous, Render, closings
from tunesmith.data.template import TemplateRefusal
from tunesmith.data.tokens import ControlTokens
from tunesmith.errors import ModelError

QUESTION = {"role": "user", "content": "Hi"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": {"word": "a"}}}


@dataclass(frozen=True, slots=True)
class Stops:
    """Control tokens that close a turn."""

    run: tuple[int, ...]
    """Tokens that close an answer, one directly after the other; mostly one, two for Command R7B."""
    ids: tuple[int, ...]
    """Where generation stops: the last of `run`, and what closes a turn with tool calls where that is another."""


def find_stops(render: Render, control: ControlTokens, *, name: str) -> Stops:
    """Raises `ModelError` when the template does not show an answer, or closes it without a control token.

    What a template writes behind the last turn only, such as Phi 3's <|endoftext|>, closes the text and no turn.
    """
    try:
        last, middle = closings(render, QUESTION)
    except TemplateRefusal as refusal:
        raise ModelError(
            f"{name}: its chat template refuses a question and an answer: {refusal} Give another by data.template."
        ) from refusal
    except Ambiguous as reason:
        raise ModelError(
            f"{name}: its chat template hides the assistant's answer: {reason} Give another by data.template."
        ) from reason
    at_end = control.closing_run(last)
    run = _shared_start(at_end, control.closing_run(middle)) or at_end[:1]
    if not run:
        raise ModelError(
            f"{name}: its chat template closes an assistant's turn with {last[:40]!r}, which does not begin with a "
            "control token of the tokenizer: the tuned model would never stop. Give one by data.template that ends "
            "each of the assistant's turns with {{ eos_token }}."
        )
    ids = dict.fromkeys([run[-1], *_end_of_tool_call(render, control, last)])
    return Stops(run=tuple(run), ids=tuple(ids))


def _shared_start(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))]


def _end_of_tool_call(render: Render, control: ControlTokens, close: str) -> list[int]:
    """The id that closes a turn with a tool call, where it is not closed as an answer is."""
    try:
        text = render([QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}], False)
    except TemplateRefusal:  # a template without tools
        return []
    found = None if text.endswith(close) else control.last_closing_id(text)
    return [] if found is None else [found]
