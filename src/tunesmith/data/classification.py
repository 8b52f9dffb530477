"""Texts, or pairs of texts, with classes or a number."""

# T tokens

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.drafts import Draft, Drafts, LengthLimit, RowEncoder
from tunesmith.data.tokenizer import ControlTokens, FastTokenizer
from tunesmith.errors import RecipeError
from tunesmith.types import Example, ModelKind, Problem


class ClassificationEncoder(RowEncoder):
    """One answer a text, learnt at its first token by an encoder and at its last by a causal model.

    An encoder reads the tokenizer's own frame around one text or two. A causal model reads what the tokenizer makes of
    the text, and the second text on a line of its own; no EOS is put behind it, so that a text given to the tokenizer
    elsewhere meets the head as it was trained. Raises `RecipeError` for a limit without place for a token of each text.
    """

    def __init__(self, tokenizer: Any, fast: FastTokenizer, limit: LengthLimit, kind: ModelKind) -> None:
        self._fast = fast
        self._limit = limit
        of_both = fast.causal_frame(closed=False)
        self._frames = {1: of_both, 2: of_both} if kind == "causal" else {1: fast.frame(1), 2: fast.frame(2)}
        self._pooled = -1 if kind == "causal" else 0
        self.control = ControlTokens(tokenizer, "")
        if limit.max_tokens is not None and limit.max_tokens < self._frames[2].num_added(2) + 2:
            raise RecipeError(f"data.max_tokens: {limit.max_tokens} leaves two texts no token. Raise it.")

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        texts = [part.text for example in examples for part in example.parts]
        ids = iter(self._fast.ids(texts))
        return [self._draft(example, [next(ids) for _ in example.parts]) for example in examples]

    def _draft(self, example: Example, texts: list[NDArray[np.int32]]) -> Drafts:
        frame = self._frames[len(texts)]
        num_tokens = sum(map(len, texts)) + frame.num_added(len(texts))
        excess = self._limit.excess(num_tokens)
        if excess and self._limit.too_long != "cut":
            return self._limit.refusal(example.source, f"its {num_tokens} tokens")
        kept = cut_longest([len(text) for text in texts], excess)
        ids_T = frame.around(*(text[:num] for text, num in zip(texts, kept, strict=True)))
        if not len(ids_T):
            return Problem(example.source, "empty", "its text gives no token.", "Write it, or remove the row.")
        trained_T = np.zeros(len(ids_T), np.bool_)
        trained_T[self._pooled] = True
        draft = Draft(
            ids_T,
            trained_T,
            num_unspelled=self.control.num_unspelled(np.concatenate(texts), *(part.text for part in example.parts)),
            classes_N=example.labels,
            second=frame.second(kept[0]) if len(texts) == 2 else 0,
        )
        if excess:
            cost = f"the last {excess} were cut off" + (", of the longer text first" if len(texts) == 2 else "")
            draft.warnings.append(self._limit.cut_warning(example.source, f"its {num_tokens} tokens", cost=cost))
        return [draft]


def cut_longest(lengths: Sequence[int], excess: int) -> list[int]:
    """One or two lengths after a cut: the longer is cut down to the other, then both alike.

    The rule "longest_first" of the library tokenizers.
    """
    left = sum(lengths) - excess
    if len(lengths) == 1:
        return [left]
    short = min(*lengths, left // 2)
    return [left - short, short] if lengths[0] > lengths[1] else [short, left - short]
