"""Conversations to ids and trained flags: the tokenizer's own template, tokenized as one text, each turn verified."""

# T tokens

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.drafts import Draft, Drafted, Room
from tunesmith.data.places import Place, Placed, placed
from tunesmith.data.spans import Ambiguous, Turn, find_turn, not_shown
from tunesmith.data.stops import QUESTION, find_stops
from tunesmith.data.template import ChatTemplate, Message, Rendering, Request, TemplateRefusal
from tunesmith.data.tokens import ControlTokens, Encoder
from tunesmith.errors import DataError, ModelError
from tunesmith.types import Example, Part, Problem, Source

CACHED_PROMPTS = 10_000


@dataclass(frozen=True, slots=True)
class _Text:
    """A rendered example."""

    whole: str
    turns: tuple[Turn, ...]
    warnings: tuple[Problem, ...]


class Conversations:
    """Renders and tokenizes chats. `stop_ids` close an assistant's turn, found by rendering."""

    def __init__(self, tokenizer: Any, encoder: Encoder, room: Room, date: str | None) -> None:
        self._template = ChatTemplate(tokenizer, date)
        self._encoder = encoder
        self._room = room
        self.template_text = self._template.text
        self.control = ControlTokens(tokenizer, self.template_text)
        stops = find_stops(self._bare_render, self.control, name=encoder.name)
        self.stop_ids = stops.ids
        self._run = list(stops.run)
        self._ends = tuple(self.control.closing[token_id] for token_id in dict.fromkeys([stops.run[0], *stops.ids]))
        self._refuse_two_bos()
        self._opening_ids: dict[str, bytes] = {}
        """Of the end of a prompt, from its last cut on, the ids as they lie in memory."""

    def encode(self, examples: Sequence[Example]) -> list[Drafted]:
        """Aligned with `examples`."""
        texts = self._template.render_all([self._render(example) for example in examples])
        rendered = [text for text in texts if isinstance(text, _Text)]
        found = self._encoder.tokenized([text.whole for text in rendered])
        rows = placed([(text.whole, text.turns) for text in rendered], found, self.control)
        self._learn_openings(
            {place.opening for of_text in rows.turns for place in of_text if place.opening is not None}
        )
        following = enumerate(rows.row_ids())
        return [
            self._draft(example.source, text, rows, *next(following)) if isinstance(text, _Text) else text
            for example, text in zip(examples, texts, strict=True)
        ]

    def prompt_ids(self, parts: Sequence[Part], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """What serving feeds before the assistant's next turn. Raises `DataError` when the template refuses."""
        messages = [as_message(part) for part in parts]
        try:
            text = self._template.render(messages, tools=tools, prompt=True)
        except TemplateRefusal as refusal:
            raise DataError(f"the chat template refuses the conversation: {refusal}") from refusal
        return [int(token_id) for token_id in self._encoder.encode([text])[0].ids_T]

    def _render(self, example: Example) -> Rendering[_Text | Problem]:
        messages = [as_message(part) for part in example.parts]

        def ask(some: Sequence[Message], prompt: bool) -> Request:
            return Request(some, prompt, example.tools)

        index = -1
        try:
            whole = yield ask(messages, False)
            turns = []
            for index, part in enumerate(example.parts):
                if part.trained:
                    turns.append((yield from find_turn(ask, messages, index, whole=whole, ends=self._ends)))
        except TemplateRefusal as refusal:
            return Problem(
                example.source,
                "template_error",
                f"the chat template refuses the row: {refusal}",
                "Change the row, or give another template by data.template.",
            )
        except Ambiguous as reason:
            return Problem(
                example.source,
                "template_ambiguous",
                f"the chat template changes messages[{index}] ({example.parts[index].role}) so that its tokens "
                f"cannot be told: {reason}",
                "Split the row so that it ends with that answer, set its weight to 0, or give another template by "
                "data.template.",
            )
        missing = list(_left_out(example, messages, whole, turns))
        useless = [problem for problem in missing if problem.severity == "error"]
        return useless[0] if useless else _Text(whole, tuple(turns), tuple(missing))

    def _draft(self, source: Source, text: _Text, rows: Placed, row: int, ids_T: NDArray[np.int32]) -> Drafted:
        if self._starts_with_two_bos(ids_T):
            return Problem(
                source,
                "double_bos",
                "its text begins with two BOS tokens.",
                "Remove the BOS from the first message: the chat template writes one.",
            )
        num_unspelled = rows.reserved[row] - self.control.count(text.whole)
        draft = Draft(ids_T, np.zeros(len(ids_T), np.bool_), num_unspelled=num_unspelled, warnings=list(text.warnings))
        for place in rows.turns[row]:
            first = self._first_token(source, text.whole, place, ids_T, draft.warnings)
            if isinstance(first, Problem):
                return first
            last = self._last_token(text.whole, place.turn, rows, row, ids_T)
            if last is None:
                return Problem(
                    source,
                    "no_end_token",
                    f"the chat template does not close messages[{place.turn.index}] with "
                    f"{' or '.join(self._ends)}, so the model would not learn to stop there.",
                    "Split the row so that it ends with that answer, or give another template by data.template.",
                )
            draft.trained_T[first : last + 1] = True
        return self._room.fit(source, draft)

    def _first_token(
        self, source: Source, whole: str, place: Place, ids_T: NDArray[np.int32], warnings: list[Problem]
    ) -> int | Problem:
        """The first trained token of a turn; a Problem when it is not one that serving lets the model write."""
        turn, first = place.turn, place.first
        straddles = place.first_start < turn.start and bool(whole[place.first_start : turn.start].strip())
        served = None if place.opening is None else self._served_tokens(place.opening, place.opening_at, ids_T)
        if served is not None:
            first = max(first, served)
        elif turn.prompt is not None and turn.start == turn.prompt:
            straddles = True
        elif turn.index:
            warnings.append(
                Problem(
                    source,
                    "context_rewritten",
                    f"what stands before messages[{turn.index}] in the whole conversation is not what serving shows "
                    "the model at that turn.",
                    "The chat template does this, for instance by leaving out earlier reasoning.",
                    severity="warning",
                )
            )
        if straddles:
            return Problem(
                source,
                "token_boundary",
                f"the first token of messages[{turn.index}] joins the end of the prompt and the start of the answer, "
                f"{whole[turn.start : turn.start + 12]!r}: the prompt that serving feeds would end in other tokens.",
                "Remove the white space at the start of the answer, or change its first characters.",
            )
        return first

    def _last_token(self, whole: str, turn: Turn, rows: Placed, row: int, ids_T: NDArray[np.int32]) -> int | None:
        """The token that closes a turn, which may have white space before and after it."""
        marks = rows.closing
        at = rows.closing_behind(row, turn.limit) - 1 if turn.close is None else rows.closing_behind(row, turn.close)
        if not marks.bounds[row] <= at < marks.bounds[row + 1]:
            return None
        last = marks.at[at]
        if turn.close is not None:
            between = whole[turn.close : marks.starts[at]]
        else:
            between = whole[marks.ends[at] : turn.limit] if marks.ends[at] > turn.start else "before"
        if ids_T[last : last + len(self._run)].tolist() == self._run:
            last += len(self._run) - 1
        return last if not between.strip() and int(ids_T[last]) in self.stop_ids else None

    def _served_tokens(self, opening: str, at: int, ids_T: NDArray[np.int32]) -> int | None:
        """How many tokens the prompt has, if they are the first ones of the whole text; None if they are not."""
        expected = self._opening_ids[opening]
        end = at + len(expected) // ids_T.itemsize
        return end if ids_T[at:end].tobytes() == expected else None

    def _learn_openings(self, openings: set[str]) -> None:
        if len(self._opening_ids) > CACHED_PROMPTS:
            self._opening_ids.clear()
        unknown = sorted(openings - self._opening_ids.keys())
        ids = (ids_T.tobytes() for ids_T in self._encoder.ids(unknown, plain=False))
        self._opening_ids.update(zip(unknown, ids, strict=True))

    def _refuse_two_bos(self) -> None:
        text = self._bare_render([QUESTION], True)
        if self._starts_with_two_bos(self._encoder.encode([text])[0].ids_T):
            raise ModelError(
                f"{self._encoder.name}: its chat template writes BOS twice. Give a corrected one by data.template."
            )

    def _bare_render(self, messages: Sequence[Message], prompt: bool) -> str:
        return self._template.render(messages, tools=(), prompt=prompt)

    def _starts_with_two_bos(self, ids_T: NDArray[np.int32]) -> bool:
        return len(ids_T) > 1 and ids_T[0] == ids_T[1] == self._encoder.bos_id


def as_message(part: Part) -> Message:
    """A part as templates know it: role, content, and its other fields as they came."""
    return {"role": part.role, "content": part.text, **part.fields}


def _left_out(example: Example, messages: Sequence[Message], whole: str, turns: Sequence[Turn]) -> Iterator[Problem]:
    """What a row says and the template does not show: warnings, an error where nothing of an answer is left."""
    for turn in turns:
        text = whole[turn.start : turn.limit if turn.close is None else turn.close]
        fields = not_shown(messages[turn.index], text)
        if fields or turn.shortened:
            what = f"the {' and '.join(fields)}" if fields else "a part"
            yield Problem(
                example.source,
                "not_shown",
                f"the chat template leaves out {what} of messages[{turn.index}], which is trained without.",
                "Give a template that shows it by data.template, or set the weight of that message to 0.",
                severity="warning" if text.strip() else "error",
            )
    names = [str(tool.get("function", tool).get("name", "")) for tool in example.tools]
    unseen = [name for name in names if name not in whole]
    if unseen:
        yield Problem(
            example.source,
            "not_shown",
            f"the chat template leaves out the row's tool definitions ({', '.join(unseen)}).",
            "Give a template that shows tools by data.template.",
            severity="warning",
        )
