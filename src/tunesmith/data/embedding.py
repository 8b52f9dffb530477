"""Texts to token ids, each with its prompt, and which of their tokens are pooled."""

# T tokens

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.renderer import Draft, Drafts, LengthLimit, RowEncoder
from tunesmith.data.tokenizer import ControlTokens, FastTokenizer
from tunesmith.errors import RecipeError
from tunesmith.types import Example, ModelKind, Pooling, Problem

QUERIES = ("anchor", "query", "sentence1")
"""Roles of texts that search; all others are found."""


class EmbeddingEncoder(RowEncoder):
    """Anchor, positive and negatives of a row as lines, each in the frame that the tokenizer puts around a text.

    No EOS is put behind it where the tokenizer puts none, so that a text read elsewhere gives the same vector. Raises
    `RecipeError` for a limit that leaves no token.
    """

    def __init__(
        self, tokenizer: Any, fast: FastTokenizer, limit: LengthLimit, kind: ModelKind, pooling: Pooling
    ) -> None:
        self._fast, self._limit, self._pooling = fast, limit, pooling
        self._frame = fast.causal_frame(closed=False) if kind == "causal" else fast.frame(1)
        self.control = ControlTokens(tokenizer, "")
        prompts = (pooling.document_prompt, pooling.query_prompt)
        self._firsts = [first_pooled(pooling, prompt, tokenizer) for prompt in prompts]
        if limit.max_tokens is not None and limit.max_tokens <= self._frame.num_added():
            raise RecipeError(f"data.max_tokens: {limit.max_tokens} leaves a text no token. Raise it.")

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        texts = [
            (self._pooling.query_prompt if part.role in QUERIES else self._pooling.document_prompt) + part.text
            for example in examples
            for part in _texts_of(example)
        ]
        ids = iter(zip(texts, self._fast.ids(texts), strict=True))
        return [self._draft(example, [next(ids) for _ in _texts_of(example)]) for example in examples]

    def _draft(self, example: Example, texts: list[tuple[str, NDArray[np.int32]]]) -> Drafts:
        draft = Draft(np.empty(0, np.int32), np.empty(0, np.bool_), values=example.values)
        lines, firsts = [], []
        for part, (text, ids_T) in zip(_texts_of(example), texts, strict=True):
            what = f"the {len(ids_T) + self._frame.num_added()} tokens of its {part.role}"
            if not len(ids_T):
                return Problem(example.source, "empty", f"its {part.role} gives no token.", "Write it.")
            if excess := self._limit.excess(len(ids_T) + self._frame.num_added()):
                if self._limit.too_long != "cut":
                    return self._limit.refusal(example.source, what)
                cost = f"the last {excess} were cut off"
                draft.warnings.append(self._limit.cut_warning(example.source, what, cost=cost))
            draft.num_unspelled += self.control.num_unspelled(ids_T, text)
            lines.append(self._frame.around(ids_T[: len(ids_T) - excess]))
            firsts.append(self._firsts[part.role in QUERIES])
        draft.ids_T = np.concatenate(lines)
        masks = [pooled(len(line), self._pooling.kind, first) for line, first in zip(lines, firsts, strict=True)]
        draft.trained_T = np.concatenate(masks)
        draft.branches = tuple(map(len, lines)) if example.branches else ()
        return [draft]


def pooled(num_tokens: int, kind: str, first: int = 0) -> NDArray[np.bool_]:
    """[T], the tokens of a text that its vector is made of, from `first` on."""
    at, first = np.arange(num_tokens), min(first, num_tokens - 1)
    return at == {"cls": first, "last": num_tokens - 1}[kind] if kind in ("cls", "last") else at >= first


def first_pooled(pooling: Pooling, prompt: str, tokenizer: Any) -> int:
    """Tokens before the first one that is pooled. Where a prompt is left out, so is what the tokenizer puts before it,
    as in sentence-transformers."""
    if pooling.include_prompt or not prompt:
        return 0
    ids = tokenizer(prompt).input_ids
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def _texts_of(example: Example) -> list[Any]:
    return [*example.parts, *(part for branch in example.branches for part in branch)]
