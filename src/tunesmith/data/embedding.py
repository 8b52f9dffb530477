"""Texts to token ids, each with its prompt, and which of their tokens are pooled."""

# T tokens

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.classification import ClassificationEncoder
from tunesmith.data.preference import BranchEncoder
from tunesmith.data.renderer import Draft, LengthLimit
from tunesmith.data.tokenizer import FastTokenizer
from tunesmith.types import Example, ModelKind, Pooling

QUERIES = ("anchor", "query", "sentence1")
"""Roles of texts that search; all others are found."""


class EmbeddingEncoder(BranchEncoder):
    """Anchor, positive and negatives of a row as lines, each in the frame that the tokenizer puts around a text.

    No EOS is put behind it where the tokenizer puts none, so that a text read elsewhere gives the same vector. Raises
    `RecipeError` for a limit that leaves no token.
    """

    names, compares = (), False

    def __init__(
        self, tokenizer: Any, fast: FastTokenizer, limit: LengthLimit, kind: ModelKind, pooling: Pooling
    ) -> None:
        super().__init__(ClassificationEncoder(tokenizer, fast, limit, kind))
        prompts = (pooling.document_prompt, pooling.query_prompt)
        self._prompts = [(prompt, first_pooled(pooling, prompt, tokenizer)) for prompt in prompts]
        self._kind = pooling.kind

    def lines(self, example: Example) -> list[Example]:
        texts = [part for branch in (example.parts, *example.branches) for part in branch]
        prompts = [self._prompts[part.role in QUERIES][0] for part in texts]
        parts = [replace(part, text=prompt + part.text) for prompt, part in zip(prompts, texts, strict=True)]
        return [replace(example, parts=(part,), branches=()) for part in parts]

    def finish(self, draft: Draft, line: Example) -> None:
        _, first = self._prompts[line.parts[0].role in QUERIES]
        draft.trained_T, draft.classes_N = pooled(len(draft.ids_T), self._kind, first), None


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
