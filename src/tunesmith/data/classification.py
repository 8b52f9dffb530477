"""Texts, or pairs of texts, with classes or a number, and words with tags."""

# T tokens, W words

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.drafts import Draft, Drafts
from tunesmith.data.renderer import EncoderSettings, RowEncoder
from tunesmith.data.tokenizer import ControlTokens, Tokens
from tunesmith.errors import RecipeError
from tunesmith.types import Example, Problem


class ClassificationEncoder(RowEncoder):
    """One answer a text, learnt at its first token by an encoder and at its last by a causal model.

    An encoder reads the tokenizer's own frame around one text or two. A causal model reads what the
    tokenizer makes of the text, and the second text on a line of its own; no EOS is put behind it, so that a
    text given to the tokenizer elsewhere meets the head as it was trained. Raises `RecipeError` for a limit
    without place for a token of each text.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self._fast = fast = settings.fast
        self._limit = limit = settings.limit
        self._frames = {1: fast.frame(1), 2: fast.frame(2)}
        if settings.kind == "causal":
            self._frames = dict.fromkeys((1, 2), fast.causal_frame(closed=False))
        self._pooled = -1 if settings.kind == "causal" else 0
        self.control = ControlTokens(settings.tokenizer, "")
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
        sizes = cut_longest([len(text) for text in texts], excess)
        ids_T = frame.around(*(text[:num] for text, num in zip(texts, sizes, strict=True)))
        if not len(ids_T):
            return Problem(example.source, "empty", "its text gives no token.", "Write it, or remove the row.")
        trained_T = np.zeros(len(ids_T), np.bool_)
        trained_T[self._pooled] = True
        draft = Draft(
            ids_T,
            trained_T,
            classes_N=example.labels,
            second=frame.second(sizes[0]) if len(texts) == 2 else 0,
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


class TaggingEncoder(RowEncoder):
    """The words of a sentence with a space between, in the tokenizer's frame, and the first token of each.

    Raises `RecipeError` for a limit without place for a token.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self._fast = fast = settings.fast
        self._limit = limit = settings.limit
        self._frame = fast.causal_frame(closed=False) if settings.kind == "causal" else fast.frame(1)
        self.control = ControlTokens(settings.tokenizer, "")
        if limit.max_tokens is not None and limit.max_tokens <= self._frame.num_added():
            raise RecipeError(f"data.max_tokens: {limit.max_tokens} leaves a word no token. Raise it.")

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        tokens = self._fast.encode([" ".join(part.text for part in example.parts) for example in examples])
        return [self._draft(example, of_it) for example, of_it in zip(examples, tokens, strict=True)]

    def _draft(self, example: Example, tokens: Tokens) -> Drafts:
        words = [part.text for part in example.parts]
        num_tokens = len(tokens.ids_T) + self._frame.num_added()
        excess = self._limit.excess(num_tokens)
        if excess and self._limit.too_long != "cut":
            return self._limit.refusal(example.source, f"its {num_tokens} tokens")
        first_W = first_tokens(words, tokens)
        learnt_W = np.flatnonzero((first_W >= 0) & (first_W < len(tokens.ids_T) - excess))
        if not len(learnt_W):
            return Problem(example.source, "no_target", "none of its words gives a token.", "Remove the row.")
        ids_T = self._frame.around(tokens.ids_T[: len(tokens.ids_T) - excess])
        trained_T = np.zeros(len(ids_T), np.bool_)
        trained_T[first_W[learnt_W] + len(self._frame.before_ids)] = True
        draft = Draft(
            ids_T,
            trained_T,
            classes_N=tuple(example.labels[word] for word in learnt_W) if example.labels else (),
        )
        silent = np.flatnonzero(first_W < 0)
        if len(silent):
            draft.warnings.append(_no_token(example, silent))
        if excess:
            num_cut = len(words) - len(silent) - len(learnt_W)
            cost = f"the end was cut off, the first tokens of {num_cut} words with it"
            draft.warnings.append(self._limit.cut_warning(example.source, f"its {num_tokens} tokens", cost=cost))
        return [draft]


def first_tokens(words: Sequence[str], tokens: Tokens) -> NDArray[np.int64]:
    """[W], the first token of each word of the sentence of `words`; -1 for one that has no token of its own."""
    sizes_W = np.array([len(word) for word in words], np.int64)
    starts_W = np.concatenate([[0], np.cumsum(sizes_W[:-1] + 1)])
    first_W = np.searchsorted(np.maximum.accumulate(tokens.ends_T), starts_W, side="right")
    begins_T = np.append(tokens.starts_T, np.iinfo(np.int64).max)  # behind the last token, no word begins
    # A token may take in the space before its word, but nothing of the word before that.
    is_own_W = (begins_T[first_W] >= starts_W - 1) & (begins_T[first_W] < starts_W + sizes_W)
    is_said_W = np.array([bool(word.strip()) for word in words])
    return np.where(is_own_W & is_said_W, first_W, -1)


def _no_token(example: Example, silent: NDArray[np.int64]) -> Problem:
    first = int(silent[0])
    message = (
        f"{len(silent)} of its words have no token of their own, the first is tokens[{first}] "
        f"({example.parts[first].text[:20]!r}): their tags are not learnt."
    )
    return Problem(example.source, "no_token", message, severity="warning")
