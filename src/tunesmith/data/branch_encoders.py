"""Rows with branches to token ids: each line by an encoder of a single answer or text, all of them as one row.

Preferences are answers in a chat, or to a plain prompt. Rewards, and scores of documents for a query, are read
at one token of each line. Vectors are made of the tokens that are pooled.
"""

# T tokens

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.chat import ChatEncoder
from tunesmith.data.classification import ClassificationEncoder
from tunesmith.data.completion import CompletionEncoder
from tunesmith.data.drafts import Draft, Drafts, join
from tunesmith.data.formats.comparisons import SIDES
from tunesmith.data.renderer import EncoderSettings, OnCut, RowEncoder, Tools
from tunesmith.types import Example, Part, Pooling, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUERIES = ("anchor", "query", "sentence1")
"""Roles of texts that search; all others are found."""


def side_encoder(settings: EncoderSettings) -> RowEncoder:
    """The encoder of one answer with its prompt: in the chat template if the tokenizer has one."""
    return (ChatEncoder if getattr(settings.tokenizer, "chat_template", None) else CompletionEncoder)(settings)


class BranchEncoder(RowEncoder):
    """Encodes each branch of a row behind its stem, with the encoder of one side, and joins the results to one
    row."""

    names: tuple[str, ...] = SIDES
    """Names of the lines of a row that has one for each name, for messages."""
    compares = True
    """Lines that are all the same teach nothing."""

    def __init__(self, side: RowEncoder) -> None:
        self._side, self.control, self.template_text = side, side.control, side.template_text

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        lines = [self.lines(example) for example in examples]
        drafts = iter(self._side.encode([line for of_row in lines for line in of_row]))
        return [
            self.row(example, [(line, next(drafts)) for line in of])
            for example, of in zip(examples, lines, strict=True)
        ]

    def lines(self, example: Example) -> list[Example]:
        """Each branch behind the stem; an example without branches as it is."""
        branches = example.branches or ((),)
        return [replace(example, parts=(*example.parts, *branch), branches=()) for branch in branches]

    def row(self, example: Example, sides: Sequence[tuple[Example, Drafts]]) -> Drafts:
        """The row of all lines and their drafts, or what is wrong with one of them."""
        drafts: list[Draft] = []
        for number, (line, side) in enumerate(sides):
            name = self.names[number] if len(sides) == len(self.names) else f"text {number + 1}"
            name = f"{name}: " if len(sides) > 1 else ""
            if isinstance(side, Problem):
                return replace(side, message=f"{name}{side.message}")
            (draft,) = side
            draft.warnings = [replace(warning, message=f"{name}{warning.message}") for warning in draft.warnings]
            self.finish(draft, line)
            drafts.append(draft)
        if self.compares and len(drafts) > 1 and len({draft.ids_T.tobytes() for draft in drafts}) < 2:
            message = "its answers are the same tokens, as the model reads them."
            return Problem(example.source, "identical_sides", message, "Remove the row.")
        return [join(drafts, example.values)] if example.branches else drafts

    def finish(self, draft: Draft, line: Example) -> None:
        """Change the draft of one line before it is joined."""


class PreferenceEncoder(BranchEncoder):
    """Encodes both sides with every check of training on answers, in the chat template if there is one.

    Raises `ModelError` for a tokenizer or template that cannot be trained with.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(side_encoder(settings))
        self.stop_ids = self._side.stop_ids

    def prompt_ids(self, parts: Sequence[Part], tools: Tools, max_tokens: int | None, on_cut: OnCut) -> list[int]:
        """The ids that serving feeds, see `RowEncoder.prompt_ids`."""
        return self._side.prompt_ids(parts, tools, max_tokens, on_cut)

    def row(self, example: Example, sides: Sequence[tuple[Example, Drafts]]) -> Drafts:
        if not example.branches:
            fix = "Give it chosen and rejected, or a label, true or false; to learn from answers alone, use task: chat."
            return Problem(example.source, "no_preference", "it compares no answers.", fix)
        return super().row(example, sides)


class RewardEncoder(BranchEncoder):
    """Causal models are read at the last token of prompt and answer; encoders, of two texts, at the first.

    Raises `ModelError` for a tokenizer or template that cannot be trained with.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self._read_at = -1 if settings.kind == "causal" else 0
        super().__init__(side_encoder(settings) if self._read_at else ClassificationEncoder(settings))

    def lines(self, example: Example) -> list[Example]:
        lines = _with_scores(super().lines(example), example)
        return lines if self._read_at else [replace(line, parts=_two_texts(line)) for line in lines]

    def finish(self, draft: Draft, line: Example) -> None:
        draft.trained_T = np.zeros(len(draft.ids_T), np.bool_)
        draft.trained_T[self._read_at] = True
        draft.classes_N = line.labels


def _with_scores(lines: list[Example], example: Example) -> list[Example]:
    scores = example.labels or (("1", "0") if example.branches else ("0",))
    return [replace(line, labels=(score,)) for line, score in zip(lines, scores, strict=True)]


def _two_texts(line: Example) -> tuple[Part, ...]:
    prompt, answer = ([part.text for part in line.parts if part.trained == is_answer] for is_answer in (0, 1))
    return Part("prompt", "\n".join(prompt), False), Part("answer", "\n".join(answer), True)


class RankingEncoder(BranchEncoder):
    """Query and document as the two texts that the model knows; where both are too long the document is cut."""

    names = ()

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(ClassificationEncoder(settings))
        self._fast, self._limit = settings.fast, settings.limit
        self._frame = self._fast.causal_frame(closed=False) if settings.kind == "causal" else self._fast.frame(2)

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        rows = super().encode(examples)
        queries = self._fast.ids([example.parts[0].text for example in examples])
        for i, (drafts, query) in enumerate(zip(rows, queries, strict=True)):
            if isinstance(drafts, Problem):
                continue
            drafts[0].values = (float(len(self._frame.before_ids) + len(query)),)  # where its documents begin
            if self._limit.excess(2 * len(query) + self._frame.num_added(2)):
                message = f"the {len(query)} tokens of its query are more than half of data.max_tokens."
                rows[i] = Problem(examples[i].source, "too_long", message, "Shorten it, or raise the limit.")
        return rows

    def lines(self, example: Example) -> list[Example]:
        return _with_scores(super().lines(example), example)


class EmbeddingEncoder(BranchEncoder):
    """Anchor, positive and negatives of a row as lines, each in the frame that the tokenizer puts around texts.

    No EOS is put behind it where the tokenizer puts none, so that a text read elsewhere gives the same vector.
    A text is known by its own tokens, without its prompt, so that an anchor is recognised among the documents.
    Raises `RecipeError` for a limit that leaves no token.
    """

    names, compares = (), False

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(ClassificationEncoder(settings))
        pooling = settings.pooling or Pooling()
        prompts = (pooling.document_prompt, pooling.query_prompt)
        self._prompts = [(prompt, first_pooled(pooling, prompt, settings.tokenizer)) for prompt in prompts]
        self._kind = pooling.kind
        self._fast, self._most = settings.fast, settings.limit.max_tokens

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        rows = super().encode(examples)
        if any(prompt for prompt, _ in self._prompts):
            texts = [
                [part.text for parts in (example.parts, *example.branches) for part in parts] for example in examples
            ]
            ids = self._fast.ids([text for of_row in texts for text in of_row])
            keys = (text_key(ids_T[: self._most]) for ids_T in ids)
            for drafts, of_row in zip(rows, texts, strict=True):
                keys_of_row = tuple(islice(keys, len(of_row)))
                if not isinstance(drafts, Problem):
                    drafts[0].keys = keys_of_row
        return rows

    def lines(self, example: Example) -> list[Example]:
        texts = [part for branch in (example.parts, *example.branches) for part in branch]
        prompts = [self._prompts[part.role in QUERIES][0] for part in texts]
        parts = [replace(part, text=prompt + part.text) for prompt, part in zip(prompts, texts, strict=True)]
        return [replace(example, parts=(part,), branches=()) for part in parts]

    def finish(self, draft: Draft, line: Example) -> None:
        _, first = self._prompts[line.parts[0].role in QUERIES]
        draft.trained_T, draft.classes_N = pooled(len(draft.ids_T), self._kind, first), None
        draft.keys = (text_key(draft.ids_T),)


def text_key(ids_T: NDArray[np.int32]) -> int:
    """A 64-bit hash of the tokens of a text."""
    return int.from_bytes(hashlib.blake2b(ids_T.tobytes(), digest_size=8).digest(), "little", signed=True)


def pooled(num_tokens: int, kind: str, first: int = 0) -> NDArray[np.bool_]:
    """[T], the tokens of a text that are pooled into its vector, from `first` on."""
    at, first = np.arange(num_tokens), min(first, num_tokens - 1)
    return at == {"cls": first, "last": num_tokens - 1}[kind] if kind in ("cls", "last") else at >= first


def first_pooled(pooling: Pooling, prompt: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens before the first one that is pooled. Where a prompt is left out, so is what the tokenizer puts
    before it, as in sentence-transformers."""
    if pooling.include_prompt or not prompt:
        return 0
    ids = tokenizer(prompt).input_ids
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)
