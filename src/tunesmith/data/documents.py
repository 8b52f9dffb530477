"""Plain text to windows: every token is learnt once, however long the document is."""

# T tokens

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tunesmith.data.drafts import Draft, Drafted, Room
from tunesmith.data.spelling import Spelled, spell
from tunesmith.data.tokens import ControlTokens, Encoder
from tunesmith.errors import ModelError, RecipeError
from tunesmith.types import Example, Part, Problem, Source


class Documents:
    """Text for a model of next tokens: BOS if the tokenizer adds one, the text, EOS if there is one.

    A window reads at least one token that the one before it has trained. Raises `RecipeError` for a room or a
    `stride` (None: the longest) that leaves tokens out.
    """

    template_text = ""

    def __init__(self, tokenizer: Any, encoder: Encoder, room: Room, stride: int | None) -> None:
        self.control = ControlTokens(tokenizer, "")
        self.stop_ids = () if encoder.eos_id is None else (encoder.eos_id,)
        self._encoder = encoder
        self._frame = encoder.causal_frame(closed=True)
        self._width = room.max_tokens
        self._stride = _checked_stride(stride, width=self._width, num_read=1)

    def encode(self, examples: Sequence[Example]) -> list[Drafted]:
        """Aligned with `examples`."""
        texts = [example.parts[0].text for example in examples]
        return [
            self._windows(example.source, text, spelled)
            for example, text, spelled in zip(examples, texts, spell(self._encoder, texts), strict=True)
        ]

    def prompt_ids(self, parts: Sequence[Part], tools: Sequence[Any]) -> list[int]:
        """What serving feeds to have a text gone on with. `tools` have no meaning."""
        ids_T = self._encoder.ids([parts[0].text], plain=False)[0]
        return [int(token_id) for token_id in np.concatenate([self._frame.before_ids, ids_T])]

    def _windows(self, source: Source, text: str, spelled: Spelled) -> Drafted:
        ids_T = self._frame.around(spelled.ids_T)
        bytes_T = np.zeros(len(ids_T), np.int64)
        bytes_T[len(self._frame.before_ids) :][: len(spelled.ids_T)] = spelled.bytes_T
        drafts = []
        for start, end, seen in windows(len(ids_T), width=self._width, stride=self._stride):
            trained_T = np.arange(start, end) >= max(seen, 1)  # nothing predicts the first token of all
            num_bytes = int(bytes_T[start:end][trained_T].sum())
            drafts.append(Draft(ids_T[start:end], trained_T, num_bytes=num_bytes))
        return _learnable(source, drafts, self.control.num_unspelled(spelled.ids_T, text))


class MaskedDocuments:
    """Text for a model of masked tokens: every window in the tokenizer's own frame. Trained: what may be masked.

    Raises `ModelError` for a tokenizer without a mask; `RecipeError` for a room or a `stride` (None: the longest) that
    leaves tokens out.
    """

    template_text = ""

    def __init__(self, tokenizer: Any, encoder: Encoder, room: Room, stride: int | None) -> None:
        if tokenizer.mask_token_id is None:
            raise ModelError(
                f"{encoder.name}: its tokenizer has no mask token, so no token can be hidden from the model. For task: "
                "text take an encoder that has learnt masked tokens, such as BERT, or a causal model."
            )
        self.control = ControlTokens(tokenizer, "")
        self._encoder = encoder
        self._frame = encoder.frame(1)
        self._width = None if room.max_tokens is None else room.max_tokens - self._frame.num_added()
        self._stride = _checked_stride(stride, width=self._width, num_read=0)

    def encode(self, examples: Sequence[Example]) -> list[Drafted]:
        """Aligned with `examples`."""
        texts = [example.parts[0].text for example in examples]
        return [
            self._windows(example.source, text, spelled)
            for example, text, spelled in zip(examples, texts, spell(self._encoder, texts), strict=True)
        ]

    def _windows(self, source: Source, text: str, spelled: Spelled) -> Drafted:
        maskable_T = ~self.control.are_reserved(spelled.ids_T)
        at = len(self._frame.before_ids)
        drafts = []
        for start, end, seen in windows(len(spelled.ids_T), width=self._width, stride=self._stride):
            learnt_T = maskable_T[start:end] & (np.arange(start, end) >= seen)
            ids_T = self._frame.around(spelled.ids_T[start:end])
            trained_T = np.zeros(len(ids_T), np.bool_)
            trained_T[at : at + end - start] = learnt_T
            drafts.append(Draft(ids_T, trained_T, num_bytes=int(spelled.bytes_T[start:end][learnt_T].sum())))
        return _learnable(source, drafts, self.control.num_unspelled(spelled.ids_T, text))


def windows(num_tokens: int, *, width: int | None, stride: int | None) -> Iterator[tuple[int, int, int]]:
    """(start, end, seen) of each window: tokens before `seen` stand in an earlier one, so they are only read again."""
    start = seen = 0
    while seen < num_tokens:
        end = num_tokens if width is None else min(start + width, num_tokens)
        yield start, end, seen
        seen = end
        start += stride or 0


def _checked_stride(stride: int | None, *, width: int | None, num_read: int) -> int | None:
    """The stride of windows that read at least `num_read` tokens again; None: one window holds everything."""
    if width is None:
        return None
    longest = width - num_read
    if longest < 1:
        raise RecipeError("data.max_tokens: a window that short has no token to learn. Raise it.")
    if stride is not None and stride > longest:
        raise RecipeError(
            f"data.stride: {stride:,} would leave tokens out between windows of data.max_tokens. Lower it to "
            f"{longest:,} or less, or raise data.max_tokens."
        )
    return stride or longest


def _learnable(source: Source, drafts: list[Draft], num_unspelled: int) -> Drafted:
    """The windows in which something is learnt."""
    drafts = [draft for draft in drafts if draft.trained_T.any()]
    if not drafts:
        return Problem(source, "no_target", "its text gives no token that could be learnt.", "Remove the row.")
    drafts[0].num_unspelled = num_unspelled
    return drafts
