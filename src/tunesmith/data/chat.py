"""Conversations to ids and trained flags: rendered by the tokenizer's template, tokenized as one text, checked.

The place of an answer in the rendered text S is found by rendering and never guessed. Two ways, tried in this
order for each turn i:

prefix    P = messages before i, with the assistant's turn opened, as serving feeds it; E = messages to i.
          When S starts with both, the turn is the text between them.
sentinel  S again with the turn replaced by a word that occurs nowhere. When the text around that word is the text
          around the turn in S, the turn is the text that the word replaced.

A template that allows neither is an error.
"""

# T tokens

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.chat_template import ChatTemplate, Message, TemplateRefusal
from tunesmith.data.drafts import Draft, Drafts
from tunesmith.data.images import BadImage
from tunesmith.data.placeholders import ImageCheck, as_lists, as_message, expanded, num_images
from tunesmith.data.renderer import EncoderSettings, OnCut, RowEncoder, Tools
from tunesmith.data.tokenizer import ControlPlaces, ControlTokens, Tokens
from tunesmith.errors import DataError, ModelError
from tunesmith.types import Example, ImageRef, Part, Problem, Source, images_of

SENTINEL = "tunesmithQ7vAnswerZ3kHere"
"""One word, letters and digits only: no template trims, splits or escapes it."""
PROBE_QUESTION = {"role": "user", "content": "Hi"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": {"word": "a"}}}

Render = Callable[[Sequence[Message], bool], str]
"""(messages, whether to open the assistant's turn) -> text"""


class Ambiguous(Exception):
    """The template changes a turn in a way that hides its place."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One trained turn, in characters of the whole text."""

    index: int
    """Index of its message."""
    prompt: int | None
    """Characters of the prompt that serving feeds before this turn. None: the text does not begin with it."""
    start: int
    """First character that the message, not the template, contributed."""
    close: int | None
    """First character of the text that closes the turn. None: unknown, it ends at `limit`."""
    limit: int
    """End of the text of this turn, closing included; only needed where `close` is None."""
    shortened: bool = False
    """Whether the template shows only a part of the message's text."""


@dataclass(frozen=True, slots=True)
class _Text:
    """A rendered example."""

    whole: str
    turns: tuple[Turn, ...]
    """Trained turns."""
    warnings: tuple[Problem, ...]
    images: tuple[int, ...] = ()
    """`ImageRef.number` of each."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A rendered example and its tokens."""

    text: _Text
    tokens: Tokens
    places: ControlPlaces
    ends: Sequence[int]
    """The last character of each closing control token, plus one."""
    openings: Mapping[int, tuple[str, int]]
    """For each turn with a prompt, by the index of its message: the end of the prompt, from its last control
    token on, and the index of that token. A control token cuts a text before the tokenizer looks further, so
    what precedes it has the same ids in the prompt and in the whole text. To tokenize each prompt whole
    would be quadratic in the turns."""


class ChatEncoder(RowEncoder):
    """Renders and tokenizes chats. `stop_ids` close an assistant's turn, found by rendering."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._template = ChatTemplate(settings.tokenizer, settings.date)
        self._placeholders, self._images = settings.placeholders, ImageCheck()
        self._takes_lists = settings.placeholders is not None and self._shows_lists_alone()
        self._fast = fast = settings.fast
        self._limit = settings.limit
        self.template_text = self._template.text
        self.control = ControlTokens(settings.tokenizer, self.template_text)
        self._run, self.stop_ids, self._middle = find_stops(self._bare_render, self.control, name=fast.name)
        ends = dict.fromkeys([self._run[0], *self.stop_ids, *self._middle])
        self._ends = tuple(self.control.closing[token_id] for token_id in ends)
        if self._starts_with_two_bos(fast.ids([self._bare_render([PROBE_QUESTION], True)])[0].tolist()):
            raise ModelError(f"{fast.name}: its chat template writes BOS twice. Give a corrected one by data.template.")

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        texts = [self._render(example) for example in examples]
        wholes = [text.whole for text in texts if isinstance(text, _Text)]
        tokens = iter(self._fast.encode_alike(wholes, self.control.num_common(wholes)))
        rows = [self._row(text, next(tokens)) if isinstance(text, _Text) else text for text in texts]
        prompts = sorted({text for row in rows if isinstance(row, _Row) for text, _ in row.openings.values()})
        prompt_ids = {text: ids_T.tolist() for text, ids_T in zip(prompts, self._fast.ids(prompts), strict=True)}
        return [
            self._draft(example.source, row, prompt_ids) if isinstance(row, _Row) else row
            for example, row in zip(examples, rows, strict=True)
        ]

    def prompt_ids(self, parts: Sequence[Part], tools: Tools, max_tokens: int | None, on_cut: OnCut) -> list[int]:
        """The ids that serving feeds before the next answer. Raises `DataError` when the template refuses."""
        messages, images = [as_message(part) for part in parts], images_of(parts)
        if images and self._placeholders is None:
            raise DataError("there is an image, and this model reads text alone. Use a model that sees.")
        try:
            for image in images:
                self._images.notes(image)
            text = self._rendered(messages, prompt=True, tools=tools, images=images)
        except TemplateRefusal as refusal:
            raise DataError(f"the chat template refuses the conversation: {refusal}") from refusal
        except BadImage as bad:
            raise DataError(f"{bad.code}: {bad.message} {bad.fix}") from bad
        except ValueError as error:  # of the processor
            raise DataError(f"image_shape: {error}") from error
        ids: list[int] = self._fast.ids([text])[0].tolist()
        return ids

    def _render(self, example: Example) -> _Text | Problem:
        messages = [as_message(part) for part in example.parts]

        def render(turns_shown: Sequence[Message], prompt: bool) -> str:
            return self._rendered(turns_shown, prompt=prompt, tools=example.tools, images=example.images)

        index = -1
        try:
            seen = self._images.warnings(example)
            conversation = render(messages, False)
            turns = []
            for index, part in enumerate(example.parts):
                if part.trained:
                    turns.append(find_turn(render, messages, index, whole=conversation, ends=self._ends))
        except TemplateRefusal as refusal:
            fix = "Change the row, or give another template by data.template."
            return Problem(example.source, "template_error", f"the chat template refuses the row: {refusal}", fix)
        except Ambiguous as reason:
            return Problem(
                example.source,
                "template_ambiguous",
                f"the chat template changes messages[{index}] ({example.parts[index].role}) so that its tokens "
                f"cannot be located: {reason}",
                "Split the row so that it ends with that answer, set its weight to 0, or give another template "
                "by data.template.",
            )
        except BadImage as bad:
            return Problem(example.source, bad.code, bad.message, bad.fix)
        except ValueError as error:  # of the processor, for a side that is too short or too long
            return Problem(example.source, "image_shape", f"{error}", "Cut or resize the image.")
        missing = [*seen, *_left_out(example, messages, conversation, turns)]
        useless = [problem for problem in missing if problem.severity == "error"]
        numbers = tuple(image.number for image in example.images)
        return useless[0] if useless else _Text(conversation, tuple(turns), tuple(missing), numbers)

    def _row(self, text: _Text, tokens: Tokens) -> _Row:
        places = self.control.places(text.whole, tokens)
        ends = [end for _, (_, end) in places.cuts]
        openings = {}
        for turn in text.turns:
            if turn.prompt is not None:
                last = bisect_right(ends, turn.prompt) - 1
                at, (start, _) = places.cuts[last] if last >= 0 else (0, (0, 0))
                openings[turn.index] = text.whole[start : turn.prompt], at
        return _Row(text, tokens, places, [end for _, (_, end) in places.closing], openings)

    def _draft(self, source: Source, row: _Row, prompt_ids: Mapping[str, list[int]]) -> Drafts:
        if self._starts_with_two_bos(row.tokens.ids):
            fix = "Remove the BOS from the first message: the chat template writes one."
            return Problem(source, "double_bos", "its text begins with two BOS tokens.", fix)
        conversation, ids_T = row.text.whole, row.tokens.ids_T
        warnings, images = list(row.text.warnings), row.text.images
        draft = Draft(ids_T, np.zeros(len(ids_T), np.bool_), warnings=warnings, images=images)
        for turn in row.text.turns:
            served = None
            if turn.index in row.openings:
                opening, at = row.openings[turn.index]
                end = at + len(prompt_ids[opening])
                served = end if row.tokens.ids[at:end] == prompt_ids[opening] else None
            first = _first_token(source, conversation, turn, row.tokens, served=served, warnings=draft.warnings)
            if isinstance(first, Problem):
                return first
            last = self._last_token(row, turn)
            if last is None:
                return Problem(
                    source,
                    "no_end_token",
                    f"the chat template does not close messages[{turn.index}] with "
                    f"{' or '.join(self._ends)}, so the model would not learn to stop there.",
                    "Split the row so that it ends with that answer, or give another template by data.template.",
                )
            draft.trained_T[first : last + 1] = True
        fitting = self._limit.fit(source, draft)
        if images and not isinstance(fitting, Problem) and (lost := self._lost_images(ids_T, draft)):
            what = f"its {len(ids_T)} tokens would be cut in an image ({lost} of its tokens): they"
            return self._limit.refusal(source, what)
        return fitting

    def _lost_images(self, ids_T: NDArray[np.int32], draft: Draft) -> int:
        """Tokens of images behind the end of a row that was cut: an image is whole or the row is bad."""
        assert self._placeholders is not None, "rows with images have been refused"
        return int((ids_T[len(draft.ids_T) :] == self._placeholders.token_id).sum())

    def _last_token(self, row: _Row, turn: Turn) -> int | None:
        """The last trained token of a turn: the one that closes it, which may have white space before and after
        it; of an earlier answer that another token closes than the last one, the one before that."""
        conversation, closing = row.text.whole, row.places.closing
        behind = bisect_right(row.ends, turn.limit if turn.close is None else turn.close)
        at = behind - 1 if turn.close is None else behind
        if not 0 <= at < len(closing):
            return None
        last, (start, end) = closing[at]
        if turn.close is not None:
            between = conversation[turn.close : start]
        else:
            between = conversation[end : turn.limit] if end > turn.start else "before"
        if between.strip():
            return None
        if row.tokens.ids[last] in self._middle:  # it ends a message and no answer: no place to stop
            return last - 1
        if row.tokens.ids[last : last + len(self._run)] == self._run:
            last += len(self._run) - 1
        return last if row.tokens.ids[last] in self.stop_ids else None

    def _bare_render(self, messages: Sequence[Message], prompt: bool) -> str:
        return self._rendered(messages, prompt=prompt)

    def _rendered(
        self, messages: Sequence[Message], *, prompt: bool, tools: Tools = (), images: Sequence[ImageRef] = ()
    ) -> str:
        """The text of messages; `images`: all of the conversation, of which these messages may be the
        beginning."""
        shown = as_lists(messages) if self._takes_lists else messages
        text = self._template.render(shown, tools=tools, prompt=prompt)
        if not images or self._placeholders is None:
            return text
        return expanded(text, images[: num_images(messages)], self._placeholders, several=len(images) > 1)

    def _shows_lists_alone(self) -> bool:
        """Whether the template shows a text that comes as a list of pieces, and leaves out one that comes as a
        string."""
        question = {"role": "user", "content": SENTINEL}
        texts = []
        for messages in ([question], as_lists([question])):
            try:
                texts.append(self._template.render(messages, prompt=True))
            except TemplateRefusal:
                texts.append("")
        return SENTINEL not in texts[0] and SENTINEL in texts[1]

    def _starts_with_two_bos(self, ids: Sequence[int]) -> bool:
        return len(ids) > 1 and ids[0] == ids[1] == self._fast.bos_id


def _first_token(
    source: Source, whole: str, turn: Turn, tokens: Tokens, *, served: int | None, warnings: list[Problem]
) -> int | Problem:
    """The first trained token of a turn, or a Problem if serving would not let the model write this token.
    `served`: tokens of the prompt in serving, if the whole text begins with them."""
    if served is not None and turn.start == turn.prompt and not whole[turn.start : turn.start + 1].isspace():
        return served  # nearly always: the answer begins behind the prompt's own tokens
    first = tokens.num_until(turn.start)
    first_start = tokens.offsets[first][0] if first < len(tokens.offsets) else turn.start
    straddles = first_start < turn.start and bool(whole[first_start : turn.start].strip())
    if served is not None:
        first = max(first, served)
    elif turn.prompt is not None and turn.start == turn.prompt:
        straddles = True
    elif turn.index:
        message = (
            f"what precedes messages[{turn.index}] in the whole conversation is not what serving shows "
            "the model at that turn."
        )
        fix = "The chat template does this, for instance by leaving out earlier reasoning."
        warnings.append(Problem(source, "context_rewritten", message, fix, severity="warning"))
    if straddles:
        return Problem(
            source,
            "token_boundary",
            f"the first token of messages[{turn.index}] joins the end of the prompt and the start of the answer, "
            f"{whole[turn.start : turn.start + 12]!r}: the prompt that serving feeds would end in other tokens.",
            "Remove the white space at the start of the answer, or change its first characters.",
        )
    return first


def _left_out(example: Example, messages: Sequence[Message], whole: str, turns: Sequence[Turn]) -> Iterator[Problem]:
    """Parts of a row that the template does not show: warnings, an error where nothing of an answer is left."""
    for turn in turns:
        if len(messages[turn.index]) == 2 and not turn.shortened:  # role and content
            continue
        text = whole[turn.start : turn.limit if turn.close is None else turn.close]
        fields = not_shown(messages[turn.index], text)
        if fields or turn.shortened:
            what = f"the {' and '.join(fields)}" if fields else "a part"
            message = f"the chat template leaves out {what} of messages[{turn.index}], which is trained without."
            fix = "Give a template that shows it by data.template, or set the weight of that message to 0."
            yield Problem(example.source, "not_shown", message, fix, severity="warning" if text.strip() else "error")
    names = [str(tool.get("function", tool).get("name", "")) for tool in example.tools]
    unseen = [name for name in names if name not in whole]
    if unseen:
        message = f"the chat template leaves out the row's tool definitions ({', '.join(unseen)})."
        fix = "Give a template that shows tools by data.template."
        yield Problem(example.source, "not_shown", message, fix, severity="warning")


def find_turn(render: Render, messages: Sequence[Message], index: int, *, whole: str, ends: Sequence[str]) -> Turn:
    """Find the turn `index` in `whole`, the text of all messages; `ends` are the texts that close a turn.

    Raises `Ambiguous`, or `TemplateRefusal` when the template does not take the messages before the turn.
    """
    # No serving prompt exists for a conversation that the assistant opens: templates refuse an empty list.
    prompt = render(messages[:index], True) if index else None
    if prompt is not None and whole.startswith(prompt):
        turn = _verbatim(messages[index], index, prompt, whole, ends)
        if turn is None:
            turn = _by_prefix(render, messages, index, prompt, whole)
        if turn is not None:
            return turn
    else:
        prompt = None
    return _by_sentinel(render, messages, index, prompt, whole)


def closings(render: Render, question: Message) -> tuple[str, str]:
    """The texts that follow an answer to `question`: at the end of a conversation, and before another question.
    The second is "" for a template that takes only one question."""
    answer = _bare("assistant")
    _, last = _around(render([question, answer], False))
    try:
        _, middle = _around(render([question, answer, question], False))
    except (Ambiguous, TemplateRefusal):
        middle = ""
    return last, middle


def _verbatim(message: Message, index: int, prompt: str, whole: str, ends: Sequence[str]) -> Turn | None:
    """Find the turn without another rendering, as is usually possible: prompt, the message as it is, a text
    that closes a turn."""
    text = message.get("content")
    if not isinstance(text, str) or not text or len(message) > 2 or not whole.startswith(text, len(prompt)):
        return None
    close = len(prompt) + len(text)
    if not whole[close : close + 256].lstrip().startswith(tuple(ends)):
        return None
    return Turn(index, len(prompt), start=len(prompt), close=close, limit=len(whole))


def _by_prefix(render: Render, messages: Sequence[Message], index: int, prompt: str, whole: str) -> Turn | None:
    until = render(messages[: index + 1], False)
    if not whole.startswith(until) or len(until) < len(prompt):
        return None
    turn = until[len(prompt) :]
    try:
        before, after = _around(render([*messages[:index], _bare(messages[index]["role"])], False))
    except (TemplateRefusal, Ambiguous):
        before, after = prompt, ""
    start = _start(prompt, before) if until.startswith(before) else len(prompt)
    known = after and turn.endswith(after) and len(until) - len(after) >= start
    close = len(until) - len(after) if known else None
    return Turn(index, len(prompt), start=start, close=close, limit=len(until))


def _by_sentinel(render: Render, messages: Sequence[Message], index: int, prompt: str | None, whole: str) -> Turn:
    bare = _bare(messages[index]["role"])
    try:
        before, after = _around(render([*messages[:index], bare, *messages[index + 1 :]], False))
    except TemplateRefusal as refusal:
        raise Ambiguous(str(refusal)) from refusal
    start, close = len(before), len(whole) - len(after)
    if start > close or not whole.startswith(before) or not whole.endswith(after):
        raise Ambiguous("the text around it changes with it.")
    between, text = whole[start:close], messages[index].get("content") or ""
    if not _is_of(between, text, messages[index]):
        raise Ambiguous("the text in its place is not its own.")
    served = None if prompt is None else len(prompt)
    shortened = text.strip() not in between
    return Turn(index, served, start=_start(prompt, before), close=close, limit=close, shortened=shortened)


def _start(prompt: str | None, before: str) -> int:
    """First trained character: behind what the template puts before any answer, as an empty <think> block.

    White space alone is trained: served the prompt, the model has to write it, mostly in its first token.
    """
    if prompt is None:
        return len(before)
    return len(prompt) if not before[len(prompt) :].strip() else len(before)


def _is_of(found: str, text: str, message: Message) -> bool:
    """Whether `found` is the message's text or part of it; with tool calls or reasoning whether it holds it."""
    if len(message) > 2 and found.strip() and text.strip() in found:
        return True
    return found in text and bool(found.strip() or not text.strip())


def not_shown(message: Message, text: str) -> list[str]:
    """The fields with words of the assistant that a message has and its rendered text lacks."""
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


def find_stops(
    render: Render, control: ControlTokens, *, name: str
) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
    """The tokens that close an answer, one directly after the other (mostly one, two for Command R7B), those
    where generation stops: the last of them, and the one that closes a turn with tool calls; and the one that
    closes an earlier answer where that is another, as gpt-oss ends a conversation with <|return|>, which
    becomes <|end|> when the conversation continues.

    Raises `ModelError` when the template does not show an answer, or closes it without a control token.

    What a template writes behind the last turn only, such as Phi 3's <|endoftext|>, closes text and no turn.
    """
    try:
        last, middle = closings(render, PROBE_QUESTION)
    except TemplateRefusal as refusal:
        raise ModelError(
            f"{name}: its chat template refuses a question and an answer: {refusal} Give another by data.template."
        ) from refusal
    except Ambiguous as reason:
        raise ModelError(
            f"{name}: its chat template hides the assistant's answer: {reason} Give another by data.template."
        ) from reason
    at_end = control.closing_run(last)
    earlier = control.closing_run(middle)
    pairs = zip(at_end, earlier, strict=False)
    run = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)] or at_end[:1]
    if not run:
        raise ModelError(
            f"{name}: its chat template closes an assistant's turn with {last[:40]!r}, which does not begin with a "
            "control token of the tokenizer: the tuned model would never stop. Give one by data.template that ends "
            "each of the assistant's turns with {{ eos_token }}."
        )
    ids = dict.fromkeys([run[-1], *_end_of_tool_call(render, control, last)])
    return run, tuple(ids), tuple(token_id for token_id in earlier[:1] if token_id not in (*run, *ids))


def _end_of_tool_call(render: Render, control: ControlTokens, close: str) -> list[int]:
    """The id that closes a turn with a tool call, where another token closes an answer."""
    try:
        text = render([PROBE_QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}], False)
    except TemplateRefusal:  # a template without tools
        return []
    closing_id = None if text.endswith(close) else control.last_closing_id(text)
    return [] if closing_id is None else [closing_id]
